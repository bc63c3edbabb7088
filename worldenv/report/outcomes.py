"""How long episodes take and how they end: the statistics of the paper's appendix C.1 (Figure 10) from any set of episodes.

Episodes go on past success, so a success is as long as the steps before the predicate first held, and a failure as long as it ran.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

_PERCENTS = (10, 50, 90)


class Ended(Protocol):
    """One episode's line in an index (`data.episode.Entry`)."""

    @property
    def instruction(self) -> str: ...
    @property
    def steps(self) -> int: ...
    @property
    def first_success(self) -> int | None: ...


Outcomes = Mapping[str, Mapping[str, Sequence[int]]]
"""By instruction: lengths of its `successes` and of its `failures` [control steps]."""


def lengths_by_outcome(episodes: Iterable[Ended]) -> dict[str, dict[str, list[int]]]:
    """Lengths by instruction and outcome, in order."""
    found: dict[str, dict[str, list[int]]] = {}
    for one in episodes:
        task = found.setdefault(one.instruction, {"successes": [], "failures": []})
        if one.first_success is None:
            task["failures"].append(one.steps)
        else:
            task["successes"].append(one.first_success)
    return found


def lengths_of(found: Outcomes, outcome: str) -> np.ndarray[Any, np.dtype[np.int64]]:
    """(n,) of all tasks, in order [control steps]; `outcome` is "successes" or "failures"."""
    return np.array([length for task in found.values() for length in task[outcome]], np.int64)


def summary(found: Outcomes) -> dict[str, Any]:
    """Counts by task, and length by outcome: mean and percentiles [control steps], null where there is none. ValueError of no episodes."""
    if not any(len(lengths) for task in found.values() for lengths in task.values()):
        raise ValueError("no episodes, so no statistics")

    def told(outcome: str) -> dict[str, Any]:
        lengths = lengths_of(found, outcome)
        if not len(lengths):
            return {"episodes": 0, "mean": None, **{f"p{percent}": None for percent in _PERCENTS}}
        points = np.percentile(lengths, _PERCENTS)
        return {"episodes": len(lengths), "mean": float(lengths.mean()), **{f"p{p}": float(v) for p, v in zip(_PERCENTS, points, strict=True)}}

    by_task = {task: {outcome: len(lengths) for outcome, lengths in one.items()} for task, one in found.items()}
    return {"successes": told("successes"), "failures": told("failures"), "by_task": by_task}

"""How long episodes take and how they end: the statistics of the paper's appendix C.1 (Figure 10) from any set of episodes.

Episodes go on past success, so a success is as long as the steps before the predicate first held, and a failure as long as it ran.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import matplotlib
import numpy as np
from matplotlib.ticker import MaxNLocator

from worldenv.report.figures import AFTER, BEFORE, STYLE, Plot, axes_of, finished

_BINS = 24
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


def _lengths(found: Outcomes, outcome: str) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.array([length for task in found.values() for length in task[outcome]], np.int64)


def summary(found: Outcomes) -> dict[str, Any]:
    """Counts by task, and length by outcome: mean and percentiles [control steps], null where there is none. ValueError of no episodes."""
    if not any(len(lengths) for task in found.values() for lengths in task.values()):
        raise ValueError("no episodes, so no statistics")

    def told(outcome: str) -> dict[str, Any]:
        lengths = _lengths(found, outcome)
        if not len(lengths):
            return {"episodes": 0, "mean": None, **{f"p{percent}": None for percent in _PERCENTS}}
        points = np.percentile(lengths, _PERCENTS)
        return {"episodes": len(lengths), "mean": float(lengths.mean()), **{f"p{p}": float(v) for p, v in zip(_PERCENTS, points, strict=True)}}

    by_task = {task: {outcome: len(lengths) for outcome, lengths in one.items()} for task, one in found.items()}
    return {"successes": told("successes"), "failures": told("failures"), "by_task": by_task}


def draw(found: Outcomes) -> list[Plot]:
    """Length distribution, cumulative distribution, and outcomes by task. ValueError of no episodes."""
    summary(found)
    with matplotlib.rc_context(STYLE):
        return [_distribution(found), _cumulative(found), _by_task(found)]


_KINDS = (("successes", "success", AFTER), ("failures", "failure", BEFORE))


def _distribution(found: Outcomes) -> Plot:
    figure, (axes,) = axes_of()
    longest = max(_lengths(found, outcome).max(initial=1) for outcome, _, _ in _KINDS)
    edges = np.linspace(0, longest, min(_BINS, int(longest)) + 1).tolist()
    for outcome, label, colour in _KINDS:
        lengths = _lengths(found, outcome)
        axes.hist(lengths, bins=edges, color=colour, alpha=0.75, label=f"{label} ({len(lengths)})")
    axes.set_xlabel("control steps")
    axes.set_ylabel("episodes")
    figure.legend(loc="outside upper center", ncols=2)
    caption = "Length of an episode: of a success, until the predicate first held; of a failure, as long as it ran (cf. the paper's Figure 10a)."
    return finished("lengths", "Lengths of episodes", caption, figure)


def _cumulative(found: Outcomes) -> Plot:
    figure, (axes,) = axes_of()
    for outcome, label, colour in _KINDS:
        lengths = np.sort(_lengths(found, outcome))
        if len(lengths):
            axes.step([0, *lengths], np.arange(len(lengths) + 1) / len(lengths), where="post", color=colour, label=label)
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("control steps")
    axes.set_ylabel("share that ended by then")
    figure.legend(loc="outside upper center", ncols=2)
    return finished("cumulative", "Cumulative distribution of lengths", "Of each outcome by itself (cf. the paper's Figure 10b).", figure)


def _by_task(found: Outcomes) -> Plot:
    figure, (axes,) = axes_of()
    figure.set_figheight(1.2 + 0.32 * len(found))
    at, left = np.arange(len(found))[::-1], np.zeros(len(found))
    for outcome, label, colour in _KINDS:
        share = np.array([100 * len(task[outcome]) / max(1, sum(map(len, task.values()))) for task in found.values()])
        axes.barh(at, share, left=left, height=0.7, color=colour, label=label)
        left += share
    names = [name if len(name) <= 48 else name[:46] + " …" for name in found]
    counts = [sum(map(len, task.values())) for task in found.values()]
    axes.set_yticks(at, [f"{name} ({count})" for name, count in zip(names, counts, strict=True)], fontsize=6.5)
    axes.grid(False, axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("episodes [%]")
    figure.legend(loc="outside upper center", ncols=2)
    return finished("outcomes", "Outcomes by task", "In brackets: episodes (cf. the paper's Figure 10c).", figure)

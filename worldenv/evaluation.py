"""Success in the true environment, by three protocols at once, with intervals; two policies on the same states, paired.

    oracle      ended by the predicate: success if it holds at any observation up to the step limit (the paper's Table 1)
    limit       runs to the step limit: success if the predicate holds at the end (its Table 3, baselines)
    reflector   ended by the reflector: success if the predicate holds where the score first exceeds eta, else at the limit (its Table 3, ours)

A policy's chunks are executed open loop and ending only cuts an episode short, so one episode to the limit answers all three.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from worldenv import console
from worldenv.checkpoint import Savepoint
from worldenv.data.collect import Recorder, act_out
from worldenv.data.scenes import Scenes, Start
from worldenv.devices import dealt
from worldenv.envs.contract import TrueEnvironment
from worldenv.policy.contract import Policy
from worldenv.reflector.contract import Reflector, scored

Protocol = Literal["oracle", "limit", "reflector"]
_Z95 = 1.959963984540054


@dataclass(frozen=True)
class Outcomes:
    """What came of n episodes to the step limit T, in the order of their starts."""

    start: tuple[Start, ...]
    success: NDArray[np.bool_]
    """(n, T + 1): the predicate at each observation, the first before any command."""
    score: NDArray[np.float32] | None
    """(n, T): the reflector after each step, NaN after the chunk in which it ended the episode; None where none was asked."""
    threshold: float
    """eta."""

    def by(self, protocol: Protocol) -> NDArray[np.bool_]:
        """(n,): success by `protocol`. ValueError for the reflector's where there was none."""
        if protocol == "oracle":
            hit = self.success.any(axis=1)
        elif protocol == "limit":
            hit = self.success[:, -1]
        else:
            hit = self.success[np.arange(len(self.success)), self.ends()]
        return np.asarray(hit)

    def ends(self) -> NDArray[np.int64]:
        """(n,): the observation at which the reflector ends each episode; T where it does not."""
        if self.score is None:
            raise ValueError("no reflector was at this evaluation, so none ended it; evaluate with one")
        above = self.score > self.threshold
        return np.asarray(np.where(above.any(axis=1), above.argmax(axis=1) + 1, self.score.shape[1]))

    def first(self, episodes: int) -> Outcomes:
        """Of the first `episodes` alone."""
        return Outcomes(self.start[:episodes], self.success[:episodes], None if self.score is None else self.score[:episodes], self.threshold)

    def tally(self, tasks: Sequence[str]) -> dict[str, Any]:
        """Successes, episodes and 95 % interval by protocol, and by task within it; JSON-ready."""
        protocols: tuple[Protocol, ...] = ("oracle", "limit") if self.score is None else ("oracle", "limit", "reflector")
        task = np.array([s.task for s in self.start])
        return {protocol: tally(self.by(protocol), task, tasks) for protocol in protocols}

    def tree(self) -> dict[str, Any]:
        """For a checkpoint."""
        starts = [[s.number, s.task, s.split, s.index] for s in self.start]
        return {"start": starts, "success": self.success, "score": self.score, "threshold": self.threshold}

    @classmethod
    def from_tree(cls, tree: dict[str, Any]) -> Outcomes:
        """The opposite of `tree`."""
        return cls(tuple(Start(*row) for row in tree["start"]), tree["success"], tree["score"], tree["threshold"])


def tally(hit: NDArray[np.bool_], task: NDArray[np.int64], tasks: Sequence[str]) -> dict[str, Any]:
    """Successes `hit` (n,), episodes and 95 % interval, in all and by task (`task` (n,) numbers them); JSON-ready."""

    def counted(some: NDArray[np.bool_]) -> dict[str, Any]:
        successes = int(some.sum())
        return {"successes": successes, "episodes": len(some), "interval": list(wilson(successes, len(some)))}

    return {**counted(hit), "by_task": {name: counted(hit[task == i]) for i, name in enumerate(tasks) if (task == i).any()}}


def starts(env: TrueEnvironment, episodes: int) -> list[Start]:
    """`episodes` test states, spread evenly over the tasks, each task's in order. ValueError where there are not so many."""
    tasks, most = len(env.tasks), len(env.tasks) * env.states("test")
    if not 1 <= episodes <= most:
        raise ValueError(f"episodes={episodes}: there are {most} test states of {tasks} tasks; want 1 .. {most}")
    return [Start(n, n % tasks, "test", n // tasks) for n in range(episodes)]


def evaluate(
    policy: Policy, scenes: Scenes, chosen: Sequence[Start], steps: int, reflectors: Sequence[Reflector], threshold: float,
    device: torch.device, label: str = "eval", batch: int = 30, savepoint: Savepoint | None = None,
) -> Outcomes:  # fmt: skip
    """Greedy episodes of `policy` from `chosen`, all to the step limit `steps`. With reflectors every frame is drawn, and scored until a score is
    above `threshold`.

    Several reflectors are one, on several devices: each scores a batch while the next ones are acted out. A killed evaluation goes on from
    `savepoint`.
    """
    success: list[list[bool]] = []
    scores: list[NDArray[np.float32]] = []
    if savepoint is not None and (kept := savepoint.load("success", "scores")) is not None:
        success, scores = kept["success"], kept["scores"]

    def acted() -> Iterator[list[Recorder]]:
        for i in console.track(-(-len(success) // batch), -(-len(chosen) // batch), label):
            yield act_out(scenes, policy, chosen[i * batch : (i + 1) * batch], steps, None, render=bool(reflectors), device=device)

    def judged(reflector: Reflector | None, recorders: list[Recorder]) -> tuple[list[list[bool]], NDArray[np.float32] | None]:
        held = [[m.success for m in r.moments] for r in recorders]
        if reflector is None:
            return held, None
        frames = torch.from_numpy(np.stack([np.stack([m.frame for m in r.moments]) for r in recorders]))
        asked = [scenes.tasks[r.task] for r in recorders]
        return held, scored(reflector, asked, frames[:, 0], frames[:, 1:], policy.chunk, threshold).numpy()

    judges: Sequence[Reflector | None] = reflectors or [None]
    for held, score in dealt(judges, acted(), judged):
        success += held
        scores += [] if score is None else [score]
        if savepoint is not None and (savepoint.due() or len(success) == len(chosen)):
            savepoint.save({"success": success, "scores": scores})
    return Outcomes(tuple(chosen), np.array(success), np.concatenate(scores) if scores else None, threshold)


def wilson(successes: int, episodes: int) -> tuple[float, float]:
    """95 % interval of a fraction (Wilson 1927): both ends in [0, 1]. ValueError unless 0 <= successes <= episodes and episodes >= 1."""
    if not 0 <= successes <= episodes or episodes < 1:
        raise ValueError(f"wilson: {successes} successes of {episodes} episodes")
    share, z2 = successes / episodes, _Z95**2
    middle = (share + z2 / (2 * episodes)) / (1 + z2 / episodes)
    half = _Z95 * math.sqrt(share * (1 - share) / episodes + z2 / (4 * episodes**2)) / (1 + z2 / episodes)
    low = max(0.0, middle - half) if successes else 0.0  # exactly so, not to rounding
    return low, min(1.0, middle + half) if successes < episodes else 1.0


def mcnemar(wins: int, losses: int) -> float:
    """Exact two-sided p-value that wins and losses of discordant pairs are equally likely (McNemar's test as a sign test); 1 where there are none."""
    if wins < 0 or losses < 0:
        raise ValueError(f"mcnemar: {wins} wins, {losses} losses")
    pairs, most = wins + losses, max(wins, losses)
    tail = sum(math.comb(pairs, k) for k in range(most, pairs + 1))
    return min(1.0, 2 * float(Fraction(tail, 2**pairs)))


def paired(before: NDArray[np.bool_], after: NDArray[np.bool_]) -> dict[str, Any]:
    """`after` against `before` (n,) on the same states: wins, losses, exact McNemar p, and the difference of success with its 95 % interval.

    Interval: Newcombe (1998), method 10, hybrid score with the correlation of the pairs. ValueError where lengths differ.
    """
    if before.shape != after.shape or before.ndim != 1 or not len(before):
        raise ValueError(f"paired: {before.shape} and {after.shape} outcomes, want (n,) both")
    n, wins, losses = len(before), int((after & ~before).sum()), int((before & ~after).sum())
    both, neither = int((before & after).sum()), int((~before & ~after).sum())
    p, q = float(after.mean()), float(before.mean())
    (lower_p, upper_p), (lower_q, upper_q) = wilson(int(after.sum()), n), wilson(int(before.sum()), n)
    margins = (both + wins) * (losses + neither) * (both + losses) * (wins + neither)
    cross = float(both * neither - wins * losses)
    if cross > 0:
        cross = max(cross - n / 2, 0.0)  # Newcombe's correction for continuity, where pairs go together
    phi = cross / math.sqrt(margins) if margins else 0.0

    def width(a: float, b: float) -> float:
        return math.sqrt(max(a * a - 2 * phi * a * b + b * b, 0.0))

    difference = p - q
    low = difference - width(p - lower_p, upper_q - q)
    high = difference + width(upper_p - p, q - lower_q)
    return {"wins": wins, "losses": losses, "p_value": mcnemar(wins, losses), "difference": difference, "interval": [max(low, -1.0), min(high, 1.0)]}

"""One episode of an evaluation, whoever acts, by one of three protocols (see `worldenv.evaluation`):

    oracle      ended by the predicate: success if it holds at any observation up to the step limit (the paper's Table 1)
    limit       runs to the step limit: success if the predicate holds at the end (its Table 3, baselines)
    reflector   ended by the first score above eta, else at the limit: success if the predicate holds there (its Table 3, ours)

Whoever acts is asked from outside, as a generator asks: so the same episode runs in this process or in another. An expert acts inside.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from worldenv import noise
from worldenv.data.collect import Expert
from worldenv.data.scenes import Start
from worldenv.envs.contract import Snapshot
from worldenv.evaluation import Protocol


@dataclass(frozen=True)
class Question:
    """What one who acts is shown, once in a chunk."""

    number: int
    """Of the episode."""
    step: int
    """Steps so far."""
    instruction: str
    now: Snapshot
    frames: NDArray[np.uint8] | None
    """(K, H, W, 3): what was seen since the last question, for a reflector; None at the first, and where there is no reflector."""
    last: bool
    """The limit is reached: only the reflector is asked."""


@dataclass(frozen=True)
class Answer:
    """What follows."""

    command: NDArray[np.float32] | None
    """(K, 7); None where the episode ends."""
    ended: int | None = None
    """The observation at which the reflector ended it."""


@dataclass(frozen=True)
class Trial:
    """What came of one episode."""

    number: int
    task: int
    split: str
    index: int
    state: str
    """SHA-256 of the initial state."""
    success: bool
    """By the protocol."""
    first_success: int | None
    """The first observation at which the predicate held, of those that were made; 0 is before any command."""
    ended: int
    """The observation at which the episode ended."""
    steps: int
    """Control steps that were made."""
    seconds: float
    """Wall time of the episode, its beginning and whoever acted included [s]."""
    cpu_seconds: float
    """Processor time of the process that held the environment [s]."""

    def plain(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


@dataclass
class _Path:
    """What the predicate said at each observation, and what was seen since the last question."""

    success: list[bool] = field(default_factory=list)
    frames: list[NDArray[np.uint8]] = field(default_factory=list)


def play(
    env: Any, start: Start, protocol: Protocol, limit: int, expert: Expert | None, variation: int, seed: int
) -> Generator[Question, Answer, Trial]:
    """The episode from `start` in `env`, to `limit` control steps at most. With an `expert` nothing is asked, and nothing needs to be drawn; its
    manner (`variation` numbers) is drawn by `seed` and the episode's number.
    """
    began, worked = time.perf_counter(), time.process_time()
    now = env.begin(start.task, start.split, start.index)
    path, ended = _Path([now.success]), limit
    manner = noise.uniform(seed, start.number, 0, 0, noise.Stream.DEMOS, (variation,)) if expert else np.empty(0)
    watched = protocol == "reflector"
    done = protocol == "oracle" and now.success
    while not done and ((step := len(path.success) - 1) < limit or watched):
        if expert is not None:
            command: NDArray[np.float32] | None = expert.command(env, manner)[None]
        else:
            seen = np.stack(path.frames) if path.frames else None
            answer = yield Question(start.number, step, env.tasks[start.task], now, seen, last=step == limit)
            command, ended = answer.command, limit if answer.ended is None else answer.ended
            path.frames.clear()
        if command is None:
            break
        chunk = command[: limit - step]
        for k, one in enumerate(chunk):
            now = env.advance(one, render=expert is None and (watched or k == len(chunk) - 1))
            path.success.append(now.success)
            if watched:
                path.frames.append(now.frame)
            if done := protocol == "oracle" and now.success:
                break
    made = len(path.success) - 1
    if protocol == "oracle":
        success, ended = path.success[-1], made
    else:
        success = path.success[ended]
    first = path.success.index(True) if any(path.success) else None
    return Trial(
        start.number, start.task, start.split, start.index, env.state_hash(start.task, start.split, start.index), bool(success), first, ended, made,
        round(time.perf_counter() - began, 3), round(time.process_time() - worked, 3),
    )  # fmt: skip

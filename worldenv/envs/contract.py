"""What a true environment is to the rest: a Gymnasium environment that knows its camera, tasks and fixed initial states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from worldenv.nouns import Camera

Split = Literal["train", "test"]


@dataclass(frozen=True)
class Snapshot:
    """What is true at one moment."""

    frame: NDArray[np.uint8]
    """(H, W, 3)."""
    pose: NDArray[np.float64]
    """(7,) gripper pose [m, unit quaternion xyzw], sign continuous within an episode."""
    gripper: float
    """0 shut .. 1 open."""
    success: bool
    """The task's predicate holds."""


class TrueEnvironment(Protocol):
    """Deterministic given task, initial state and actions. Also a `gymnasium.Env`; this is the part that stages use."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """The instruction of each task."""
        ...

    @property
    def camera(self) -> Camera:
        """agentview."""
        ...

    def states(self, split: Split) -> int:
        """Number of fixed initial states per task in `split`."""
        ...

    def begin(self, task: int, split: Split, index: int) -> Snapshot:
        """Put the scene into fixed initial state `index` of `split`; ValueError where there is none."""
        ...

    def advance(self, command: NDArray[np.floating[Any]], render: bool = True) -> Snapshot:
        """One control step (50 ms) of a command (7,), clipped to [-1, 1]; `render=False` repeats the last frame and saves its time."""
        ...

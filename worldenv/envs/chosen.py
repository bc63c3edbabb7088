"""Some of an environment's tasks, numbered anew from 0: what a run of two tasks of a suite of ten sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from worldenv.envs.contract import Snapshot, Split, TrueEnvironment
from worldenv.kinematics import ControllerModel
from worldenv.nouns import Camera
from worldenv.robots.contract import Robot


class ChosenTasks:
    """`TrueEnvironment`: task i is task `chosen[i]` of `whole`."""

    def __init__(self, whole: TrueEnvironment, chosen: Sequence[int]) -> None:
        """All tasks where `chosen` is empty. Raises ValueError for a task that is not there, or is there twice."""
        there = len(whole.tasks)
        if len(set(chosen)) != len(chosen) or not all(0 <= task < there for task in chosen):
            raise ValueError(f"env.tasks={tuple(chosen)}: want different numbers, 0 .. {there - 1}: {', '.join(map(repr, whole.tasks))}")
        self.whole = whole
        """The environment itself: what an expert looks into."""
        self._chosen = tuple(chosen) or tuple(range(there))

    @property
    def tasks(self) -> tuple[str, ...]:
        """See `TrueEnvironment`."""
        return tuple(self.whole.tasks[task] for task in self._chosen)

    @property
    def robot(self) -> Robot:
        """See `TrueEnvironment`."""
        return self.whole.robot

    @property
    def controller(self) -> ControllerModel:
        """See `TrueEnvironment`."""
        return self.whole.controller

    @property
    def camera(self) -> Camera:
        """See `TrueEnvironment`."""
        return self.whole.camera

    def camera_of(self, task: int) -> Camera:
        """See `TrueEnvironment`."""
        return self.whole.camera_of(self._chosen[task])

    def close(self) -> None:
        """See `TrueEnvironment`."""
        self.whole.close()

    def versions(self) -> dict[str, str]:
        """See `TrueEnvironment`."""
        return self.whole.versions()

    def states(self, split: Split) -> int:
        """See `TrueEnvironment`."""
        return self.whole.states(split)

    def begin(self, task: int, split: Split, index: int) -> Snapshot:
        """See `TrueEnvironment`. ValueError for a task that was not chosen."""
        if not 0 <= task < len(self._chosen):
            raise ValueError(f"task={task}: {len(self._chosen)} tasks were chosen, 0 .. {len(self._chosen) - 1}")
        return self.whole.begin(self._chosen[task], split, index)

    def advance(self, command: NDArray[np.floating[Any]], render: bool = True) -> Snapshot:
        """See `TrueEnvironment`."""
        return self.whole.advance(command, render)

    def capture(self) -> Any:
        """See `TrueEnvironment`."""
        return self.whole.capture()

    def restore(self, moment: Any) -> None:
        """See `TrueEnvironment`."""
        self.whole.restore(moment)

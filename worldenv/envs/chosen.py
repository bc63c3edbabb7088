"""Some of the tasks of an environment or a site, numbered anew from 0: what a run of two tasks of a suite of ten sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from worldenv.envs.contract import Site, Snapshot, Split, TrueEnvironment
from worldenv.kinematics import ControllerModel
from worldenv.nouns import Camera
from worldenv.robots.contract import Robot


class ChosenSite:
    """`Site`: task i is task `chosen[i]` of `whole`."""

    def __init__(self, whole: Site, chosen: Sequence[int]) -> None:
        """All tasks where `chosen` is empty. Raises ValueError for a task that is not there, or is there twice."""
        there = len(whole.tasks)
        if len(set(chosen)) != len(chosen) or not all(0 <= task < there for task in chosen):
            raise ValueError(f"env.tasks={tuple(chosen)}: want different numbers, 0 .. {there - 1}: {', '.join(map(repr, whole.tasks))}")
        self._site = whole
        self._chosen = tuple(chosen) or tuple(range(there))

    @property
    def tasks(self) -> tuple[str, ...]:
        """See `Site`."""
        return tuple(self._site.tasks[task] for task in self._chosen)

    @property
    def robot(self) -> Robot:
        """See `Site`."""
        return self._site.robot

    def camera_of(self, task: int) -> Camera:
        """See `Site`."""
        return self._site.camera_of(self._chosen[task])

    def close(self) -> None:
        """See `Site`."""
        self._site.close()

    def versions(self) -> dict[str, str]:
        """See `Site`."""
        return self._site.versions()

    def states(self, split: Split) -> int:
        """See `Site`."""
        return self._site.states(split)

    def begin(self, task: int, split: Split, index: int) -> Snapshot:
        """See `Site`. ValueError for a task that was not chosen."""
        if not 0 <= task < len(self._chosen):
            raise ValueError(f"task={task}: {len(self._chosen)} tasks were chosen, 0 .. {len(self._chosen) - 1}")
        return self._site.begin(self._chosen[task], split, index)


class ChosenTasks(ChosenSite):
    """`TrueEnvironment`: task i is task `chosen[i]` of `whole`."""

    def __init__(self, whole: TrueEnvironment, chosen: Sequence[int]) -> None:
        """See `ChosenSite`."""
        super().__init__(whole, chosen)
        self.whole = whole
        """The environment itself: what an expert looks into."""

    @property
    def controller(self) -> ControllerModel:
        """See `TrueEnvironment`."""
        return self.whole.controller

    @property
    def camera(self) -> Camera:
        """See `TrueEnvironment`."""
        return self.whole.camera

    def advance(self, command: NDArray[np.floating[Any]], render: bool = True) -> Snapshot:
        """See `TrueEnvironment`."""
        return self.whole.advance(command, render)

    def capture(self) -> Any:
        """See `TrueEnvironment`."""
        return self.whole.capture()

    def restore(self, moment: Any) -> None:
        """See `TrueEnvironment`."""
        self.whole.restore(moment)

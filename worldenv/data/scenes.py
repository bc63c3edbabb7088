"""Scenes of the true environment in which episodes are made side by side: one here, or several, each in a process of its own."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from worldenv.envs.contract import Snapshot, Split, TrueEnvironment
from worldenv.robots.contract import Robot


@dataclass(frozen=True)
class Start:
    """An episode that is to be made."""

    number: int
    task: int
    split: Split
    index: int


class Scenes(Protocol):
    """Where episodes are made, some at a time. What comes out does not depend on how many scenes there are."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """The instruction of each task."""
        ...

    @property
    def robot(self) -> Robot:
        """Whose commands these are."""
        ...

    def begin(self, starts: Sequence[Start]) -> list[Snapshot]:
        """The first moment of an episode from each of `starts`; those before are forgotten."""
        ...

    def play(self, command: NDArray[np.float32], render: bool) -> list[list[Snapshot]]:
        """What K commands (n, K, 7) lead to in the n episodes: K moments of each. Without `render` the last one alone is drawn, the others repeat
        the frame before them.
        """
        ...


class OneScene:
    """See `Scenes`. All episodes take turns in one environment."""

    def __init__(self, env: TrueEnvironment) -> None:
        self._env, self._captured = env, list[Any]()

    @property
    def tasks(self) -> tuple[str, ...]:
        """See `Scenes`."""
        return self._env.tasks

    @property
    def robot(self) -> Robot:
        """See `Scenes`."""
        return self._env.robot

    def begin(self, starts: Sequence[Start]) -> list[Snapshot]:
        """See `Scenes`."""
        moments, self._captured = [], []
        for start in starts:
            moments.append(self._env.begin(start.task, start.split, start.index))
            self._captured.append(self._env.capture())
        return moments

    def play(self, command: NDArray[np.float32], render: bool) -> list[list[Snapshot]]:
        """See `Scenes`."""
        played = []
        for i, commands in enumerate(command):
            self._env.restore(self._captured[i])
            last = len(commands) - 1
            played.append([self._env.advance(one, render=render or k == last) for k, one in enumerate(commands)])
            self._captured[i] = self._env.capture()
        return played


class ScenesApart:
    """See `Scenes`. Environments in processes of their own, which end with this one; every n-th episode is made in the same one.

    Raises what an environment raises, BrokenProcessPool where a process died.
    """

    def __init__(self, env: TrueEnvironment, opener: Callable[[], TrueEnvironment], processes: int) -> None:
        """`opener`, which must be picklable, opens what `env` is."""
        self.tasks, self.robot, self._opener = env.tasks, env.robot, opener
        self._pools = [ProcessPoolExecutor(1, get_context("spawn"), initializer=_begin_process) for _ in range(processes)]

    def begin(self, starts: Sequence[Start]) -> list[Snapshot]:
        """See `Scenes`."""
        return self._dealt("begin", starts)

    def play(self, command: NDArray[np.float32], render: bool) -> list[list[Snapshot]]:
        """See `Scenes`."""
        return self._dealt("play", command, render)

    def _dealt(self, what: str, given: Any, *more: Any) -> list[Any]:
        count = len(self._pools)
        waiting = [pool.submit(_in_its_scene, self._opener, what, given[i::count], *more) for i, pool in enumerate(self._pools)]
        parts = [one.result() for one in waiting]
        return [parts[i % count][i // count] for i in range(len(given))]

    def close(self) -> None:
        """End the processes."""
        for pool in self._pools:
            pool.shutdown(cancel_futures=True)


_scene: list[OneScene] = []
"""Of a process of `ScenesApart`: its own, once something was asked of it."""


def _in_its_scene(opener: Callable[[], TrueEnvironment], what: str, *given: Any) -> Any:
    if not _scene:
        _scene.append(OneScene(opener()))
    return getattr(_scene[0], what)(*given)


def _begin_process() -> None:
    torch.set_num_threads(1)  # nothing is computed here but physics and pictures
    end_with_parent()


def end_with_parent() -> None:
    """End this process once the one that began it is gone, by whatever signal: nobody may write into a folder whose lock is free again."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()

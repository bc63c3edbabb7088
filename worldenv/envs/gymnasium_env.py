"""What every true environment here is to Gymnasium, from what `TrueEnvironment` says of it: reset by options, steps with a reward, the picture.

Episodes never terminate (they go on past success); they are truncated at the step limit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from worldenv.envs.contract import Snapshot, Split
from worldenv.robots.contract import Robot

Observation = dict[str, NDArray[Any]]


class GymnasiumEnv(gymnasium.Env[Observation, NDArray[np.float32]], ABC):
    """reset(options={"task", "split", "index"}), reward 1 while the predicate holds. A subclass is the environment itself (`TrueEnvironment`): it
    gives what is abstract here, sets both spaces, and counts its control steps in `_steps`.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012 -- Gymnasium's own declaration
    _steps: int

    def __init__(self, render_mode: str | None) -> None:
        """Raises ValueError for an unknown render mode."""
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"render_mode={render_mode!r}: want 'rgb_array' or None")
        self.render_mode = render_mode
        self._steps = 0

    @property
    @abstractmethod
    def tasks(self) -> tuple[str, ...]:
        """See `TrueEnvironment`."""

    @property
    @abstractmethod
    def robot(self) -> Robot:
        """See `TrueEnvironment`."""

    @property
    @abstractmethod
    def steps(self) -> int:
        """Step limit of an episode [control steps at 20 Hz]."""

    @property
    @abstractmethod
    def task(self) -> int:
        """The task of the current episode. RuntimeError before the first."""

    @abstractmethod
    def states(self, split: Split) -> int:
        """See `TrueEnvironment`."""

    @abstractmethod
    def begin(self, task: int, split: Split, index: int) -> Snapshot:
        """See `TrueEnvironment`."""

    @abstractmethod
    def advance(self, command: NDArray[np.floating[Any]], render: bool = True) -> Snapshot:
        """See `TrueEnvironment`."""

    @abstractmethod
    def _last_frame(self) -> NDArray[np.uint8]:
        """The frame (H, W, 3) of the last snapshot."""

    def _observation(self, now: Snapshot) -> Observation:
        wrist = {} if now.wrist is None else {"wrist": now.wrist}
        return {"frame": now.frame, **wrist, "proprio": self.robot.proprio(now.pose, now.gripper)}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Observation, dict[str, Any]]:
        """Begin the episode that `options` names: "task", "split" (train where left out), "index"; what else is left out is drawn by `seed`.

        Raises ValueError for an unknown option and for a state that is not there.
        """
        super().reset(seed=seed)
        chosen = dict(options or {})
        split = chosen.pop("split", "train")
        task = int(chosen.pop("task", self.np_random.integers(len(self.tasks))))
        index = int(chosen.pop("index", self.np_random.integers(self.states(split))))
        if chosen:
            raise ValueError(f"reset: unknown options {sorted(chosen)}; there are task, split, index")
        now = self.begin(task, split, index)
        return self._observation(now), {"success": now.success, "instruction": self.tasks[task], "task": task, "split": split, "index": index}

    def step(self, action: NDArray[np.floating[Any]]) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """One control step: observation, 1.0 while the predicate holds, never terminated, truncated at the step limit."""
        now = self.advance(action)
        return self._observation(now), float(now.success), False, self._steps >= self.steps, {"success": now.success}

    def render(self) -> NDArray[np.uint8] | None:
        """The last frame (H, W, 3), or None where no render mode was asked for."""
        self.task  # noqa: B018 -- raises before the first episode
        return self._last_frame().copy() if self.render_mode else None

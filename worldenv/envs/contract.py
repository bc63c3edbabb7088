"""What a true environment is to the rest: a Gymnasium environment that knows its camera, tasks and fixed initial states.

Where only recordings are there, a `Site`, all of that is known, and nobody can act.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from worldenv.kinematics import ControllerModel
from worldenv.nouns import Camera
from worldenv.robots.contract import Robot

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
    fingers: NDArray[np.float64] | None = None
    """(2,) their positions [m], where they differ from what `gripper` says: one may be pressed further than the other."""
    wrist: NDArray[np.uint8] | None = None
    """(H, W, 3): the camera on the hand, where it was asked for."""


class Site(Protocol):
    """Where a robot works: its tasks, how it is seen, and moments from which episodes begin."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """The instruction of each task."""
        ...

    @property
    def robot(self) -> Robot:
        """Whose gripper it is: conventions of proprioception and commands."""
        ...

    def camera_of(self, task: int) -> Camera:
        """The view of `task`: agentview in its scene, where there are several cameras."""
        ...

    def close(self) -> None:
        """Free what draws."""
        ...

    def versions(self) -> dict[str, str]:
        """What decides the pixels: packages and the OpenGL renderer."""
        ...

    def states(self, split: Split) -> int:
        """Number of fixed initial states per task in `split`."""
        ...

    def begin(self, task: int, split: Split, index: int) -> Snapshot:
        """What is true in fixed initial state `index` of `split`, into which a scene is put; ValueError where there is none."""
        ...


class TrueEnvironment(Site, Protocol):
    """Deterministic given task, initial state and actions. Also a `gymnasium.Env`; this is the part that stages use."""

    @property
    def controller(self) -> ControllerModel:
        """How commands become motion here: exact for the embedded environment, nominal elsewhere."""
        ...

    @property
    def camera(self) -> Camera:
        """agentview, in the scene of the current episode."""
        ...

    def advance(self, command: NDArray[np.floating[Any]], render: bool = True) -> Snapshot:
        """One control step (50 ms) of a command (7,), clipped to [-1, 1]; `render=False` repeats the last frame and saves its time.

        Goes on past success and past the step limit. ValueError for a command of another shape or one that is not finite.
        """
        ...

    def capture(self) -> Any:
        """Everything that the future depends on; never changed by what comes after."""
        ...

    def restore(self, moment: Any) -> None:
        """Go back to a captured moment: the same commands then give the same snapshots, bit for bit. So one scene serves many episodes."""
        ...

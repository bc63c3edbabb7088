"""Whether a camera stands where it is said to stand: recordings show the gripper, so at their poses it must be in the picture, and move there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from worldenv import action_map, console
from worldenv.data.episode import Episode
from worldenv.nouns import Camera
from worldenv.robots.contract import ArmDrawing, Robot

_SELDOM = 0.5
"""In the picture at less than this share of the moments, a gripper is worth a word: people place cameras so that it is seen."""
_MOVED_M, _STILL = 0.02, 0.02
"""A gripper that was in places further apart than this [m] moves in the picture by this share of its side for every metre, at least: from 3 m, with
an angle of 90 degrees, it is 0.17, and a camera in mm has 0.005 at most. Along the optical axis it is 0, but that is no whole set's way."""


def _nothing(size: int) -> NDArray[np.float64]:
    return np.array([[np.inf] * size, [-np.inf] * size])


@dataclass
class InView:
    """Moments of a robot's way, at how many of them the gripper's pose is in the camera's picture, and how far apart these are, there and in it."""

    robot: Robot
    setting: str
    """By which the user knows the recordings, or their camera."""
    moments: int = 0
    seen: int = 0
    places: NDArray[np.float64] = field(default_factory=lambda: _nothing(3))
    """(2, 3) [m] least and greatest x y z of the gripper where it is in the picture."""
    pixels: NDArray[np.float64] = field(default_factory=lambda: _nothing(2))
    """(2, 2) of its x and y in the picture, as shares of width and height."""

    def add(self, episode: Episode) -> None:
        """Count those of `episode`, if it has a camera."""
        if episode.camera is not None:
            self.look(episode.pose, episode.camera, self.robot.arms_at(episode.camera.height)[-1])

    def look(self, pose: NDArray[np.float64], camera: Camera, arm: ArmDrawing) -> None:
        """Count the moments of `pose` (N, 7)."""
        inside = action_map.in_picture(pose, camera, arm)
        self.moments, self.seen = self.moments + len(inside), self.seen + int(inside.sum())
        if inside.any():
            pixels = action_map.project(pose[inside, None], camera, [arm])[:, 0, 0] / [camera.width, camera.height]
            for bounds, points in ((self.places, pose[inside, :3]), (self.pixels, pixels)):
                bounds[0], bounds[1] = np.minimum(bounds[0], points.min(0)), np.maximum(bounds[1], points.max(0))

    def wrong(self) -> str:
        """Why the camera cannot be right: the gripper was at no moment in the picture, or moves and stays where it is there; else nothing."""
        if self.moments and not self.seen:
            return (
                f"{self._found}: the camera is not the one that took these pictures. camera_to_world goes from the camera (x right, y down, z "
                "forward) to the frame of the poses, lengths in m: is it inverted, in mm, or of another frame?"
            )
        moved, shown = (float(np.linalg.norm(bounds[1] - bounds[0])) if self.seen else 0.0 for bounds in (self.places, self.pixels))
        if moved > _MOVED_M and shown < _STILL * min(moved, 1.0):
            return (
                f"{self.setting}: the gripper moves by {100 * moved:.0f} cm, and in the picture by {100 * shown:.2g} % of its side, so that action "
                "maps would never move: the camera is too far away. Lengths are in m: is camera_to_world in mm?"
            )
        return ""

    @property
    def _found(self) -> str:
        return f"{self.setting}: at its poses the gripper is in the picture at {self.seen} of {self.moments} moments"

    def check(self) -> None:
        """ValueError where the camera is `wrong`; a line on the console where the gripper was seldom in the picture."""
        look = "worldenv-imagine --episode shows recorded frames with the gripper drawn over them (docs/own-robot.md)"
        if wrong := self.wrong():
            raise ValueError(f"{wrong} {look}")
        if self.seen < _SELDOM * self.moments:
            console.say(f"{self._found}: is the camera right? {look}")

    def of(self, episodes: Iterable[Episode]) -> Iterator[Episode]:
        """`episodes`, counted on their way and checked behind the last."""
        for episode in episodes:
            self.add(episode)
            yield episode
        self.check()

"""Whether a camera stands where it is said to stand: recordings show the gripper, so at their poses it must be in the picture."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from worldenv import action_map, console
from worldenv.data.episode import Episode
from worldenv.robots.contract import Robot

_SELDOM = 0.5
"""In the picture at less than this share of the moments, a gripper is worth a word: people place cameras so that it is seen."""


@dataclass
class InView:
    """Moments of recordings, and at how many of them the gripper's recorded pose is in the picture of the recording's camera."""

    robot: Robot
    setting: str
    """By which the user knows the recordings, or their camera."""
    moments: int = 0
    seen: int = 0

    def add(self, episode: Episode) -> None:
        """Count those of `episode`, if it has a camera."""
        if episode.camera is not None:
            inside = action_map.in_picture(episode.pose, episode.camera, self.robot.arms_at(episode.camera.height)[-1])
            self.moments, self.seen = self.moments + len(inside), self.seen + int(inside.sum())

    def check(self) -> None:
        """ValueError where the gripper was at no moment in the picture; a line on the console where it seldom was."""
        if not self.moments:
            return
        found = f"{self.setting}: at its recorded poses the gripper is in the picture at {self.seen} of {self.moments} moments"
        look = "worldenv-imagine --episode shows recorded frames with the gripper drawn over them (docs/own-robot.md)"
        if not self.seen:
            raise ValueError(
                f"{found}: the camera is not the one that took these pictures. camera_to_world goes from the camera (x right, y down, z forward) to "
                f"the frame of the poses, lengths in m: is it inverted, in mm, or of another frame? {look}"
            )
        if self.seen < _SELDOM * self.moments:
            console.say(f"{found}: is the camera right? {look}")

    def of(self, episodes: Iterable[Episode]) -> Iterator[Episode]:
        """`episodes`, counted on their way and checked behind the last."""
        for episode in episodes:
            self.add(episode)
            yield episode
        self.check()

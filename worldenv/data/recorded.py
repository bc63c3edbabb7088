"""A robot that was recorded, where no environment is there to act in: its tasks, its view, and where its episodes began."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from worldenv import action_map
from worldenv.checkpoint import CheckpointError
from worldenv.config import EnvConfig
from worldenv.data.episode import EpisodeSet
from worldenv.data.given import as_large
from worldenv.envs.contract import Snapshot, Split
from worldenv.nouns import Camera
from worldenv.robots import named
from worldenv.robots.contract import Robot


class Recorded:
    """`Site`: what the demonstrations in `EnvConfig.recordings` show. Training states are the moments from which they begin; there are no others."""

    def __init__(self, config: EnvConfig) -> None:
        """Raises CheckpointError where no episodes of ours are there, and ValueError where the robot is none."""
        self._folder, self._image = Path(config.recordings), config.image
        self._robot = named.named(config.robot)
        self._episodes = opened(self._folder, "env.recordings")
        self._views: dict[int, Camera] = {}
        self._numbers: dict[str, list[int]] = {}
        for entry in self._episodes.entries:
            self._numbers.setdefault(entry.instruction, []).append(entry.number)

    @property
    def tasks(self) -> tuple[str, ...]:
        """See `Site`: in the order in which they first appear."""
        return tuple(self._numbers)

    @property
    def robot(self) -> Robot:
        """See `Site`."""
        return self._robot

    def camera_of(self, task: int) -> Camera:
        """See `Site`: that of the task's first demonstration. ValueError where that does not say where its camera stood."""
        if task not in self._views:
            number = self._numbers[self.tasks[task]][0]
            camera = self._episodes.load(number).camera
            if camera is None:
                raise ValueError(
                    f"{self._folder}: episode {number} does not say where its camera stood, and rollouts draw what the robot does into its picture: "
                    "give it (python -m worldenv.cli.convert SOURCE --camera FILE --out FOLDER; docs/own-robot.md)"
                )
            self._views[task] = action_map.resized(camera, self._image, self._image)
        return self._views[task]

    def close(self) -> None:
        """See `Site`: nothing draws."""

    def versions(self) -> dict[str, str]:
        """See `Site`."""
        return {"renderer": "none: recorded"}

    def states(self, split: Split) -> int:
        """See `Site`: as many as the task with the fewest demonstrations has; none for tests."""
        return min(map(len, self._numbers.values())) if split == "train" else 0

    def begin(self, task: int, split: Split, index: int) -> Snapshot:
        """See `Site`."""
        if not 0 <= index < self.states(split):
            raise ValueError(f"{self._folder}: {self.states(split)} {split} states of each task, and none is number {index}")
        episode = self._episodes.load(self._numbers[self.tasks[task]][index])
        frame = as_large(episode.frame[:1], self._image)[0]
        return Snapshot(frame, episode.pose[0], float(episode.gripper[0]), bool(episode.success[0]))


def opened(folder: Path, setting: str) -> EpisodeSet:
    """The episodes in `folder`, which `setting` names. CheckpointError where there are none of ours, or one is damaged."""
    episodes = EpisodeSet(folder)
    if not len(episodes):
        raise CheckpointError(
            f"{setting}={str(folder)!r}: no episodes there (000000.npz and so on); other formats become such by python -m worldenv.cli.convert "
            "(docs/own-robot.md)"
        )
    return episodes


@functools.cache
def fingerprint(config: EnvConfig) -> str:
    """SHA-256 (64 hex digits) of everything that a `Recorded` is made from. Errors as there."""
    robot = Path(config.robot)
    described = robot.read_bytes() if robot.is_file() else config.robot.encode()
    return hashlib.sha256(opened(Path(config.recordings), "env.recordings").fingerprint.encode() + described).hexdigest()

"""A robot that was recorded, where no environment is there to act in: its tasks, its view, and where its episodes began."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from worldenv import action_map, console
from worldenv.checkpoint import CheckpointError
from worldenv.config import EnvConfig
from worldenv.data.episode import GIVEN, Episode, EpisodeSet
from worldenv.data.given import as_large, plain, want_camera
from worldenv.envs.contract import Snapshot, Split
from worldenv.nouns import Camera
from worldenv.robots import named
from worldenv.robots.contract import Robot, signed_like


class Recorded:
    """`Site`: what the demonstrations in `EnvConfig.recordings` show. Training states are the moments from which they begin; there are no others."""

    def __init__(self, config: EnvConfig) -> None:
        """Raises CheckpointError where no episodes of ours are there, and ValueError where the robot is none."""
        self._folder, self._image = Path(config.recordings), config.image
        self._robot = named.named(config.robot)
        self._episodes = opened(self._folder, "env.recordings")
        self._views: dict[int, Camera] = {}
        self._numbers: dict[str, list[int]] = {}
        self._tasks: list[str] = []
        for entry in self._episodes.entries:
            if plain(entry.instruction) not in self._numbers:
                self._tasks.append(entry.instruction)
            self._numbers.setdefault(plain(entry.instruction), []).append(entry.number)
        self._sign = self._episodes.load(self._episodes.entries[0].number).pose[0]

    @property
    def tasks(self) -> tuple[str, ...]:
        """See `Site`: in the order in which they first appear."""
        return tuple(self._tasks)

    @property
    def robot(self) -> Robot:
        """See `Site`."""
        return self._robot

    def camera_of(self, task: int) -> Camera:
        """See `Site`: that of the task's first demonstration. ValueError where that does not say where its camera stood."""
        if task not in self._views:
            camera = self._load(task, 0).camera
            assert camera is not None
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
        episode = self._load(task, index)
        first = episode.frame[:1] if episode.mirrored == self.camera_of(task).mirrored else episode.frame[:1, :, ::-1]
        pose = signed_like(episode.pose[0], self._sign)
        return Snapshot(as_large(first, self._image)[0], pose, float(episode.gripper[0]), bool(episode.success[0]))

    def _load(self, task: int, index: int) -> Episode:
        """Demonstration `index` of `task`. ValueError where it does not say where its camera stood."""
        number = self._numbers[plain(self._tasks[task])][index]
        return want_camera(self._episodes.load(number), f"{self._folder}: episode {number}")


def opened(folder: Path, setting: str) -> EpisodeSet:
    """The episodes in `folder`, which `setting` names. CheckpointError where there are none of ours, or one is damaged or not what the index says.

    Every episode is read, once in a process: what its index says of a file is not what the file says, and a run stands on them.
    """
    files = tuple((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.glob("*")))
    episodes = _read_whole(folder, files)
    if not len(episodes):
        raise CheckpointError(
            f"{setting}={str(folder)!r}: no episodes there (000000.npz and so on); other formats become such by python -m worldenv.cli.convert "
            "(docs/own-robot.md)"
        )
    return episodes


@functools.cache
def _read_whole(folder: Path, files: tuple[tuple[str, int, int], ...]) -> EpisodeSet:
    """CheckpointError as `EpisodeSet.load`; `files` with sizes and times, so that what has changed since is read again."""
    episodes = EpisodeSet(folder, GIVEN)
    entries = episodes.entries
    for i in console.track(0, len(entries), f"read {folder.name}"):
        episodes.load(entries[i].number)
    return episodes


@functools.cache
def fingerprint(config: EnvConfig) -> str:
    """SHA-256 (64 hex digits) of everything that a `Recorded` is made from. Errors as there."""
    named.named(config.robot)
    robot = Path(config.robot)
    described = robot.read_bytes() if robot.is_file() else config.robot.encode()
    return hashlib.sha256(opened(Path(config.recordings), "env.recordings").fingerprint.encode() + described).hexdigest()

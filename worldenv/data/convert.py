"""Conversion between the formats of episodes: what a path holds is seen from the path, what it becomes is said."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from worldenv import console
from worldenv.checkpoint import CheckpointError, atomic_folder
from worldenv.data import lerobot, libero_hdf5
from worldenv.data.episode import GIVEN, Episode, EpisodeSet, fitting, read_camera
from worldenv.data.in_view import InView
from worldenv.nouns import Camera
from worldenv.robots.contract import Robot
from worldenv.robots.named import named
from worldenv.robots.panda import PANDA

Format = Literal["episodes", "libero-hdf5", "lerobot-v2.1", "lerobot-v3.0"]
"""The formats that are written."""


@dataclass(frozen=True)
class Choices:
    """What a conversion needs to know beside its two paths."""

    view: str | None = None
    """LeRobot sets: the column of pictures to read; None: the only one that is no wrist camera."""
    gripper: lerobot.Gripper | None = None
    """LeRobot sets that were made elsewhere: commands of the gripper are -1 open, +1 close (LIBERO's), or 1 open, 0 close. None: LIBERO's, where
    some are below 0."""
    mirrored: bool = True
    """LeRobot sets that were made elsewhere: pictures are upright and mirrored, as OpenVLA-OFT's; else they are upright. Those of a `camera` that is
    not mirrored are not."""
    frames: lerobot.Frames = "h264-lossless"
    """LeRobot sets that are written: how pictures are kept."""
    robot: str | None = None
    """LeRobot sets and LIBERO's files, read or written: whose commands these are, and by whose width fingers become an opening, and back: agibot_g1,
    panda, tabletop, or a .json file. None: whose the episodes say they are; of those that do not say it, panda's fingers."""
    camera: Path | None = None
    """Where the pictures were taken from, for episodes that do not say it: .json with intrinsics (3, 3) [px], camera_to_world (4, 4) [m], both in
    OpenCV's axes, height and width [px] of the pictures, and mirrored, where pictures are to stay as OpenVLA-OFT's (docs/own-robot.md)."""
    no_noops: bool = False
    """Leave out commands for no motion, as the published sets for OpenVLA-OFT do."""
    leave_out_unfit: bool = False
    """Leave out episodes that are none (one row, several instructions, values that are not finite or out of range), and name them; else the first
    is an error."""


def is_lerobot(source: Path) -> bool:
    """Whether `source` is a LeRobot data set, the only kind whose reading `Choices` change."""
    return (source / "meta" / "info.json").is_file()


def _mean_something(source: Path, to: Format, choices: Choices) -> None:
    """Raises ValueError for a choice, other than the default, that neither `source` nor `to` has a use for."""
    usual = Choices()
    reading = {"--view": choices.view is not None, "--gripper": choices.gripper is not None, "--no-mirrored": not choices.mirrored}
    changed = [flag for flag, given in reading.items() if given]
    ours = source.is_dir() and not is_lerobot(source) and not list(source.glob("*.hdf5"))
    if choices.robot is not None and to == "episodes" and ours:
        raise ValueError(f"--robot {choices.robot}: says whose fingers LeRobot's and LIBERO's data hold, ours hold openings; leave it out")
    if choices.leave_out_unfit and ours and not choices.no_noops:
        raise ValueError(f"--leave-out-unfit: episodes in our format fit, and {source} holds such; leave it out")
    if changed and source.exists() and not is_lerobot(source):
        raise ValueError(f"{changed[0]}: says how a LeRobot data set is read, and {source} is none; leave it out")
    if choices.frames != usual.frames and not to.startswith("lerobot"):
        raise ValueError(f"--frames {choices.frames}: says how a LeRobot data set is written, not {to}; leave it out, or --to lerobot-v3.0")


def read(source: Path, choices: Choices, left_out: list[str] | None = None) -> Iterator[tuple[Path, Episode]]:
    """The episodes in `source`, each with its file or set: a folder of ours, a LeRobot data set, LIBERO's HDF5 file, or a folder of these.

    Of several HDF5 files, sorted by name, the task's index counts the files. What is unfit is passed over where there is `left_out`, and named there.
    Raises CheckpointError where it is none of these, and as the readers do; ValueError where `choices.camera` is no camera, is another's, or not of
    pictures of this size.
    """
    camera = None if choices.camera is None else read_camera(choices.camera)
    mirrored = choices.mirrored and (camera is None or camera.mirrored)
    if camera is not None and not camera.mirrored and choices.mirrored and is_lerobot(source):
        console.say(
            f"--camera {choices.camera} is not mirrored, and neither are the pictures of {source} then, unless it was written here: of a set whose "
            'pictures are (OpenVLA-OFT\'s), say "mirrored": true there'
        )
    whose = "" if choices.robot is None else named(choices.robot).name
    for place, episode in _read(source, choices, mirrored, left_out):
        seen = episode if camera is None else _seen_by(camera, episode, place, choices.camera)
        if whose and not seen.robot:
            seen = dataclasses.replace(seen, robot=whose)
        kept = fitting(functools.partial(libero_hdf5.without_noops, seen), left_out) if choices.no_noops else seen
        if kept is not None:
            yield place, kept


def _seen_by(camera: Camera, episode: Episode, place: Path, path: Path | None) -> Episode:
    """`episode`, as `camera` of file `path` sees it: readers of others' formats leave pictures mirrored, those in our own are as they were taken."""
    if episode.camera is not None:
        raise ValueError(f"--camera {path}: {place} says itself where its camera stood; leave it out")
    if episode.frame.shape[1:3] != (camera.height, camera.width):
        sizes = f"{camera.width} x {camera.height} px, pictures of {place} are {episode.frame.shape[2]} x {episode.frame.shape[1]}"
        raise ValueError(f"--camera {path}: {sizes}: give intrinsics and size as they are for these pictures")
    as_taken = camera.mirrored or not (is_lerobot(place) or place.suffix == ".hdf5")
    return dataclasses.replace(episode, frame=episode.frame if as_taken else np.ascontiguousarray(episode.frame[:, :, ::-1]), camera=camera)


def _read(source: Path, choices: Choices, mirrored: bool, left_out: list[str] | None) -> Iterator[tuple[Path, Episode]]:
    files, robot = sorted(source.glob("*.hdf5")), named(choices.robot or PANDA.name)
    if source.is_file():
        yield from ((source, episode) for _, episode in libero_hdf5.read(source, robot, left_out=left_out))
    elif is_lerobot(source):
        read_so = lerobot.read(source, robot, choices.view, choices.gripper, mirrored, left_out)
        yield from ((source, episode) for _, episode in read_so)
    elif files:
        for task, file in enumerate(files):
            yield from ((file, episode) for _, episode in libero_hdf5.read(file, robot, task, left_out))
    elif list(source.glob("*.npz")):
        yield from ((source, episode) for episode in EpisodeSet(source, GIVEN))
    else:
        raise CheckpointError(f"{source}: no episodes: want NNNNNN.npz, meta/info.json of a LeRobot data set, or HDF5 files of LIBERO")


def convert(source: Path, to: Format, out: Path, choices: Choices | None = None) -> dict[str, Any]:
    """Write the episodes in `source` to `out` in format `to`; returns counts, and what was left out. `out` is a folder; for libero-hdf5 one with
    a file per instruction.

    Raises ValueError where `out` is there already, where a choice means nothing here, and as readers and writers do. On an error nothing is left.
    """
    choices = choices or Choices()
    if to not in get_args(Format):
        raise ValueError(f"--to {to!r}: want one of {', '.join(get_args(Format))}")
    if out.exists():
        raise ValueError(f"{out}: there already; nothing is overwritten: move it, or choose another --out")
    _mean_something(source, to, choices)
    count = _Count()
    left_out: list[str] = []
    episodes = count.of(source, (episode for _, episode in read(source, choices, left_out if choices.leave_out_unfit else None)), left_out)
    first = next(episodes)
    robot, episodes = named(choices.robot or first.robot or PANDA.name), itertools.chain([first], episodes)
    if choices.camera is not None:
        episodes = InView(robot, f"--camera {choices.camera}").of(episodes)
    if to == "lerobot-v2.1":
        lerobot.write(out, episodes, "v2.1", choices.frames, robot)
    elif to == "lerobot-v3.0":
        lerobot.write(out, episodes, "v3.0", choices.frames, robot)
    else:
        with atomic_folder(out) as partial:
            if to == "libero-hdf5":
                _write_hdf5(partial, episodes, robot)
            else:
                kept = EpisodeSet(partial)
                for number, episode in enumerate(episodes):
                    kept.add(number, episode)
                kept.seal()
    return {"source": str(source), "out": str(out), "format": to, **vars(count), "left_out": left_out}


_NAME_BYTES = 150
"""Of a file, before "_demo.hdf5": disks take 255, and while it is written process and machine are in its name too."""


def _write_hdf5(out: Path, episodes: Iterable[Episode], robot: Robot) -> None:
    """A file for each instruction, all open until the last episode came; on an error none is there."""
    with contextlib.ExitStack() as files:
        add: dict[str, Callable[[Episode], None]] = {}
        of: dict[str, str] = {}
        for episode in episodes:
            words = episode.instruction
            if words not in add:
                name = re.sub(r"\W+", "_", words).strip("_").encode()[:_NAME_BYTES].decode(errors="ignore")
                if (taken := of.setdefault(name, words)) != words:
                    raise ValueError(f"instructions {taken!r} and {words!r} would be one file, {name}_demo.hdf5: reword one, or convert them apart")
                add[words] = files.enter_context(libero_hdf5.writing(out / f"{name}_demo.hdf5", words, robot))
            add[words](episode)


@dataclass
class _Count:
    """What passed."""

    episodes: int = 0
    steps: int = 0
    successes: int = 0

    def of(self, source: Path, episodes: Iterable[Episode], left_out: Sequence[str]) -> Iterator[Episode]:
        """`episodes` of `source`, counted on their way; ValueError where none came, with the first of those `left_out`."""
        for episode in episodes:
            self.episodes += 1
            self.steps += episode.steps
            self.successes += episode.first_success is not None
            yield episode
        if not self.episodes:
            raise ValueError(f"{source}: no episode in it" + (f"; left out {len(left_out)}, the first: {left_out[0]}" if left_out else ""))

"""LIBERO's demonstrations: one HDF5 file per task, read into episodes and written from them. Described in docs/data-formats.md.

What is peculiar to the format (LIBERO, scripts/create_dataset.py), and is undone here:
- Observation j was recorded *after* action j. So an N-row demonstration has N observations and N - 1 commands between them: command t is
  action t + 1, and action 0 led to the first observation. The actions before it, five in published files, were dropped with their observations.
- OpenVLA-OFT's regeneration of these files (regenerate_libero_dataset.py) has the same datasets, no attribute at all, and observation j *before*
  action j: command t is action t, and the last led to no observation. Its first row of `robot_states` is that of the file it was made from.
- Pictures are in OpenGL's order, bottom row first. Turned by 180 degrees, as OpenVLA-OFT shows them, they are upright and mirrored.
- The state has two fingers' positions, +w/2 and -w/2 [m]; `Episode.gripper` is w by the robot's `finger_m`.
- A rotation vector's angle is not wrapped; the quaternion in `robot_states` is taken where there is one, and its sign made continuous.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from worldenv import console, kinematics
from worldenv.checkpoint import CheckpointError, atomic
from worldenv.data.episode import Episode, UnfitError, camera_from_plain, fitting, want_robot, want_values, words
from worldenv.robots.contract import Robot
from worldenv.robots.panda import PANDA

STILL = 1e-4
"""A command whose first six values have a norm below this asks for no motion (OpenVLA-OFT, regenerate_libero_dataset.py)."""
_VIEW = "agentview_rgb"
_TOLD = "problem_info"  # attribute of LIBERO's files with the instruction
_OBSERVED = {"gripper_states": 2, "ee_pos": 3, "ee_ori": 3}
_ENOUGH = 16  # rows from which motion tells how they are paired
_CLEARLY, _EXPLAINED = 0.5, 0.1  # another pairing of rows: its error is below this share of the error as it is, and of all motion (both squared)
_WORDS = "worldenv"  # attribute of a demonstration with what the format has no place for
_CURE = "download it, or write it, again"
# What h5py raises for bytes that were changed, and we for shapes that are wrong.
_DAMAGE = (OSError, KeyError, ValueError, TypeError, RuntimeError, AttributeError, OverflowError)


def read(path: Path, robot: Robot = PANDA, task: int = 0, left_out: list[str] | None = None) -> Iterator[tuple[int, Episode]]:
    """The demonstrations in `path` by number: number, episode. `task` is the task's index in its suite, which the file does not know.

    Frames are as OpenVLA-OFT sees them, upright and mirrored, but for files written here from frames that were not mirrored. A published file
    marks success at its last observation alone, and has no camera: `Episode.camera` is None. Other views and joint states are not read. One
    without attributes is OpenVLA-OFT's regeneration, and its name tells the instruction.
    Raises CheckpointError (a ValueError) that names the file and the cure where it is missing, truncated, damaged, mis-shaped or foreign, and where
    its motion says that its rows are those of the other kind; and UnfitError for a demonstration that is none: of one row, or with values that are
    not finite or out of range; with `left_out` it is passed over and named there.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; LIBERO's demonstrations are named TASK_demo.hdf5")
    where = "data"
    try:
        with h5py.File(path, "r") as opened:
            data = opened["data"]
            before = _TOLD not in data.attrs
            instruction = told(path) if before else _instruction(data.attrs)
            upside_down = _text(data.attrs.get("macros_image_convention", "opengl")) == "opengl"
            names = [name for name in data if re.fullmatch(r"demo_\d+", name)]
            if not names:
                raise ValueError("no group demo_N")
            for number in sorted(int(name.removeprefix("demo_")) for name in names):
                where = f"data/demo_{number}"
                make = functools.partial(_episode, data[f"demo_{number}"], number, instruction, robot, task, upside_down, before, path)
                episode = fitting(make, left_out)
                if episode is not None:
                    yield number, episode
    except CheckpointError:
        raise
    except _DAMAGE as error:
        raise CheckpointError(f"{path}: {where}: no LIBERO demonstration, or damaged ({type(error).__name__}: {error}); {_CURE}") from error


def told(path: Path) -> str:
    """The instruction in the name of LIBERO's file, by which LIBERO itself evaluates. The one inside may have other words ("pick the akita ...")."""
    return re.sub(r"^[A-Z_]+SCENE\d+_", "", path.stem.removesuffix("_demo")).replace("_", " ")


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _instruction(attributes: Any) -> str:
    words = json.loads(_text(attributes[_TOLD]))["language_instruction"]
    return "".join(words)  # a list in some files, text in others; LIBERO joins both in this way


def _array(group: Any, name: str, *shape: int | None) -> NDArray[Any]:
    """Dataset `name` of `group`; ValueError where its shape is another. None stands for any size."""
    array: NDArray[Any] = group[name][()]
    if array.ndim != len(shape) or any(want is not None and have != want for have, want in zip(array.shape, shape, strict=True)):
        raise ValueError(f"{name}: {array.shape}, want ({', '.join('any' if want is None else str(want) for want in shape)})")
    return array


def _episode(demo: Any, number: int, instruction: str, robot: Robot, task: int, upside_down: bool, before: bool, path: Path) -> Episode:
    where = f"{path}: data/demo_{number}"
    action = _array(demo, "actions", None, 7)
    rows = len(action)
    if rows < 2:
        raise UnfitError(where, f"rows: {rows}, want 2 at least: an observation, a command and what was seen after it")
    want_values(where, "actions", action.astype(np.float32), -1.0, 1.0)
    ours = json.loads(_text(demo.attrs[_WORDS])) if _WORDS in demo.attrs else {}
    camera = camera_from_plain(ours.get("camera"))
    picture = _array(demo["obs"], _VIEW, rows, None, None, 3)[:, :: -1 if upside_down else 1]
    if camera is None or camera.mirrored:
        picture = picture[:, :, ::-1]
    finger, pose = _state(demo, rows, before, where)
    success = _array(demo, "rewards", rows) > 0
    if before:
        success = np.append(False, np.append(success[:-2], success[-2:].any()))  # the last reward is of an observation that is not there
    episode = Episode(
        instruction=instruction,
        task=ours.get("task", task),
        split=ours.get("split", "train"),
        state_index=ours.get("state_index", number),
        source=ours.get("source", f"LIBERO demonstration: {path.name}, demo_{number}"),
        frame=np.ascontiguousarray(picture),
        pose=pose,
        gripper=np.clip((finger[:, 0] - finger[:, 1]) / ours.get("finger_m", robot.finger_m), 0.0, 1.0),
        command=(action[:-1] if before else action[1:]).astype(np.float32),
        success=success,
        camera=camera,
        versions=ours.get("versions", {}),
        robot=ours.get("robot", ""),
    )
    if not ours:
        _want_paired(episode.pose, action.astype(np.float64), robot, before, where)
    return episode


def _want_paired(pose: NDArray[np.float64], action: NDArray[np.float64], robot: Robot, before: bool, where: str) -> None:
    """CheckpointError, from `where`, if `pose` (N, 7), said to be seen `before` each `action` (N, 7), moves as they ask where it was seen after; a
    line if it is the other way round, since a robot that lags by a control step looks like that.
    """
    if len(action) < _ENOUGH:
        return
    model, pose = kinematics.ControllerModel.of(robot), pose[1:]  # the first may be another file's
    after_it, before_it = (float(np.sum(kinematics.drift(model, [pose], [asked], 1).position ** 2)) for asked in (action[2:], action[1:-1]))
    this, other = (before_it, after_it) if before else (after_it, before_it)
    if other < _CLEARLY * this and other < _EXPLAINED * np.sum(np.diff(pose[:, :3], axis=0) ** 2):
        if not before:
            _doubt(where.partition(": ")[0])
            return
        raise CheckpointError(
            f"{where}: moves as its actions ask where each row holds the observation after its action, as in LIBERO's files, which have the "
            f"attribute {_TOLD} on data, with the instruction: give it that"
        )


@functools.cache
def _doubt(path: str) -> None:
    """Once for a file."""
    console.say(
        f"{path}: moves as its actions ask where each row holds the observation before its action, as OpenVLA-OFT's regeneration writes them: if "
        f"that made it, delete the attribute {_TOLD} of data and name it INSTRUCTION_demo.hdf5; if its robot lags by a step, it is read rightly"
    )


def _state(demo: Any, rows: int, before: bool, where: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Fingers (N, 2) [m] and pose (N, 7). UnfitError, from `where`, for values that are none."""
    if "robot_states" in demo and not before:
        state = _array(demo, "robot_states", rows, 9).astype(np.float64)
        want_values(where, "robot_states", state)
        finger, place, turn = state[:, :2], state[:, 2:5], state[:, 5:]
        want_values(where, "the length of the quaternion in robot_states", np.linalg.norm(turn, axis=1, keepdims=True), 1 - 1e-6, 1 + 1e-6)
    else:
        finger, place, vector = (_array(demo["obs"], name, rows, size).astype(np.float64) for name, size in _OBSERVED.items())
        for name, values in zip(_OBSERVED, (finger, place, vector), strict=True):
            want_values(where, f"obs/{name}", values)
        turn = kinematics.unwrapped(vector)
    return finger, np.concatenate([place, kinematics.continuous(turn)], axis=1)


@contextlib.contextmanager
def writing(path: Path, instruction: str, robot: Robot = PANDA) -> Iterator[Callable[[Episode], None]]:
    """A function that adds an episode to `path`, as demo_0, demo_1 and on; the file is there when the block ends well, whole, or not at all.

    A demonstration has a row more than there are commands: action 0, which led to the first observation and is not known, is a command for no
    motion. What the format has no place for (camera, split, versions) is an attribute of each demonstration, so that `read` gives the same
    episode; the opening of the gripper alone may differ, by float64's last bit. MuJoCo's states, the wrist's view and joint states are not
    written: episodes have none. Raises ValueError where `path` is there already, for an episode of another instruction or robot, and where none came.
    """
    if path.exists():
        raise ValueError(f"{path}: there already; nothing is overwritten: move it, or write elsewhere")
    with atomic(path) as temporary, h5py.File(temporary, "w") as opened:
        data = opened.create_group("data")
        data.attrs[_TOLD] = json.dumps({"language_instruction": instruction})
        data.attrs["macros_image_convention"] = "opengl"
        data.attrs["tag"], data.attrs["env_args"] = "libero-v1", json.dumps({"type": 1, "env_name": robot.name, "env_kwargs": {}})
        steps: list[int] = []

        def add(episode: Episode) -> None:
            if episode.instruction != instruction:
                raise ValueError(f"{path}: of {instruction!r}, not of {episode.instruction!r}: this format has one instruction in each file")
            want_robot(episode, robot.name, f"{path}: demo_{len(steps)}")
            _write_demo(data.create_group(f"demo_{len(steps)}"), episode, robot)
            steps.append(episode.steps)

        yield add
        if not steps:
            raise ValueError(f"{path}: no episode to write")
        data.attrs["num_demos"], data.attrs["total"] = len(steps), sum(steps) + len(steps)


def _write_demo(demo: Any, episode: Episode, robot: Robot) -> None:
    rows = episode.steps + 1
    proprio = robot.proprio(episode.pose, episode.gripper).astype(np.float64)
    half = 0.5 * robot.finger_m * episode.gripper
    finger = np.stack([half, -half], axis=1)
    picture = episode.frame[:, ::-1]
    if episode.mirrored:
        picture = picture[:, :, ::-1]
    unknown = np.zeros((1, 7))
    unknown[0, 6] = episode.command[0, 6]
    end = np.zeros(rows, np.uint8)
    end[-1] = 1
    arrays = {
        f"obs/{_VIEW}": picture,
        "obs/ee_states": np.concatenate([episode.pose[:, :3], proprio[:, 3:6]], axis=1),
        "obs/ee_pos": episode.pose[:, :3],
        "obs/ee_ori": proprio[:, 3:6],
        "obs/gripper_states": finger,
        "robot_states": np.concatenate([finger, episode.pose], axis=1),
        "actions": np.concatenate([unknown, episode.command.astype(np.float64)]),
        "rewards": episode.success.astype(np.uint8),
        "dones": end,
    }
    for name, array in arrays.items():
        # the checksum is what lets a reader notice damage
        demo.create_dataset(name, data=array, fletcher32=True, compression="gzip" if name.startswith("obs/a") else None, chunks=True)
    demo.attrs["num_samples"] = rows
    demo.attrs[_WORDS] = json.dumps({**words(episode), "finger_m": robot.finger_m})


def kept(command: NDArray[np.floating[Any]]) -> NDArray[np.bool_]:
    """Which of the commands (T, 7) the published regeneration keeps: (T,).

    It drops those that ask for no motion (`STILL`) and whose gripper command is that of the last command *kept*; before any is kept, for no
    motion alone (OpenVLA-OFT, regenerate_libero_dataset.py).
    """
    if command.ndim != 2 or command.shape[1] != 7:
        raise ValueError(f"kept: command {command.shape}, want (T, 7)")
    keep: NDArray[np.bool_] = np.linalg.norm(command[:, :6], axis=1) >= STILL
    gripper = None
    for t, moves in enumerate(keep):
        if not moves and gripper is not None and command[t, 6] != gripper:
            keep[t] = True
        if keep[t]:
            gripper = command[t, 6]
    return keep


def without_noops(episode: Episode) -> Episode:
    """`episode` without the commands that `kept` drops and the observations before them; the last observation stays.

    The published set was made by playing the commands that are kept in the simulator; on a path that is recorded already, what moved during a
    dropped command (a lagging arm, a closing gripper) is joined to the step before it. Raises UnfitError where nothing would be left.
    """
    keep = kept(episode.command)
    if not keep.any():
        raise UnfitError(f"episode of {episode.instruction!r}, state {episode.state_index}", "no command asks for motion")
    seen = np.append(keep, True)
    pose = episode.pose[seen]
    return replace(
        episode,
        frame=episode.frame[seen],
        pose=np.concatenate([pose[:, :3], kinematics.continuous(pose[:, 3:])], axis=1),
        gripper=episode.gripper[seen],
        command=episode.command[keep],
        success=episode.success[seen],
    )

"""How far off the model of LIBERO's controller is, on scenes that it was not fitted in. Ceiling: nothing, the simulator itself has no error.

    python -m benchmarks.controller --record FOLDER     paths of the arm, physics alone: random commands and the scripted expert
    python -m benchmarks.controller --measure FOLDER    fit on some scenes, measure on the others; the last line is JSON

Random commands are what policies with noise do: smooth ones, smooth ones with Laplace noise, held ones, and some without rotation; all within
reach and off the table. Expert paths that end in success count; one that fails presses on something it should not, of which the law knows
nothing. In the fit each counts `EXPERT_TIMES` times: experts are brisk, and turn the hand at full speed, where torque limits are felt. A path
that is recorded is not recorded again, so a killed run goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from worldenv import checkpoint, console, kinematics, noise
from worldenv.envs import suites
from worldenv.envs.libero import Libero
from worldenv.envs.libero_install import LiberoMissing
from worldenv.envs.offscreen import NoOpenGL
from worldenv.kinematics import ControllerModel
from worldenv.robots.panda import PANDA

FIT = ("libero_spatial:0", "libero_object:3", "libero_10:0")
"""Scenes that constants come from: suite and task."""
HELD_OUT = ("libero_goal:8", "libero_spatial:2", "libero_object:5")
"""Scenes that they are measured in."""
KINDS = ("smooth", "noisy", "held", "straight", "expert")
EXPERT_TIMES = 3
"""How often an expert's transition counts in the fit."""
_STEPS = 200
_SPREAD = np.array([0.35, 0.35, 0.35, 0.05, 0.07, 0.06])  # of the published demonstrations' commands
_REACH = np.array([0.18, 0.25, 0.12])  # [m] from where the arm begins
_LEAST_HEIGHT = -0.08
_WINDOW = np.hanning(14)[1:-1] / np.sqrt(np.sum(np.hanning(14)[1:-1] ** 2))
LIMITS = {"position_mm_1": 1.5, "angle_mrad_1": 3.0, "position_mm_8": 8.0}
"""What a mean error must stay below."""


def random_commands(kind: str, number: int) -> NDArray[np.float64]:
    """(_STEPS, 7) of one of `KINDS`; the same for the same number."""
    rng = np.random.default_rng([20250928, KINDS.index(kind), number])
    raw = rng.normal(size=(_STEPS + len(_WINDOW), 6))
    smooth = np.stack([np.convolve(raw[:, i], _WINDOW, "same")[:_STEPS] for i in range(6)], axis=1)
    command = np.zeros((_STEPS, 7))
    if kind == "held":
        command[:, :6] = np.repeat(rng.uniform(-2, 2, size=(_STEPS // 20, 6)) * _SPREAD, 20, axis=0)
    elif kind == "noisy":
        command[:, :6] = smooth * _SPREAD + 0.3 * rng.laplace(size=(_STEPS, 6)) * _SPREAD
    else:
        command[:, :6] = 1.3 * smooth * _SPREAD
    if kind == "straight":
        command[:, 3:6] = 0.0
    command[:, 6] = np.repeat(rng.choice([-1.0, 1.0], size=-(-_STEPS // 15)), 15)[:_STEPS]
    return np.clip(command, -1.0, 1.0)


def play(env: Libero, task: int, index: int, kind: str) -> dict[str, Any]:
    """One path: pose (T + 1, 7), gripper (T + 1,), command (T, 7), and whether it ended in success."""
    moments, commands = [env.begin(task, "train", index)], []
    wanted = None if kind == "expert" else random_commands(kind, index)
    expert = suites.expert(env.suite)
    manner = noise.uniform(20250928, index, 0, 0, noise.Stream.DEMOS, (expert.VARIATION,))
    home = moments[0].pose[:3]
    for t in range(_STEPS):
        if wanted is None:
            command = expert.command(env, manner).astype(np.float64)
        else:
            far = moments[-1].pose[:3] - home
            command = wanted[t]
            command[:3] = np.where(np.abs(far) > _REACH, -np.sign(far) * np.abs(command[:3]), command[:3])
            command[2] = abs(command[2]) if far[2] < _LEAST_HEIGHT else command[2]
        commands.append(command)
        moments.append(env.advance(command, render=False))
        if wanted is None and moments[-1].success:
            break
    pose = np.stack([m.pose for m in moments])
    pose[:, 3:] = kinematics.continuous(pose[:, 3:])
    return {
        "pose": pose, "gripper": np.array([m.gripper for m in moments]), "command": np.stack(commands), "kind": kind,
        "success": moments[-1].success,
    }  # fmt: skip


def record(folder: Path, each: int) -> None:
    """`each` paths of every kind in every scene, a file for each scene and kind."""
    for scene in (*FIT, *HELD_OUT):
        suite, _, task = scene.partition(":")
        left = [kind for kind in KINDS if not _file(folder, scene, kind).exists()]
        if not left:
            continue
        env = Libero(suite, 64, pictures=False)  # type: ignore[arg-type]
        for kind in left:
            paths = [play(env, int(task), index, kind) for index in range(each)]
            checkpoint.save(_file(folder, scene, kind), paths)
            console.say(f"{scene} {kind}: {sum(len(path['command']) for path in paths)} steps")
        env.close()


def _file(folder: Path, scene: str, kind: str) -> Path:
    return folder / f"{scene.replace(':', '-')}-{kind}.safetensors"


def _paths(folder: Path, scenes: Sequence[str], kinds: Sequence[str] = KINDS) -> list[dict[str, Any]]:
    found = [path for scene in scenes for kind in kinds for path in checkpoint.load(_file(folder, scene, kind))]
    return [path for path in found if path["kind"] != "expert" or path["success"]]


def gripper_shares(paths: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Least squares of the empty gripper's law over all transitions of random motion."""
    now, last, left = [], [], []
    for path in paths:
        ramp = [1.0]  # a path begins after ten steps that open it
        for grip in path["command"][:, 6]:
            ramp.append(min(max(ramp[-1] - PANDA.gripper_step * float(np.sign(grip)), 0.0), 1.0))
        opening = path["gripper"]
        now.append(np.array(ramp[1:]) - opening[:-1])
        last.append(np.array(ramp[:-1]) - opening[:-1])
        left.append(np.diff(opening))
    (a, b), *_ = np.linalg.lstsq(np.stack([np.concatenate(now), np.concatenate(last)], axis=1), np.concatenate(left), rcond=None)
    return float(a), float(b)


def errors(model: ControllerModel, paths: Sequence[dict[str, Any]], horizon: int) -> dict[str, dict[str, float]]:
    """Mean, root mean square and quantiles of the errors after `horizon` open-loop steps [mm, mrad; a finger's mm]."""
    pose, command, gripper = ([path[name] for path in paths] for name in ("pose", "command", "gripper"))
    off = kinematics.drift(model, pose, command, horizon, gripper)
    parts = {f"position_mm_{horizon}": 1e3 * off.position, f"angle_mrad_{horizon}": 1e3 * off.angle}
    parts[f"finger_mm_{horizon}"] = 500 * PANDA.finger_m * off.gripper
    return {
        name: {"mean": float(x.mean()), "rms": float(np.sqrt(np.mean(x**2))), **{f"p{p}": float(np.percentile(x, p)) for p in (50, 95, 99)}}
        for name, x in parts.items()
    }


def measure(folder: Path) -> dict[str, Any]:
    """Errors on held-out scenes: of constants fitted in the others, of the robot's stored ones, and of a law of single axes."""
    random, expert = _paths(folder, FIT, KINDS[:-1]), _paths(folder, FIT, KINDS[-1:])
    known = random + EXPERT_TIMES * expert
    parts = [path["pose"] for path in known], [path["command"] for path in known]
    single = dataclasses.replace(PANDA, coupling=None, holds_turn=False, gripper_shares=(1.0, 0.0))
    models = {"stored": ControllerModel.of(PANDA), "fitted": kinematics.fit(*parts, PANDA), "single axes": kinematics.fit(*parts, single)}
    rows = {}
    for name, model in models.items():
        for data, kinds in (("expert", KINDS[-1:]), ("exploration", KINDS[:-1])):
            rows[f"{name}, {data}"] = {**errors(model, _paths(folder, HELD_OUT, kinds), 1), **errors(model, _paths(folder, HELD_OUT, kinds), 8)}
    counts = {name: sum(len(path["command"]) for path in paths) for name, paths in (("random", random), ("expert", expert))}
    return {
        "fitted on": FIT, "measured on": HELD_OUT, "transitions": counts, "model": models["fitted"].to_dict(), "rows": rows,
        "gripper_shares": gripper_shares(random),
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """0 where the stored constants stay below every limit, 1 where not, 2 for a bad command line or where LIBERO is not there."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.controller", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--record", type=Path, metavar="FOLDER")
    parser.add_argument("--each", type=int, default=4, help="paths of each kind in each scene (default 4)")
    parser.add_argument("--measure", type=Path, metavar="FOLDER")
    args = parser.parse_args(argv)
    if (args.record is None) == (args.measure is None):
        print("benchmarks.controller: want --record FOLDER or --measure FOLDER", file=sys.stderr)
        return 2
    try:
        if args.record is not None:
            record(args.record, args.each)
            return 0
        found = measure(args.measure)
    except (checkpoint.CheckpointError, LiberoMissing, NoOpenGL) as error:
        print(f"benchmarks.controller: {error}", file=sys.stderr)
        return 2
    for name, row in found["rows"].items():
        print(f"{name:26}" + "  ".join(f"{part} {one['mean']:.2f} (rms {one['rms']:.2f}, 95 % {one['p95']:.2f})" for part, one in row.items()))
    stored = {name: row for name, row in found["rows"].items() if name.startswith("stored")}
    wrong = [f"{name}: {part}" for name, row in stored.items() for part, most in LIMITS.items() if row[part]["mean"] >= most]
    print(json.dumps({**found, "over the limit": wrong}))
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())

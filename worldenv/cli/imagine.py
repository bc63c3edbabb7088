"""worldenv-imagine: a first frame and what the robot does, in; the video that the simulator imagines, its action maps beside it, out. Of an episode
what was recorded is beside them.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import cv2
import numpy as np
import torch
import tyro
from numpy.typing import NDArray

from worldenv import action_map, checkpoint, console, kinematics, noise, presets
from worldenv.cli import files
from worldenv.cli.arguments import parse
from worldenv.cli.ending import Ending
from worldenv.data import episode as episodes
from worldenv.data.in_view import InView
from worldenv.devices import device_of
from worldenv.nouns import ACTION_DIM, Camera
from worldenv.report import videos
from worldenv.robots import agibot_g1
from worldenv.robots.agibot_g1 import AGIBOT_G1
from worldenv.robots.contract import ArmDrawing, Robot
from worldenv.robots.named import named
from worldenv.simulator import weights
from worldenv.simulator.evac import DELTA_DIM, Evac

MODELS = {**presets.RELEASED, "tiny": presets.TINY.simulator}
_BANNER = 28
_LEAST_STD = 1e-4  # of a delta [m, rad]: dimensions that never move stay at 0
_TURN_TOLERANCE = 1e-3

Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class ImagineArgs:
    """Imagine a video from a first frame, actions and a camera."""

    frame: Path | None = None
    """First frame: a picture file, of any size."""
    actions: Path | None = None
    """.npy: EVAC's absolute poses (T, 16) of an AgiBot G1, or commands (T, 7) in [-1, 1] (dx dy dz, rotation, gripper -1 open) of one arm."""
    intrinsics: Path | None = None
    """Camera matrix at the frame's size [px]: .npy (3, 3), or EVAC's .json with fx, fy, ppx, ppy."""
    extrinsics: Path | None = None
    """Camera to world: .npy (4, 4) [m], OpenCV axes, or EVAC's .json."""
    state: Path | None = None
    """Where the arm starts, for commands (T, 7): .npy (8,): x y z [m], unit quaternion x y z w, gripper 0 shut .. 1 open."""
    episode: Path | None = None
    """Take all of the above from an episode of a run, RUN/stages/explore/NNNNNN.npz. Its frames are shown too, the gripper drawn over them at its
    recorded poses: where the disc is not on the gripper, camera or robot are not those of the episode."""
    checkpoint: Path | None = None
    """Weights: simulator.safetensors of a run's stage world, or released EVAC (Lightning or DeepSpeed layout, or safetensors)."""
    clip: Path | None = None
    """CLIP ViT-H/14 of open_clip, for a released file that lacks its image tower."""
    random_weights: bool = False
    """Imagine with random weights: shows that everything runs, and nothing else. The video says so."""
    model: Literal["evac", "evac-rlinf", "tiny"] = "evac"
    """Sizes of the networks, where the file does not hold them: released files and random weights."""
    robot: str | None = None
    """Whose arms move: agibot_g1 (poses), panda as in LIBERO, tabletop (commands), or a .json file that describes a robot (docs/own-robot.md). None:
    the robot that --episode says it is of; agibot_g1."""
    mirrored: bool = False
    """The frame is flipped left-right after projection, as OpenVLA-OFT's LIBERO frames are."""
    controller: Path | None = None
    """controller.json of a run's stage world: how commands become motion; without it, the robot's nominal constants."""
    statistics: Path | None = None
    """.npy (2, 14): mean and deviation of the deltas that the weights were trained with. Released weights hold none (docs/simulator.md)."""
    denoise_steps: int | None = None
    """DDIM steps; None: as the checkpoint has it (released: 27)."""
    eta: float | None = None
    """Noise of a DDIM step, 0 .. 1; None: as the checkpoint has it (released: 1)."""
    guidance: float | None = None
    """Classifier-free guidance; None: as the checkpoint has it (released: 1, off)."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the networks."""
    seed: int = 0
    """Of all noise: the same seed gives the same video."""
    device: str = "auto"
    """torch device; auto takes cuda where there is one, else cpu."""
    fps: int = videos.FPS
    """Pictures per second of the video."""
    out: Annotated[Path, tyro.conf.arg(metavar="V.mp4")] = Path("imagined.mp4")
    """Video to write."""
    force: bool = False
    """Overwrite --out where it exists."""


@dataclass(frozen=True)
class Motion:
    """What moves before which camera: N + 1 states, the first one shown by the given frame."""

    frame: NDArray[np.uint8]
    """(H, W, 3)."""
    pose: Doubles
    """(N + 1, A, 7)."""
    gripper: Doubles
    """(N + 1, A)."""
    arms: tuple[ArmDrawing, ...]
    camera: Camera
    robot: Robot
    recorded: NDArray[np.uint8] | None = None
    """(N + 1, H, W, 3): of an episode, its frames with the gripper drawn over them at its recorded poses."""


def _array(path: Path, flag: str) -> Doubles:
    return files.numbers(path, flag).astype(np.float64)


def _picture(path: Path) -> NDArray[np.uint8]:
    if not path.is_file():
        raise ValueError(f"--frame {path}: no such file")
    picture = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)
    if picture is None:
        raise ValueError(f"--frame {path}: not a picture that OpenCV can read")
    return np.asarray(picture, dtype=np.uint8)


def intrinsics(path: Path) -> Doubles:
    """(3, 3) of an .npy file, or of EVAC's JSON. Raises ValueError where that is no camera matrix."""
    if path.suffix == ".json":
        given = files.plain(path, "--intrinsics")
        try:
            fx, fy, cx, cy = (float(given[name]) for name in ("fx", "fy", "ppx", "ppy"))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"--intrinsics {path}: want numbers fx, fy, ppx, ppy ({error!r})") from error
        matrix = np.array([[fx, 0.0, cx], [0.0, fy, cy], [0.0, 0.0, 1.0]])
    else:
        matrix = _array(path, "--intrinsics")
    fits = matrix.shape == (3, 3)
    if not fits or not np.isfinite(matrix).all() or matrix[0, 0] <= 0 or matrix[1, 1] <= 0 or (matrix[2] != [0, 0, 1]).any():
        shown = matrix.tolist() if fits else matrix.shape
        raise ValueError(f"--intrinsics {path}: {shown}, want (3, 3): fx, fy above 0 on the diagonal and a last row of 0 0 1")
    return matrix


def extrinsics(path: Path) -> Doubles:
    """(4, 4) camera to world of an .npy file, or of EVAC's JSON. Raises ValueError where that is no rigid motion."""
    matrix: Doubles
    if path.suffix == ".json":
        given = files.plain(path, "--extrinsics")
        try:
            given = (given[0] if isinstance(given, list) else given)["extrinsic"]
            matrix = np.eye(4)
            matrix[:3, :3], matrix[:3, 3] = given["rotation_matrix"], given["translation_vector"]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError(f"--extrinsics {path}: want [0].extrinsic with rotation_matrix and translation_vector ({error!r})") from error
    else:
        matrix = _array(path, "--extrinsics")
    if matrix.ndim == 3 and matrix.shape[1:] == (4, 4) and len(matrix) and (matrix == matrix[:1]).all():
        matrix = matrix[0]
    if matrix.shape != (4, 4):
        moves = ": the camera must stand still, one matrix for the whole video" if matrix.ndim == 3 else ""
        raise ValueError(f"--extrinsics {path}: {matrix.shape}, want (4, 4), camera to world{moves}")
    turn = matrix[:3, :3]
    rigid = np.isfinite(matrix).all() and np.abs(turn @ turn.T - np.eye(3)).max() < _TURN_TOLERANCE and np.linalg.det(turn) > 0
    if not rigid or (matrix[3] != [0, 0, 0, 1]).any():
        raise ValueError(f"--extrinsics {path}: not a rigid motion: want a rotation, a translation and a last row of 0 0 0 1")
    return matrix


def _controller(path: Path | None, robot: Robot) -> kinematics.ControllerModel:
    if path is None:
        return kinematics.ControllerModel.of(robot)
    stored = files.plain(path, "--controller")
    if not isinstance(stored, dict):
        raise ValueError(f"--controller {path}: want a JSON object, the controller.json of a run's stage world")
    try:
        return kinematics.ControllerModel.from_dict(stored)
    except (TypeError, ValueError) as error:
        raise ValueError(f"--controller {path}: {error}") from error


def _follow(command: Doubles, state: Doubles, model: kinematics.ControllerModel) -> tuple[Doubles, Doubles]:
    """Poses (T + 1, 1, 7) and grippers (T + 1, 1) that commands (T, 7) lead to from `state` (8,)."""
    begin = kinematics.rest(torch.from_numpy(state[None, :7]), torch.from_numpy(state[7:]))
    path, _ = kinematics.follow(begin, torch.from_numpy(command)[None], model)
    pose = torch.cat([begin.pose[:, None], path.pose], dim=1)[0, :, None].numpy()
    return pose, torch.cat([begin.gripper[:, None], path.gripper], dim=1)[0, :, None].numpy()


def motion(args: ImagineArgs) -> Motion:
    """What the arguments say of frame, arms and camera. Raises ValueError with one line that names the argument."""
    given = {"frame": args.frame, "actions": args.actions, "intrinsics": args.intrinsics, "extrinsics": args.extrinsics}
    state: Doubles | None
    recorded: NDArray[np.uint8] | None = None
    if args.episode is not None:
        if mixed := [f"--{name}" for name, value in {**given, "state": args.state}.items() if value is not None]:
            raise ValueError(f"--episode brings its own frame, actions, state and camera; leave {', '.join(mixed)} away")
        episode = episodes.load(args.episode)
        if episode.camera is None:
            raise ValueError(f"--episode {args.episode}: does not say where its camera stood; give frame, actions and camera by themselves")
        robot = named(args.robot or episode.robot or AGIBOT_G1.name)
        episodes.want_robot(episode, robot.name, f"--episode {args.episode}")
        frame, camera, actions, name = episode.frame[0], episode.camera, episode.command.astype(np.float64), f"--episode {args.episode}"
        state = np.concatenate([episode.pose[0], episode.gripper[:1]])
        shown = action_map.resized(camera, *frame.shape[:2])
        arms = robot.arms_at(shown.height)[-1:]
        recorded = action_map.drawn_over(episode.frame, episode.pose[:, None], episode.gripper[:, None], shown, robot, arms).numpy()
    else:
        if args.frame is None or args.actions is None or args.intrinsics is None or args.extrinsics is None:
            missing = ", ".join(f"--{name}" for name, value in given.items() if value is None)
            raise ValueError(f"give {missing}; or --episode, which holds them all")
        robot = named(args.robot or AGIBOT_G1.name)
        frame, actions, name = _picture(args.frame), _array(args.actions, "--actions"), f"--actions {args.actions}"
        height, width = frame.shape[:2]
        camera = Camera(intrinsics(args.intrinsics), extrinsics(args.extrinsics), height, width, args.mirrored)
        state = None if args.state is None else _array(args.state, "--state")
    if actions.ndim == 2 and actions.shape[1] == 16 and robot is AGIBOT_G1:
        if extra := [f"--{flag}" for flag in ("state", "controller") if getattr(args, flag) is not None]:
            raise ValueError(f"{extra[0]}: poses (T, 16) say where the arms are at every step; leave it away")
        try:
            pose, gripper, arms = agibot_g1.states(actions)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        return Motion(frame, pose, gripper, arms, camera, robot)
    if actions.ndim != 2 or actions.shape[1] not in (ACTION_DIM, 16) or not len(actions):
        raise ValueError(f"{name}: {actions.shape}, want poses (T, 16) of agibot_g1 or commands (T, 7) of panda or tabletop")
    if actions.shape[1] == 16 or robot is AGIBOT_G1:
        kind, fits = ("poses (T, 16)", "agibot_g1") if actions.shape[1] == 16 else ("commands (T, 7)", "panda or tabletop")
        raise ValueError(f"{name}: {kind} are no actions of --robot {robot.name}; give --robot {fits}")
    files.in_range(actions, name)
    if state is None:
        raise ValueError("commands (T, 7) start somewhere: give --state, .npy (8,) of x y z, quaternion x y z w, gripper 0 .. 1")
    if state.shape != (8,) or abs(float(np.linalg.norm(state[3:7])) - 1.0) > _TURN_TOLERANCE or not 0.0 <= state[7] <= 1.0:
        raise ValueError(f"--state: {state.tolist()}, want (8,): x y z [m], unit quaternion x y z w, gripper 0 .. 1")
    pose, gripper = _follow(actions, state, _controller(args.controller, robot))
    return Motion(frame, pose, gripper, robot.arms[-1:], camera, robot, recorded)


def _warn_of_view(args: ImagineArgs, seen: Motion) -> None:
    """A line where `seen` is at no state in the picture, or moves and its map would not: the video would be that of an arm at rest."""
    in_view = InView(seen.robot, f"--episode {args.episode}" if args.episode else f"--extrinsics {args.extrinsics}")
    for i, arm in enumerate(seen.arms):
        in_view.look(seen.pose[:, i], seen.camera, arm)
    if wrong := in_view.wrong():
        console.say(wrong)


def _simulator(args: ImagineArgs) -> Evac:
    if args.clip is not None and (args.checkpoint is None or weights.is_ours(args.checkpoint)):
        raise ValueError(f"--clip {args.clip}: is for a released --checkpoint that lacks its image tower; leave it away")
    if args.checkpoint is None:
        return Evac.initialised(MODELS[args.model], args.seed).eval()
    return weights.load(args.checkpoint, MODELS[args.model], args.clip)


def _set_statistics(simulator: Evac, args: ImagineArgs, deltas: torch.Tensor, arms: Sequence[ArmDrawing]) -> str:
    """Give `simulator` the mean and deviation of deltas where its file has none; returns where they come from."""
    if args.statistics is not None:
        given = _array(args.statistics, "--statistics")
        if given.shape != (2, DELTA_DIM):
            raise ValueError(f"--statistics {args.statistics}: {given.shape}, want (2, {DELTA_DIM}): mean, then deviation")
        if still := np.flatnonzero(given[1] <= 0).tolist():
            raise ValueError(f"--statistics {args.statistics}: deviation {still[0]} is {given[1, still[0]]:g}, want a deviation above 0")
        source = str(args.statistics)
        mean, deviation = (torch.from_numpy(row.astype(np.float32)) for row in given)
    elif args.checkpoint is not None and weights.is_ours(args.checkpoint):
        return "checkpoint"
    else:
        source = "these actions"
        mean, deviation = deltas.mean(0), deltas.std(0, correction=0).clamp_min(_LEAST_STD)
        console.say(
            "no --statistics: deltas are normalised by mean and deviation of these very actions, not by those of the training data, which for the "
            "released weights are in lvdm/data/statistics.py of the public code (docs/simulator.md makes the .npy of it)"
        )
    absent = torch.ones(DELTA_DIM, dtype=torch.bool)
    for arm in arms:
        side = 0 if arm.side == "left" else DELTA_DIM // 2
        absent[side : side + DELTA_DIM // 2] = False
    simulator.delta_mean.copy_(torch.where(absent, 0.0, mean))  # so that the deltas of an absent arm are 0 after normalisation too
    simulator.delta_std.copy_(deviation)
    return source


def _banner(text: str, width: int) -> NDArray[np.uint8]:
    strip = np.full((_BANNER, width, 3), 22, np.uint8)
    cv2.putText(strip, text, (6, _BANNER - 9), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (255, 150, 70), 1, cv2.LINE_AA)
    return strip


def _shown(
    chunks: Iterator[torch.Tensor], maps: list[NDArray[np.uint8]], total: int, random: bool, recorded: NDArray[np.uint8] | None
) -> Iterator[NDArray[np.uint8]]:
    """The pictures of the video: each imagined frame beside its action map and what was `recorded`, under a banner where the weights are random."""
    done = 0
    for _ in (bar := console.track(0, total, "imagine")):
        frames = next(chunks).cpu().numpy()
        for i, (frame, drawn) in enumerate(zip(frames, maps.pop(0), strict=True), start=done + 1):
            views = [frame, drawn]
            if recorded is not None:
                views.append(np.asarray(cv2.resize(recorded[i], frame.shape[1::-1], interpolation=cv2.INTER_AREA)))
            whole = videos.side_by_side(views)
            yield videos.even(np.concatenate([_banner("RANDOM WEIGHTS: this shows nothing", whole.shape[1]), whole]) if random else whole)
        done += len(frames)
        bar.note(frames=done)


def imagine(args: ImagineArgs) -> dict[str, Any]:
    """Write the video that `args` ask for; returns what there is to say of it, JSON-ready."""
    files.vacant(args.out, args.force)
    if args.out.suffix != ".mp4" or args.fps < 1:
        raise ValueError(f"--out {args.out} --fps {args.fps}: want a name that ends in .mp4, and at least 1 picture per second")
    if (args.checkpoint is None) != args.random_weights:
        both = "--checkpoint and --random-weights: choose one"
        raise ValueError(both if args.random_weights else "give --checkpoint; or --random-weights, whose video shows nothing but that it runs")
    files.seeded(args.seed)
    device, seen = device_of(args.device), motion(args)
    _warn_of_view(args, seen)
    simulator = _simulator(args)
    simulator.sample_with(args.denoise_steps, args.eta, args.guidance)
    settings = simulator.config
    camera = action_map.resized(seen.camera, settings.height, settings.width)
    names = [arm.side for arm in seen.arms]
    arms = tuple(arm for arm in seen.robot.arms_at(settings.height) if arm.side in names)
    deltas = torch.from_numpy(action_map.deltas(seen.pose, seen.gripper, arms).astype(np.float32))
    statistics = _set_statistics(simulator, args, deltas, arms)
    simulator, drawn = simulator.to(device), list[NDArray[np.uint8]]()
    draws, *shape = simulator.noise_shape()

    def maps(first: int, end: int) -> torch.Tensor:
        states = slice(first + 1, end + 1)  # the state after each step
        made = action_map.pictures(seen.pose[states], seen.gripper[states], camera, seen.robot, arms)
        drawn.append(made.numpy())
        return made.to(device)

    def noises(chunk: int) -> torch.Tensor:
        rows = [noise.normal(args.seed, 0, chunk, step, noise.Stream.SIMULATOR, shape) for step in range(draws)]
        return torch.from_numpy(np.stack(rows)).to(device)

    rays = action_map.rays(camera, settings.latent).to(device)
    chunks = -(-len(deltas) // settings.chunk)
    began = time.monotonic()
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bfloat16")
    with files.written(args.out), checkpoint.atomic(args.out) as temporary, autocast:
        frames = simulator.imagine_path(torch.from_numpy(seen.frame).to(device), maps, rays, deltas.to(device), noises)
        count, width, height = videos.write_mp4(temporary, _shown(frames, drawn, chunks, args.random_weights, seen.recorded), args.fps)
    seconds = time.monotonic() - began
    return {
        "out": str(args.out),
        "frames": count,
        "chunks": chunks,
        "size": [width, height],
        "weights": "random" if args.random_weights else "checkpoint",
        "checkpoint": None if args.checkpoint is None else str(args.checkpoint),
        "robot": seen.robot.name,
        "arms": names,
        "delta_statistics": statistics,
        "sampler": {name: getattr(settings, name) for name in ("denoise_steps", "eta", "guidance")},
        "seed": args.seed,
        "device": str(device),
        "precision": args.precision,
        "seconds": round(seconds, 3),
        "frames_per_second": round(count / seconds, 3),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0, 1 where imagining failed, 2 where the arguments or the files are no good."""
    with Ending("worldenv-imagine") as ending:
        ending.stopped = "; nothing was written"
        result = imagine(parse("worldenv-imagine", ImagineArgs, ImagineArgs(), sys.argv[1:] if argv is None else argv))
        if result["weights"] == "random":
            console.say("random weights: the video shows that everything runs, and nothing else")
        print(json.dumps(result))
    return ending.code


if __name__ == "__main__":
    raise SystemExit(main())

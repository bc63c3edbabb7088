"""worldenv-imagine: the frames that a rollout would imagine, EVAC's own inputs, any length, and one line for whatever is wrong."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.test_simulator import SMALL, released, trained
from worldenv import action_map, checkpoint, kinematics, noise
from worldenv.cli import imagine
from worldenv.config import SimulatorConfig
from worldenv.data import episode as episodes
from worldenv.nouns import Camera, Context
from worldenv.robots.agibot_g1 import AGIBOT_G1, states
from worldenv.robots.tabletop import TABLETOP
from worldenv.simulator import weights
from worldenv.simulator.evac import DELTA_DIM, Evac, chunk_deltas
from worldenv.world import ImaginedWorld, advance, started

HEIGHT, WIDTH = 32, 48  # of the given frame, twice the simulator's
FOCAL = 50.0
SCALED = np.array([[FOCAL / 2, 0, WIDTH / 4], [0, FOCAL / 2, HEIGHT / 4], [0, 0, 1]])  # at the simulator's size
TO_WORLD = np.array([[1.0, 0, 0, 0], [0, -1, 0, 0], [0, 0, -1, 0.8], [0, 0, 0, 1]])
INTRINSICS = np.array([[FOCAL, 0, WIDTH / 2], [0, FOCAL, HEIGHT / 2], [0, 0, 1]])
DOWN = [1.0, 0.0, 0.0, 0.0]
STATE = np.array([0.05, 0.0, 0.1, *DOWN, 1.0])

COMMANDS = {"actions": "c.npy", "robot": "panda", "state": "s.npy"}


def poses(count: int = 8) -> NDArray[np.float64]:
    """EVAC's rows: both arms go through the picture, raw openings."""
    way = np.linspace(0.0, 0.1, count)
    arms = [[[x + 0.1 * side, 0.02 * side, 0.3, *DOWN, 60.0 + 100.0 * x] for x in way] for side in (-1, 1)]
    return np.concatenate(np.array(arms), axis=1)


def commands(count: int = 6) -> NDArray[np.float64]:
    return np.clip(np.random.default_rng(0).normal(0, 0.5, (count, 7)), -1, 1)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the command reads, right and wrong."""
    folder = tmp_path_factory.mktemp("given")
    frame = np.random.default_rng(1).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    cv2.imwrite(str(folder / "f.png"), frame[..., ::-1])
    (folder / "text.png").write_text("no picture")
    holed = poses()
    holed[2, 5] = np.nan
    unturned = poses()
    unturned[3, 3:7] = [0.5, 0, 0, 0]
    one_armed = poses()
    one_armed[:, :8] = 0.0
    arrays = {
        "p": poses(), "c": commands(), "k": INTRINSICS, "e": TO_WORLD, "s": STATE, "holed": holed, "unturned": unturned, "one-armed": one_armed,
        "six": np.zeros((4, 6)), "large": 3.0 * commands(), "short": poses(1), "k4": np.eye(4), "k-flat": np.zeros((3, 3)), "e3": np.eye(3),
        "e-aside": TO_WORLD + np.outer([5.0, 0, 0, 0], [0, 0, 0, 1]), "e-mm": TO_WORLD + np.outer([0, 0, 799.2, 0], [0, 0, 0, 1]),
        "e-scaled": np.diag([2.0, 2, 2, 1]), "e-moving": np.stack([TO_WORLD, TO_WORLD + np.eye(4)]), "s7": STATE[:7],
        "stats": np.ones((2, DELTA_DIM)), "stats-zero": np.zeros((2, DELTA_DIM)), "text": np.array(["a"]),
    }  # fmt: skip
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    np.save(folder / "pickled.npy", np.array([{}], dtype=object), allow_pickle=True)
    (folder / "k.json").write_text(json.dumps({"fx": FOCAL, "fy": FOCAL, "ppx": WIDTH / 2, "ppy": HEIGHT / 2}))
    (folder / "list.json").write_text("[1]")
    rotation, translation = TO_WORLD[:3, :3].tolist(), TO_WORLD[:3, 3].tolist()
    (folder / "e.json").write_text(json.dumps([{"extrinsic": {"rotation_matrix": rotation, "translation_vector": translation}}]))
    simulator = trained()
    simulator.delta_mean.fill_(0.01)
    checkpoint.save(folder / "ours.safetensors", weights.to_tree(simulator))
    torch.save({"state_dict": released(simulator)}, folder / "lightning.pt")
    torch.save({f"_forward_module.module.{name}": value for name, value in released(simulator).items()}, folder / "deepspeed.pt")
    checkpoint.save(folder / "policy.safetensors", {"policy": {}})
    path = states(poses())
    moved = episodes.Episode(
        "push", 0, "train", 3, "test", np.stack([frame] * 7), np.tile(path[0][:1, 0], (7, 1)), np.ones(7), commands().astype(np.float32),
        np.zeros(7, bool), camera=Camera(INTRINSICS, TO_WORLD, HEIGHT, WIDTH),
    )  # fmt: skip
    episodes.save(folder / "000000.npz", moved)
    return folder


@pytest.fixture(autouse=True)
def small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Released files and random weights of these tests are of a small network."""
    monkeypatch.setattr(imagine, "MODELS", {"evac": SMALL, "evac-rlinf": SMALL, "tiny": SMALL})


@pytest.fixture
def call(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command; flags are given as names of files without their folder, None leaves one out."""

    def run(**changes: str | None) -> tuple[int, str, str]:
        flags = {
            "frame": "f.png", "actions": "p.npy", "intrinsics": "k.npy", "extrinsics": "e.npy", "checkpoint": "ours.safetensors",
            "out": str(tmp_path / "v.mp4"),
        } | changes  # fmt: skip
        argv = []
        for name, value in flags.items():
            if value is not None:
                known = (files / value).exists() or "." in value
                argv += [f"--{name.replace('_', '-')}", *([str(files / value) if known and not value.startswith("/") else value] if value else [])]
        code = imagine.main(argv)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def frames_of(video: Path) -> NDArray[np.uint8]:
    with av.open(str(video)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_poses_of_two_arms_become_a_video(call: Any, tmp_path: Path) -> None:
    code, out, _ = call()
    assert code == 0
    said = json.loads(out.splitlines()[-1])
    assert said["frames"] == 7, "a frame after each pose but the first"
    assert (said["chunks"], said["arms"], said["delta_statistics"], said["weights"]) == (2, ["left", "right"], "checkpoint", "checkpoint")
    video = frames_of(tmp_path / "v.mp4")
    assert video.shape == (7, said["size"][1], said["size"][0], 3)
    scale = 256 // 24
    assert said["size"] == [2 * 24 * scale + 8, 16 * scale]
    _, _, drawn_arms = states(poses())
    camera = Camera(SCALED, TO_WORLD, 16, 24)
    pose, gripper, _ = states(poses())
    arms = AGIBOT_G1.arms_at(16)
    assert [arm.side for arm in drawn_arms] == [arm.side for arm in arms]
    maps = action_map.pictures(pose[1:], gripper[1:], camera, AGIBOT_G1, arms).numpy()
    shown = video[:, scale // 2 :: scale, 24 * scale + 8 + scale // 2 :: scale][:, :16, :24]
    assert np.abs(shown.astype(int) - maps).mean() < 12, "the action maps lie on the right"


@pytest.mark.parametrize("count", [3, 9])
def test_commands_give_the_frames_that_a_rollout_imagines(count: int, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any number of commands, whole chunks or not: the same frames as in `ImaginedWorld` under the same noise."""
    np.save(tmp_path / "c.npy", commands(count))
    drawn: list[NDArray[np.uint8]] = []
    monkeypatch.setattr(imagine.videos, "side_by_side", lambda views: (drawn.append(views[0]), views[0])[1])
    argv = f"--frame {files}/f.png --intrinsics {files}/k.npy --extrinsics {files}/e.npy --state {files}/s.npy --robot tabletop --seed 5"
    argv += f" --actions {tmp_path}/c.npy --checkpoint {files}/ours.safetensors --out {tmp_path}/v.mp4"
    assert imagine.main(argv.split()) == 0
    simulator = weights.load(files / "ours.safetensors", SMALL)
    frame = cv2.imread(str(files / "f.png"))[..., ::-1].copy()
    camera = Camera(SCALED, TO_WORLD, 16, 24)
    world = ImaginedWorld(
        simulator, None, TABLETOP, kinematics.ControllerModel.of(TABLETOP), camera, SMALL.latent, 5, torch.device("cpu")
    )
    scenes = started(world, [Context("push", 0, 0, frame, STATE[:7], 1.0)], [0])
    whole = count // 4 * 4
    for start in range(0, whole, 4):
        (made,) = advance(world, scenes, torch.from_numpy(commands(count)[None, start : start + 4]).float())
        scenes = [made.after]
        ours = np.stack(drawn[start : start + 4]).astype(int)
        assert np.abs(ours - made.frames.numpy()).max() <= 1, "beyond rounding to the next level"
    assert len(drawn) == count


def test_an_episode_brings_everything(call: Any, files: Path, tmp_path: Path) -> None:
    """Its own frames too, the gripper drawn over them where the recorded pose has it."""
    nothing = dict.fromkeys(("frame", "actions", "intrinsics", "extrinsics"))
    stored = episodes.load(files / "000000.npz")
    level = np.arange(20, 230, 30, dtype=np.uint8)  # of each frame another grey
    small = (7, HEIGHT // 2, WIDTH // 2, 3)  # of pictures that were made smaller than their camera's
    plain = dataclasses.replace(stored, frame=np.broadcast_to(level[:, None, None, None], small).copy())
    episodes.save(tmp_path / "grey.npz", plain)
    code, out, _ = call(**nothing, episode=str(tmp_path / "grey.npz"), robot="tabletop")
    assert code == 0
    assert json.loads(out.splitlines()[-1])["frames"] == 6
    shown = frames_of(tmp_path / "v.mp4")
    side = (shown.shape[2] - 2 * 8) // 3  # three pictures with gaps of 8 px
    recorded = shown[:, :, -side:].astype(int)
    assert np.abs(np.median(recorded, axis=(1, 2, 3)) - level[1:]).max() <= 3
    assert stored.camera is not None
    u, v = action_map.project(stored.pose[:1, None], stored.camera, TABLETOP.arms_at(HEIGHT)[-1:])[0, 0, 0]
    at = int(v / HEIGHT * shown.shape[1]), int(u / WIDTH * side)
    assert (np.abs(recorded[:, at[0], at[1]] - level[1:, None]).max(axis=1) > 20).all()


def test_an_episode_says_whose_it_is(call: Any, files: Path, tmp_path: Path) -> None:
    nothing = dict.fromkeys(("frame", "actions", "intrinsics", "extrinsics"))
    episodes.save(tmp_path / "said.npz", dataclasses.replace(episodes.load(files / "000000.npz"), robot="tabletop"))
    code, out, _ = call(**nothing, episode=str(tmp_path / "said.npz"))
    assert code == 0
    assert json.loads(out.splitlines()[-1])["robot"] == "tabletop"
    code, _, said = call(**nothing, episode=str(tmp_path / "said.npz"), robot="panda", force="")
    assert code == 2
    assert "said.npz: its commands are those of robot 'tabletop', not of 'panda': give the one whose they are (--robot)" in said


def test_evacs_json_cameras_are_its_matrices(files: Path) -> None:
    np.testing.assert_array_equal(imagine.intrinsics(files / "k.json"), imagine.intrinsics(files / "k.npy"))
    np.testing.assert_array_equal(imagine.extrinsics(files / "e.json"), imagine.extrinsics(files / "e.npy"))


@pytest.mark.parametrize("file", ["lightning.pt", "deepspeed.pt"])
def test_released_layouts_imagine(call: Any, file: str, tmp_path: Path) -> None:
    code, out, err = call(checkpoint=file)
    assert code == 0
    assert json.loads(out.splitlines()[-1])["delta_statistics"] == "these actions"
    assert "no --statistics" in err
    assert "lvdm/data/statistics.py" in err
    assert call(checkpoint=file, statistics="stats.npy", out=str(tmp_path / "w.mp4"))[0] == 0


def test_the_manual_makes_statistics_of_the_public_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = (Path(__file__).resolve().parent.parent / "docs" / "simulator.md").read_text()
    (code,) = re.findall(r"^```python\n(import numpy.*?StatisticInfo.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    stated = {"agibotworld": {"mean": [*range(12)], "std": [*range(20, 32)]}}
    monkeypatch.setitem(sys.modules, "lvdm", SimpleNamespace(data=None))
    monkeypatch.setitem(sys.modules, "lvdm.data", SimpleNamespace(statistics=None))
    monkeypatch.setitem(sys.modules, "lvdm.data.statistics", SimpleNamespace(StatisticInfo=stated))
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    want = [[0, 1, 2, 3, 4, 5, 0, 6, 7, 8, 9, 10, 11, 0], [20, 21, 22, 23, 24, 25, 1, 26, 27, 28, 29, 30, 31, 1]]
    assert np.load("statistics.npy").tolist() == want


def test_the_same_seed_gives_the_same_video(call: Any, tmp_path: Path) -> None:
    made = []
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert call(out=str(tmp_path / f"{name}.mp4"), seed=seed)[0] == 0
        made.append((tmp_path / f"{name}.mp4").read_bytes())
    assert made[0] == made[1]
    assert made[0] != made[2]


def test_random_weights_only_where_asked_and_said_so(call: Any, tmp_path: Path) -> None:
    code, _, err = call(checkpoint=None)
    assert code == 2
    assert "--random-weights" in err
    assert not (tmp_path / "v.mp4").exists()
    code, out, err = call(checkpoint=None, random_weights="")
    assert code == 0
    assert json.loads(out.splitlines()[-1])["weights"] == "random"
    assert "random weights" in err
    top = frames_of(tmp_path / "v.mp4")[0, :28]
    assert (top.astype(int).max(-1) > 120).any(), "a banner says so in every frame"
    assert call(random_weights="")[0] == 2, "both were given"


@pytest.mark.parametrize("given", [{}, COMMANDS], ids=["poses", "commands"])
def test_a_camera_in_whose_picture_nothing_moves_is_worth_a_line(given: dict[str, str], call: Any) -> None:
    for extrinsics, says in (("e", ""), ("e-aside", r"at its poses .* 0 of \d+ moments"), ("e-mm", r"the gripper moves by .*in mm\?")):
        code, _, err = call(**given, extrinsics=f"{extrinsics}.npy", force="")
        assert code == 0
        assert bool(re.search(rf"^--extrinsics .*{extrinsics}\.npy: {says}", err, re.MULTILINE) if says else "camera" not in err), err


def test_an_existing_video_is_kept(call: Any, tmp_path: Path) -> None:
    (tmp_path / "v.mp4").write_text("mine")
    code, _, err = call()
    assert (code, (tmp_path / "v.mp4").read_text()) == (2, "mine")
    assert "--force" in err
    assert call(force="")[0] == 0
    assert len(frames_of(tmp_path / "v.mp4")) == 7


@pytest.mark.parametrize(
    ("number", "cure"),
    [
        (errno.EACCES, "Permission denied; choose another --out, that can be written to"),
        (errno.ENOSPC, "No space left on device; free space there, or choose another --out"),
    ],
)
def test_a_disk_that_refuses_is_one_line_with_the_cure(number: int, cure: str, call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *_: Any) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(imagine.videos, "write_mp4", refuse)
    code, out, err = call()
    assert (code, out, err) == (1, "", f"worldenv-imagine: --out {tmp_path / 'v.mp4'}: {cure}\n")
    monkeypatch.setattr(os, "access", lambda *_: False)
    code, out, err = call()
    assert (code, out) == (2, "")
    assert err == f"worldenv-imagine: --out {tmp_path / 'v.mp4'}: {tmp_path} is no folder that can be written to; choose another --out\n"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"frame": "gone.png"}, "--frame .*gone.png: no such file"),
        ({"frame": "text.png"}, "not a picture"),
        ({"frame": None, "extrinsics": None}, "give --frame, --extrinsics"),
        ({"actions": "gone.npy"}, "no such file"),
        ({"actions": "f.png"}, "not an .npy file"),
        ({"actions": "pickled.npy"}, "not an .npy file"),
        ({"actions": "text.npy"}, "array of numbers"),
        ({"actions": "six.npy"}, r"\(4, 6\), want poses"),
        ({"actions": "holed.npy"}, r"\(2, 5\) is not finite"),
        ({"actions": "unturned.npy"}, "row 3, left arm: quaternion of length 0.5"),
        ({"actions": "short.npy"}, "at least two"),
        ({"actions": "c.npy"}, r"commands \(T, 7\) are no actions of --robot agibot_g1"),
        ({"robot": "panda"}, r"poses \(T, 16\) are no actions of --robot panda; give --robot agibot_g1"),
        ({"robot": "pandas"}, "pandas"),
        ({"actions": "c.npy", "robot": "panda"}, "give --state"),
        ({"actions": "large.npy", "robot": "panda", "state": "s.npy"}, "want commands in -1 .. 1"),
        ({"actions": "c.npy", "robot": "panda", "state": "s7.npy"}, r"want \(8,\)"),
        ({"state": "s.npy"}, "leave it away"),
        ({"intrinsics": "k4.npy"}, r"\(4, 4\), want \(3, 3\)"),
        ({"intrinsics": "k-flat.npy"}, "above 0"),
        ({"intrinsics": "e.json"}, "fx, fy, ppx, ppy"),
        ({"extrinsics": "e3.npy"}, r"\(3, 3\), want \(4, 4\)"),
        ({"extrinsics": "e-scaled.npy"}, "not a rigid motion"),
        ({"extrinsics": "e-moving.npy"}, "must stand still"),
        ({"extrinsics": "k.json"}, "rotation_matrix"),
        ({"checkpoint": "gone.pt"}, "no such file"),
        ({"checkpoint": "policy.safetensors"}, "not a simulator"),
        ({"checkpoint": "f.png"}, "truncated, damaged"),
        ({"statistics": "stats-zero.npy"}, r"stats-zero.npy: deviation \d+ is 0, want a deviation above 0"),
        ({"seed": "-1"}, "--seed -1: want 0"),
        ({**COMMANDS, "controller": "list.json"}, r"--controller \S*list.json: want a JSON object"),
        ({"clip": "lightning.pt"}, "leave it away"),
        ({"denoise_steps": "61"}, "denoise_steps=61"),
        ({"device": "abacus"}, "--device abacus"),
        ({"episode": "000000.npz"}, "leave --frame, --actions"),
        ({"out": "v.gif"}, "ends in .mp4"),
        ({"out": "f.png/v.mp4"}, "f.png is no folder that can be written to; choose another --out"),
        ({**COMMANDS, "controller": "gone.json"}, r"--controller \S*gone.json: no readable JSON \(No such file or directory\)$"),
        ({**COMMANDS, "controller": "k.json"}, r"--controller \S*k.json: controller model: fields"),
        ({"actons": "p.npy"}, "did you mean '--actions'"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(call: Any, changes: dict[str, str | None], said: str, tmp_path: Path) -> None:
    code, out, err = call(**changes)
    assert (code, out) == (2, "")
    (line,) = [line for line in err.splitlines() if line.startswith("worldenv-imagine:")]
    assert err.strip() == line
    assert re.search(said, line), line
    assert list(tmp_path.glob("*.mp4")) == []


def test_an_arm_that_is_not_there(files: Path, call: Any) -> None:
    """Padded with zeros: nothing is drawn of it, its deltas are 0 before and after normalisation, and nothing is NaN."""
    pose, gripper, arms = states(np.load(files / "one-armed.npy"))
    assert pose.shape == (8, 1, 7)
    assert [arm.side for arm in arms] == ["right"]
    deltas = torch.from_numpy(action_map.deltas(pose, gripper, arms)).float()
    assert not deltas[:, :7].any()
    assert deltas[:, 7].any()
    simulator = trained()
    args = imagine.ImagineArgs(statistics=files / "stats.npy", checkpoint=files / "lightning.pt")
    imagine._set_statistics(simulator, args, deltas, arms)
    assert not simulator.normalise(deltas)[:, :7].any()
    assert simulator.normalise(deltas)[:, 7].any()
    both, opening, two = states(poses())
    np.testing.assert_array_equal(pose[:, 0], both[:, 1])
    camera = Camera(INTRINSICS, TO_WORLD, HEIGHT, WIDTH)
    alone = action_map.pictures(pose, gripper, camera, AGIBOT_G1, arms)
    hidden = both.copy()
    hidden[:, 0, :3] = [50.0, 0.0, 0.3]  # far off the canvas: what the released model saw of an arm out of view
    assert torch.equal(alone, action_map.pictures(hidden, opening, camera, AGIBOT_G1, two))
    code, out, _ = call(actions="one-armed.npy")
    assert code == 0
    assert json.loads(out.splitlines()[-1])["arms"] == ["right"]


def _path(simulator: Evac, frame: torch.Tensor, maps: torch.Tensor, deltas: torch.Tensor) -> torch.Tensor:
    draws, *shape = simulator.noise_shape()

    def noises(chunk: int) -> torch.Tensor:
        return torch.from_numpy(np.stack([noise.normal(0, 0, chunk, s, noise.Stream.SIMULATOR, shape) for s in range(draws)]))

    rays = torch.randn(6, *SMALL.latent, generator=torch.Generator().manual_seed(3))
    return torch.cat(list(simulator.imagine_path(frame, lambda a, b: maps[a:b], rays, deltas, noises)))


@pytest.mark.parametrize("rows", ["aligned", "published"])
def test_a_known_path_tells_each_chunk_its_rows(rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config: SimulatorConfig = dataclasses.replace(SMALL, delta_rows=rows, delta_stride=3.0)
    simulator = trained(config)
    simulator.delta_mean.fill_(0.1)
    told: list[torch.Tensor] = []
    original = simulator.action_tokens
    monkeypatch.setattr(simulator, "action_tokens", lambda given: (told.append(given), original(given))[1])
    generator = torch.Generator().manual_seed(0)
    deltas, maps = torch.randn(10, DELTA_DIM, generator=generator), torch.randint(0, 256, (10, 16, 24, 3), dtype=torch.uint8, generator=generator)
    frames = _path(simulator, maps[0], maps, deltas)
    assert frames.shape == (10, 16, 24, 3)
    assert len(told) == 3
    for number, given in enumerate(told):
        assert torch.equal(given, chunk_deltas(simulator.normalise(deltas)[None], number, config))
    assert not told[2][0, -1].any(), "past the end: 0 after normalisation"


def test_a_chunk_that_is_not_finite_stops_the_video() -> None:
    simulator = trained()
    with torch.no_grad():
        simulator.unet.out[2].bias.fill_(float("nan"))  # type: ignore[union-attr, operator]
    maps = torch.zeros(4, 16, 24, 3, dtype=torch.uint8)
    with pytest.raises(FloatingPointError, match="chunk 0"):
        _path(simulator, maps[0], maps, torch.zeros(4, DELTA_DIM))

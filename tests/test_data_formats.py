"""Other people's formats: what is written is read, bit for bit where the format allows; published files by their own rules; damage is named.

Meant to find; nine of these were tried, and found: observation and action of LIBERO's files paired by the same row; the last row's command kept;
pictures turned about one axis; q and -q mixed up; axis-angle wrapped at pi; no-ops compared with the last command instead of the last kept;
frames taken by position in a video that several episodes share; the last frame of a neighbour; a mask that drops the last observation.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import av
import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from test_episode import equal, make, placed

from worldenv import kinematics
from worldenv.checkpoint import CheckpointError
from worldenv.cli import convert as command_line
from worldenv.data import lerobot, libero_hdf5
from worldenv.data.convert import Choices, convert
from worldenv.data.convert import read as read_any
from worldenv.data.episode import EpisodeSet, UnfitError, save
from worldenv.robots.panda import PANDA


def path_of(seed, steps):
    """A path (steps + 1, 7) that points down and turns through pi, as a gripper's does: the scalar part changes its sign."""
    rng = np.random.default_rng(seed)
    turn = np.linspace(-0.4, 0.5, steps + 1)[:, None] * np.array([1.0, 0.3, 0.0])
    turn = kinematics.multiply(kinematics.exp(turn), np.broadcast_to([1.0, 0.0, 0.0, 0.0], (steps + 1, 4)))
    return np.concatenate([rng.normal(size=(steps + 1, 3)), kinematics.continuous(turn)], axis=1)


def shown(seed=0, steps=6, side=(16, 20), **changes):
    """An episode whose every observation has a picture of its own."""
    rng = np.random.default_rng(seed + 100)
    picture = rng.integers(0, 256, (steps + 1, *(n // 4 for n in side), 3), dtype=np.uint8).repeat(4, 1).repeat(4, 2)
    camera = placed(rng, *side, mirrored=bool(seed % 2))
    return make(seed, steps, **{"frame": picture, "pose": path_of(seed, steps), "camera": camera, **changes})


EPISODES = [
    shown(0, 6),
    shown(1, 4, task=0, instruction="open the drawer"),
    shown(2, 9),
    shown(3, 5, camera=None, versions={}, split="test"),
]


# LIBERO's HDF5


def published(path, rows=8, side=10, seed=0, convention="opengl", states=True):
    """A file as LIBERO's create_dataset.py writes it; returns what the simulator showed: upright unmirrored frames, and the raw arrays."""
    rng = np.random.default_rng(seed)
    upright = rng.integers(0, 256, (rows, side, side, 3), dtype=np.uint8)
    pose = path_of(seed, rows - 1)
    pose[rows // 2 :, 3:] *= -1  # MuJoCo gives either
    finger = np.stack([np.linspace(0.0401, 0.002, rows), np.linspace(-0.0399, -0.003, rows)], axis=1)
    action = rng.uniform(-0.9, 0.9, (rows, 7))
    end = np.zeros(rows, np.uint8)
    end[-1] = 1
    with h5py.File(path, "w") as opened:
        data = opened.create_group("data")
        data.attrs["problem_info"] = json.dumps({"language_instruction": ["pick up the ", "bowl"]})
        data.attrs["macros_image_convention"] = convention
        for name in ("demo_0", "demo_10", "demo_2"):
            demo = data.create_group(name)
            demo["obs/agentview_rgb"] = upright[:, ::-1] if convention == "opengl" else upright
            demo["obs/ee_pos"], demo["obs/gripper_states"] = pose[:, :3], finger
            demo["obs/ee_ori"] = PANDA.proprio(pose, np.zeros(rows)).astype(np.float64)[:, 3:6]
            if states:
                demo["robot_states"] = np.concatenate([finger, pose], axis=1)
            demo["actions"], demo["rewards"], demo["dones"] = action, end, end
    return upright, pose, finger, action


@pytest.mark.parametrize("convention", ["opengl", "opencv"])
@pytest.mark.parametrize("states", [True, False], ids=["robot_states", "obs alone"])
def test_a_published_file_is_read_by_its_own_rules(tmp_path, convention, states):
    upright, pose, finger, action = published(tmp_path / "bowl_demo.hdf5", convention=convention, states=states)
    found = list(libero_hdf5.read(tmp_path / "bowl_demo.hdf5", task=3))
    assert [number for number, _ in found] == [0, 2, 10]
    episode = found[0][1]
    assert (episode.instruction, episode.task, episode.steps, episode.camera) == ("pick up the bowl", 3, 7, None)
    np.testing.assert_array_equal(episode.frame, upright[:, :, ::-1])  # upright and mirrored
    np.testing.assert_array_equal(episode.command, action[1:].astype(np.float32))  # action j + 1 follows observation j
    np.testing.assert_allclose(episode.pose[:, :3], pose[:, :3], atol=0)
    np.testing.assert_allclose(np.abs(np.sum(episode.pose[:, 3:] * pose[:, 3:], axis=1)), 1, atol=1e-9 if states else 1e-6)
    assert (np.sum(episode.pose[1:, 3:] * episode.pose[:-1, 3:], axis=1) > 0).all()
    np.testing.assert_allclose(episode.gripper, np.clip((finger[:, 0] - finger[:, 1]) / 0.08, 0, 1), atol=1e-15)
    np.testing.assert_array_equal(episode.success, [False] * 7 + [True])


def moved(path, before, told, steps=60, seed=0, noise=1e-4):
    """A file of one demonstration of an arm that moves as it is told, each row with the observation `before` its action or after it.

    Returns the path (steps + 1, 7) and the actions (steps, 7).
    """
    rng = np.random.default_rng(seed)
    smooth = np.stack([np.convolve(rng.normal(size=steps + 7), np.ones(8) / 8, "valid") for _ in range(6)], axis=1)
    action = np.concatenate([np.clip(smooth * [1.5, 1.5, 1.5, 0.3, 0.3, 0.3], -1, 1), np.full((steps, 1), -1.0)], axis=1)
    start = kinematics.rest(torch.tensor([PANDA.example_pose], dtype=torch.float64), torch.tensor([0.85], dtype=torch.float64))
    after, _ = kinematics.follow(start, torch.from_numpy(action[None]), kinematics.ControllerModel.of(PANDA))
    pose = np.concatenate([start.pose.numpy(), after.pose[0].numpy()])
    pose[:, :3] += rng.normal(0, noise, (steps + 1, 3))
    seen = pose[:-1] if before else pose[1:]
    with h5py.File(path, "w") as opened:
        data = opened.create_group("data")
        if told:
            data.attrs["problem_info"] = json.dumps({"language_instruction": "pick up the bowl"})
        demo = data.create_group("demo_0")
        demo["obs/agentview_rgb"] = rng.integers(0, 256, (steps, 4, 4, 3), dtype=np.uint8)
        demo["obs/ee_pos"], demo["obs/gripper_states"] = seen[:, :3], np.tile([0.034, -0.034], (steps, 1))
        demo["obs/ee_ori"] = PANDA.proprio(seen, np.zeros(steps)).astype(np.float64)[:, 3:6]
        demo["robot_states"] = np.concatenate([np.tile([0.034, -0.034], (steps, 1)), seen], axis=1)
        if before:
            demo["robot_states"][0] = [0.01, -0.01, 9, 9, 9, 1, 0, 0, 0]  # of the file that it was made from
        demo["actions"], demo["rewards"] = action, (np.arange(steps) == steps - 1).astype(np.uint8)
    return pose, action


def test_openvlas_regeneration_is_read_by_its_own_rules(tmp_path):
    path = tmp_path / "KITCHEN_SCENE10_pick_up_the_bowl_demo.hdf5"
    pose, action = moved(path, before=True, told=False)
    ((_, episode),) = libero_hdf5.read(path)
    assert (episode.instruction, episode.steps) == ("pick up the bowl", 59)
    np.testing.assert_array_equal(episode.command, action[:-1].astype(np.float32))  # action j follows observation j
    np.testing.assert_array_equal(episode.pose[:, :3], pose[:-1, :3])
    np.testing.assert_allclose(np.abs(np.sum(episode.pose[:, 3:] * pose[:-1, 3:], axis=1)), 1, atol=1e-6)
    np.testing.assert_allclose(episode.gripper, 0.85, atol=1e-12)
    assert np.flatnonzero(episode.success).tolist() == [59]
    with h5py.File(path) as opened:
        np.testing.assert_array_equal(episode.frame, opened["data/demo_0/obs/agentview_rgb"][()][:, ::-1, ::-1])


@pytest.mark.parametrize("seed", range(3))
def test_rows_that_are_paired_the_other_way_are_known_by_their_motion(seed, tmp_path, capsys):
    """Refused where they are said to be of a regeneration; said, once for a file, where a robot that lags by a step may look so."""
    path = tmp_path / "pick_up_the_bowl_demo.hdf5"
    for before in (True, False):
        moved(path, before, told=not before, seed=seed)
        next(libero_hdf5.read(path))
    assert not capsys.readouterr().err
    moved(path, before=False, told=False, seed=seed)
    with pytest.raises(CheckpointError, match=r"bowl_demo\.hdf5: data/demo_0: moves as its actions ask .* after its action, .*: give it that"):
        next(libero_hdf5.read(path))
    moved(path, before=True, told=True, seed=seed)
    for _ in range(2):
        next(libero_hdf5.read(path))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{path}: moves as its actions ask where each row holds the observation before its action")


def test_hdf5_gives_back_what_was_written(tmp_path):
    for episode in (EPISODES[0], EPISODES[1], EPISODES[3]):
        path = tmp_path / f"{episode.content}.hdf5"
        with libero_hdf5.writing(path, episode.instruction) as add:
            add(episode)
        ((_, again),) = libero_hdf5.read(path)
        np.testing.assert_array_max_ulp(again.gripper, episode.gripper, 1)
        assert again.camera is None if episode.camera is None else equal(make(camera=again.camera), make(camera=episode.camera))
        for name in ("frame", "pose", "command", "success"):
            np.testing.assert_array_equal(getattr(again, name), getattr(episode, name))
        for name in ("instruction", "task", "split", "state_index", "source", "versions"):
            assert getattr(again, name) == getattr(episode, name)
        with h5py.File(path) as opened:  # by LIBERO's rules, not ours
            demo = opened["data/demo_0"]
            assert demo["actions"].shape == (episode.steps + 1, 7)
            assert demo["actions"][0].tolist() == [0] * 6 + [episode.command[0, 6]]  # no motion, and the gripper stays as it is asked to be
            flip = slice(None, None, -1 if episode.camera is None or episode.camera.mirrored else 1)
            np.testing.assert_array_equal(demo["obs/agentview_rgb"][()][:, ::-1][:, :, flip], episode.frame)


def test_hdf5_refuses_what_it_cannot_hold(tmp_path):
    path = tmp_path / "a.hdf5"
    with pytest.raises(ValueError, match="one instruction in each file"), libero_hdf5.writing(path, "another") as add:
        add(EPISODES[0])
    with pytest.raises(ValueError, match="no episode"), libero_hdf5.writing(path, "another"):
        pass
    assert not list(tmp_path.iterdir())
    path.write_bytes(b"mine")
    with pytest.raises(ValueError, match="nothing is overwritten"), libero_hdf5.writing(path, "another"):
        pass
    assert path.read_bytes() == b"mine"


def _reshape(name, shape):
    def change(opened):
        del opened[f"data/demo_2/{name}"]
        opened[f"data/demo_2/{name}"] = np.zeros(shape)

    return change


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (_reshape("actions", (8, 6)), "actions"),
        (_reshape("actions", (7, 7)), "want (7"),
        (_reshape("robot_states", (8, 8)), "robot_states"),
        (_reshape("obs/agentview_rgb", (8, 10, 10)), "agentview_rgb"),
        (lambda o: o["data/demo_2/obs"].pop("agentview_rgb"), "agentview_rgb"),
        (lambda o: o["data/demo_2"].pop("rewards"), "rewards"),
    ],
)
def test_a_mis_shaped_hdf5_is_named(tmp_path, change, why):
    path = tmp_path / "bowl_demo.hdf5"
    published(path)
    with h5py.File(path, "a") as opened:
        change(opened)
    with pytest.raises(CheckpointError) as error:
        list(libero_hdf5.read(path))
    words = str(error.value)
    assert str(path) in words
    assert "demo_2" in words
    assert why in words
    assert "again" in words
    assert "\n" not in words


def _cut(opened):
    demo = opened["data/demo_2"]
    for name in ("actions", "rewards", "robot_states", "obs/agentview_rgb"):
        values = demo[name][:1]
        del demo[name]
        demo[name] = values


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (_cut, "rows: 1, want 2 at least"),
        (_reshape("robot_states", (8, 9)), "the length of the quaternion in robot_states of row 0, value 0, is 0, want"),
        (lambda o: o["data/demo_2/robot_states"].__setitem__((5, 2), np.nan), "robot_states of row 5, value 2, is nan, want a finite number"),
        (lambda o: o["data/demo_2/actions"].__setitem__((3, 0), 1.5), "actions of row 3, value 0, is 1.5, want -1 .. 1"),
        (lambda o: o["data/demo_2/actions"].__setitem__((3, 6), np.nan), "actions of row 3, value 6, is nan, want -1 .. 1"),
    ],
)
def test_an_unfit_demonstration_is_named_or_left_out(change, why, tmp_path, capsys):
    path = tmp_path / "bowl_demo.hdf5"
    published(path)
    with h5py.File(path, "a") as opened:
        change(opened)
    with pytest.raises(UnfitError, match=re.escape(f"{path}: data/demo_2: {why}") + ".*; mend it there, or leave .*--leave-out-unfit"):
        list(libero_hdf5.read(path))
    left_out(path, tmp_path, [f"{path}: data/demo_2: {why}"], 2, capsys)


def left_out(source, tmp_path, begin, rest, capsys):
    """The command without the flag names it; with it the `rest` is written, and each that is left out is told as one of `begin`."""
    assert command_line.main([str(source), "--out", str(tmp_path / "a")]) == 2
    said = capsys.readouterr().err
    assert "--leave-out-unfit" in said
    assert "download" not in said
    assert command_line.main([str(source), "--out", str(tmp_path / "a"), "--leave-out-unfit"]) == 0
    said = capsys.readouterr()
    told = json.loads(said.out)
    assert (told["episodes"], len(EpisodeSet(tmp_path / "a"))) == (rest, rest)
    for what, line, words in zip(told["left_out"], said.err.splitlines(), begin, strict=False):
        assert what.startswith(words)
        assert line == f"convert: left out {what}"
    assert len(told["left_out"]) == len(begin)
    assert f"convert: left out {len(begin)} unfit, wrote {rest}\n" in said.err


def test_a_damaged_hdf5_is_named(tmp_path):
    path = tmp_path / "a.hdf5"
    with libero_hdf5.writing(path, EPISODES[0].instruction) as add:
        add(EPISODES[0])
    whole = path.read_bytes()
    with h5py.File(path) as opened:
        at = opened["data/demo_0/robot_states"].id.get_chunk_info(0).byte_offset
    for data in (whole[: len(whole) // 2], whole[:at] + bytes(8) + whole[at + 8 :], b"", b"text"):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"a\.hdf5"):
            list(libero_hdf5.read(path))
    with pytest.raises(CheckpointError, match="no such file"):
        list(libero_hdf5.read(tmp_path / "b.hdf5"))


# No-ops


def test_no_ops_are_those_of_the_published_regeneration():
    still, move = np.zeros(6), np.array([0, 0, 2e-4, 0, 0, 0])
    rows = [(still, -1), (still, 1), (move, -1), (still, -1), (still, 1), (still, 1), (0.4 * move, 1), (still, -1), (move, -1), (still, -1)]
    command = np.array([[*a, g] for a, g in rows])
    # nothing before the first that moves; then a change of the gripper against the last one kept
    assert libero_hdf5.kept(command).tolist() == [False, False, True, False, True, False, False, True, True, False]
    episode = shown(0, 10, command=command.astype(np.float32))
    short = libero_hdf5.without_noops(episode)
    assert short.steps == 4
    np.testing.assert_array_equal(short.frame, episode.frame[[2, 4, 7, 8, 10]])
    np.testing.assert_array_equal(short.command, episode.command[[2, 4, 7, 8]])
    turn = kinematics.continuous(kinematics.exp(np.radians(100) * np.outer(np.arange(11), [0.0, 0.0, 1.0])))  # half a turn and more where some go
    short = libero_hdf5.without_noops(shown(0, 10, command=command.astype(np.float32), pose=np.concatenate([np.zeros((11, 3)), turn], axis=1)))
    assert (np.sum(short.pose[1:, 3:] * short.pose[:-1, 3:], axis=1) > 0).all()
    with pytest.raises(ValueError, match="no command asks for motion"):
        libero_hdf5.without_noops(shown(0, 3, command=np.zeros((3, 7), np.float32)))


# LeRobot


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
@pytest.mark.parametrize("frames", ["png", "h264-lossless", "h264"])
def test_lerobot_gives_back_what_was_written(tmp_path, version, frames):
    assert lerobot.write(tmp_path / "set", EPISODES, version, frames) == len(EPISODES)
    again = list(lerobot.read(tmp_path / "set"))
    assert [number for number, _ in again] == [0, 1, 2, 3]
    for (_, got), want in zip(again, EPISODES, strict=True):
        if frames == "h264":  # lossy: bounded here, where pictures are noise, 4 px a cell
            wrong = got.frame.astype(float) - want.frame
            assert 10 * np.log10(255**2 / np.mean(wrong**2)) > 20
            for t, picture in enumerate(got.frame):  # and each in its place
                assert np.argmin([np.abs(picture.astype(float) - one).mean() for one in want.frame]) == t
            got = type(got)(**{**vars_of(got), "frame": want.frame})
        assert got.content == want.content
    assert not list(tmp_path.glob(".*"))


def vars_of(episode):
    return {name: getattr(episode, name) for name in episode.__dataclass_fields__}


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_the_layout_is_the_documented_one(tmp_path, version):
    """By LeRobot's documentation, not by our reader."""
    root = tmp_path / "set"
    lerobot.write(root, EPISODES, version, "h264")
    info = json.loads((root / "meta/info.json").read_text())
    assert info["codebase_version"] == version
    assert (info["total_episodes"], info["total_frames"], info["total_tasks"], info["fps"]) == (4, 28, 2, 20)
    assert info["splits"] == {"train": "0:4"}
    names = {"timestamp", "frame_index", "episode_index", "index", "task_index", "observation.state", "action", "observation.images.image"}
    assert names <= info["features"].keys()
    if version == "v2.1":
        video = root / "videos/chunk-000/observation.images.image/episode_000002.mp4"
        table = pq.read_table(root / "data/chunk-000/episode_000002.parquet")
        tasks = [json.loads(line) for line in (root / "meta/tasks.jsonl").read_text().splitlines()]
        assert [row["task_index"] for row in tasks] == [0, 1]
        rows = [json.loads(line) for line in (root / "meta/episodes.jsonl").read_text().splitlines()]
        assert [(row["episode_index"], row["length"], row["tasks"]) for row in rows] == [
            (i, e.steps + 1, [e.instruction]) for i, e in enumerate(EPISODES)
        ]
        stats = [json.loads(line) for line in (root / "meta/episodes_stats.jsonl").read_text().splitlines()][2]["stats"]
        frames = 10
    else:
        video = root / "videos/observation.images.image/chunk-000/file-000.mp4"
        whole = pq.read_table(root / "data/chunk-000/file-000.parquet")
        assert whole.column("index").to_pylist() == list(range(28))
        table = whole.slice(12, 10)
        row = pq.read_table(root / "meta/episodes/chunk-000/file-000.parquet").to_pylist()[2]
        assert (row["dataset_from_index"], row["dataset_to_index"], row["length"], row["tasks"]) == (12, 22, 10, [EPISODES[2].instruction])
        assert row["videos/observation.images.image/from_timestamp"] == pytest.approx(12 / 20)
        assert row["videos/observation.images.image/to_timestamp"] == pytest.approx(22 / 20)
        pandas = json.loads(pq.read_schema(root / "meta/tasks.parquet").metadata[b"pandas"])
        assert pandas["index_columns"] == ["task"]
        stats = json.loads((root / "meta/stats.json").read_text())
        frames = 28
    assert table.column("frame_index").to_pylist() == list(range(10))
    assert set(table.column("episode_index").to_pylist()) == {2}
    np.testing.assert_allclose(table.column("timestamp").to_pylist(), np.arange(10) / 20, atol=1e-6)  # [s]
    np.testing.assert_array_equal(table.column("action").to_pylist(), [*EPISODES[2].command, [0] * 6 + [EPISODES[2].command[-1, 6]]])
    state = np.array(table.column("observation.state").to_pylist(), np.float32)
    np.testing.assert_array_equal(state, PANDA.proprio(EPISODES[2].pose, EPISODES[2].gripper))
    with av.open(str(video)) as opened:
        assert sum(1 for _ in opened.decode(video=0)) == frames
        assert opened.streams.video[0].average_rate == 20
    command = np.concatenate([[*e.command, [0] * 6 + [e.command[-1, 6]]] for e in (EPISODES if version == "v3.0" else [EPISODES[2]])])
    np.testing.assert_allclose(stats["action"]["mean"], command.mean(0), atol=1e-6)
    np.testing.assert_allclose(stats["action"]["q99"], np.quantile(command, 0.99, axis=0), atol=1e-6)
    assert np.shape(stats["observation.images.image"]["mean"]) == (3, 1, 1)
    assert 0.3 < np.mean(stats["observation.images.image"]["mean"]) < 0.7


def test_files_of_v3_roll_over(tmp_path, monkeypatch):
    monkeypatch.setattr(lerobot, "_DATA_MB", 0)
    monkeypatch.setattr(lerobot, "_VIDEO_MB", 0)
    lerobot.write(tmp_path / "set", EPISODES, "v3.0", "h264-lossless")
    assert len(list((tmp_path / "set/data/chunk-000").iterdir())) == 4
    assert len(list((tmp_path / "set/videos/observation.images.image/chunk-000").iterdir())) == 4
    assert [episode.content for _, episode in lerobot.read(tmp_path / "set")] == [episode.content for episode in EPISODES]


def test_a_video_that_begins_a_rounding_early_begins_at_its_frame(tmp_path):  # LeRobot adds durations up
    root = tmp_path / "set"
    lerobot.write(root, EPISODES, "v3.0", "h264-lossless")
    path, name = root / "meta/episodes/chunk-000/file-000.parquet", f"videos/{lerobot.VIEW}/from_timestamp"
    rows = pq.read_table(path).to_pylist()
    pq.write_table(pa.Table.from_pylist([{**row, name: max(0.0, row[name] - 1e-7)} for row in rows]), path)
    assert [episode.content for _, episode in lerobot.read(root)] == [episode.content for episode in EPISODES]


def strip_ours(root, version):
    """Take away what only our writer adds: then the set is one that somebody else made."""
    path = root / "meta/info.json"
    info = json.loads(path.read_text())
    info["features"] = {name: one for name, one in info["features"].items() if not name.startswith("worldenv.")}
    info["features"]["observation.images.wrist_image"] = info["features"][lerobot.VIEW]
    path.write_text(json.dumps(info))
    for file in root.glob("data/*/*.parquet"):
        table = pq.read_table(file)
        pq.write_table(table.drop_columns([name for name in table.column_names if name.startswith("worldenv.")]), file)
    if version == "v2.1":
        path = root / "meta/episodes.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps({n: v for n, v in row.items() if n != "worldenv"}) + "\n" for row in rows))
    else:
        path = root / "meta/episodes/chunk-000/file-000.parquet"
        pq.write_table(pq.read_table(path).drop_columns(["worldenv"]), path)


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_a_foreign_set_is_read_by_the_convention_of_libero(tmp_path, version):
    root = tmp_path / "set"
    lerobot.write(root, EPISODES, version, "h264-lossless")
    strip_ours(root, version)
    for (number, got), want in zip(lerobot.read(root), EPISODES, strict=True):
        assert (got.instruction, got.split, got.state_index, got.camera) == (want.instruction, "train", number, None)
        np.testing.assert_array_equal(got.frame, want.frame)
        np.testing.assert_array_equal(got.command, want.command)
        np.testing.assert_allclose(got.pose, want.pose, atol=1e-6)  # float32; the sign too, since angles are not wrapped
        np.testing.assert_allclose(got.gripper, want.gripper, atol=1e-6)
        np.testing.assert_array_equal(got.success[1:], want.success[1:])
    _, first = next(lerobot.read(root, mirrored=False))
    np.testing.assert_array_equal(first.frame, EPISODES[0].frame[:, :, ::-1])


def _foreign(root, **changes):
    """A set of somebody else's, of one episode; `changes` are those of the episode."""
    lerobot.write(root, [shown(0, 6, **changes)], "v2.1", "png")
    strip_ours(root, "v2.1")
    return root


def _with_rows(root, change):
    """`change` gets and gives the columns of a foreign set, as lists."""
    (file,) = root.glob("data/*/*.parquet")
    table = pq.read_table(file).to_pydict()
    change(table)
    pq.write_table(pa.table(table), file)


def _named(root, column, names):
    info = json.loads((root / "meta/info.json").read_text())
    info["features"][column]["names"] = names
    (root / "meta/info.json").write_text(json.dumps(info))


POSE = ["x", "y", "z", "roll", "pitch", "yaw"]


@pytest.mark.parametrize(
    "names",
    [
        None,
        ["state"],
        [f"state_{i}" for i in range(8)],
        {"motors": [*POSE, "gripper", "gripper"]},
        {"motors": ["x", "y", "z", "axis_angle1", "axis_angle2", "axis_angle3", "gripper", "gripper"]},
        {"pose": {name: i for i, name in enumerate(POSE)}, "hand": ["left_finger", "right_finger"]},
        [*(f"eef_{k}_{axis}" for k in ("pos", "axisangle") for axis in "xyz"), "gripper_qpos_0", "gripper_qpos_1"],
        {"motors": ["x", "y", "z", "rx", "ry", "rz", "rw", "gripper"]},  # LeRobot's own, of values that are no quaternions
    ],
    ids=str,
)
def test_states_of_libero_by_any_name_are_read(names, tmp_path):
    root = _foreign(tmp_path / "set")
    _named(root, "observation.state", names)
    ((_, got),) = lerobot.read(root)
    np.testing.assert_allclose(got.pose, shown(0, 6).pose, atol=1e-6)


@pytest.mark.parametrize(
    ("column", "names"),
    [
        ("observation.state", {"motors": [*POSE, "pad", "gripper"]}),  # Euler angles and one opening: Bridge
        ("observation.state", {"motors": [*(f"joint_{i}" for i in range(7)), "gripper"]}),
        ("observation.state", ["x", "y", "z", "qx", "qy", "qz", "qw", "gripper"]),
        ("observation.state", ["y", "x", "z", *POSE[3:], "gripper", "gripper"]),
        ("observation.state", ["joint_positions"]),
        ("action", {"motors": [*(f"motor_{i}" for i in range(6)), "gripper"]}),
        ("action", [*POSE, "pad"]),
    ],
    ids=str,
)
def test_other_states_and_commands_are_refused_by_their_names(column, names, tmp_path):
    root = _foreign(tmp_path / "set")
    _named(root, column, names)
    first = (names["motors"] if isinstance(names, dict) else names)[0]
    with pytest.raises(CheckpointError, match=rf"info\.json: {column} holds {first}.*; want LIBERO's x y z.*write such a column first"):
        list(lerobot.read(root))


def test_quaternions_are_refused_by_their_values(tmp_path):  # of Open-X's sets, some have the very names of LeRobot's LIBERO sets
    root = _foreign(tmp_path / "set")
    _named(root, "observation.state", ["x", "y", "z", "rx", "ry", "rz", "rw", "gripper"])
    _with_rows(root, lambda table: table.update({"observation.state": [[0.4, 0.0, 0.2, 0.0, 0.6, 0.0, 0.8, 0.0]] * 7}))
    with pytest.raises(CheckpointError, match=r"episode_000000\.parquet: episode 0: observation\.state holds unit quaternions"):
        list(lerobot.read(root))


def test_unfit_episodes_of_a_set_are_named_or_left_out(tmp_path, capsys):
    root = tmp_path / "set"
    lerobot.write(root, [shown(i, 6) for i in range(6)], "v2.1", "png")
    strip_ours(root, "v2.1")
    files = [root / f"data/chunk-000/episode_{i:06d}.parquet" for i in range(6)]

    def change(number, name, row, place, value):
        table = pq.read_table(files[number]).to_pydict()
        if place is None:
            table[name][row] = value
        else:
            table[name][row] = [value if i == place else old for i, old in enumerate(table[name][row])]
        pq.write_table(pa.table(table), files[number])

    change(1, "action", 3, 0, 1.3)
    change(1, "action", 6, 0, 9.0)  # of the last row, which belongs to no pair of observations
    change(2, "observation.state", 2, 7, np.nan)
    change(3, "action", 0, 6, np.nan)
    change(4, "task_index", 4, None, 1)
    (root / "meta/tasks.jsonl").write_text("".join(json.dumps({"task_index": i, "task": t}) + "\n" for i, t in enumerate(("open it", "close it"))))
    rows = [json.loads(line) for line in (root / "meta/episodes.jsonl").read_text().splitlines()]
    rows[5]["length"] = 1
    (root / "meta/episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pq.read_table(files[5]).slice(0, 1), files[5])
    why = [
        f"{files[1]}: episode 1: action of row 3, value 0, is 1.3, want -1 .. 1",
        f"{files[2]}: episode 2: observation.state of row 2, value 7, is nan, want a finite number",
        f"{files[3]}: episode 3: action's gripper of row 0, value 0, is nan, want -1 .. 1",
        f"{files[4]}: episode 4: more than one instruction, 'open it', from row 4 on 'close it', want one",
        f"{files[5]}: episode 5: rows: 1, want 2 at least",
    ]
    left_out(root, tmp_path, why, 1, capsys)
    shutil.rmtree(root / "data")
    with pytest.raises(CheckpointError, match=r"episode_000000\.parquet: missing"):  # what is damaged is never left out
        convert(root, "episodes", tmp_path / "b", Choices(leave_out_unfit=True, gripper="open-1"))


def test_nothing_but_unfit_episodes_is_an_error(tmp_path):
    root = _foreign(tmp_path / "set")
    _with_rows(root, lambda table: table.update({"action": [[7.0] * 7] * 7}))
    for to in ("episodes", "lerobot-v3.0"):
        with pytest.raises(ValueError, match=r"set: no episode in it; left out 1, the first: .*is 7, want -1 \.\. 1"):
            convert(root, to, tmp_path / "out", Choices(leave_out_unfit=True, gripper="open-1"))
        assert not (tmp_path / "out").exists()
    still = EpisodeSet(tmp_path / "still")
    still.add(0, shown(0, 3, command=np.zeros((3, 7), np.float32)))
    still.add(1, shown(1, 3))
    still.seal()
    with pytest.raises(UnfitError, match="no command asks for motion"):
        convert(tmp_path / "still", "episodes", tmp_path / "out", Choices(no_noops=True))
    told = convert(tmp_path / "still", "episodes", tmp_path / "out", Choices(no_noops=True, leave_out_unfit=True))
    assert (told["episodes"], len(told["left_out"])) == (1, 1)


def test_success_on_the_last_row_is_of_the_last_observation(tmp_path, capsys):
    cases = (("end", [0] * 6 + [1], [6]), ("early", [0] * 3 + [1] * 4, [4, 5, 6]), ("before it", [0] * 5 + [1, 0], [6]), ("never", [0] * 7, []))
    for name, after, want in cases:
        root = _foreign(tmp_path / name)
        _with_rows(root, lambda table, after=after: table.update({"next.success": list(map(bool, after))}))
        ((_, got),) = lerobot.read(root)
        assert np.flatnonzero(got.success).tolist() == want
        assert command_line.main([str(root), "--out", str(tmp_path / f"{name}-out")]) == 0
        said = capsys.readouterr()
        assert json.loads(said.out)["successes"] == bool(want)
        assert said.err == ("" if want else f"convert: no episode of {root} shows success, and a run takes no demonstration without it\n")


def test_rotations_that_are_wrapped_from_row_to_row_give_one_path(tmp_path):  # other recorders' angles stay below pi
    root = _foreign(tmp_path / "set")
    ((_, want),) = lerobot.read(root)

    def wrap(table):
        for row in table["observation.state"][1::2]:
            row[3:6] = np.array(row[3:6]) * (1 - 2 * np.pi / np.linalg.norm(row[3:6]))

    _with_rows(root, wrap)
    ((_, got),) = lerobot.read(root)
    np.testing.assert_allclose(got.pose, want.pose, atol=1e-5)


def test_grippers_that_do_not_say_what_opens_are_asked_about(tmp_path):
    for i, grips in enumerate(([0, 1, 1, 0, 0, 1], [0.98, 0.98, 0.5, 0.03, 0.03, 0.03], [0] * 6)):
        command = EPISODES[0].command.copy()
        command[:, 6] = grips
        root = _foreign(tmp_path / str(i), command=command)
        with pytest.raises(CheckpointError, match=r"info\.json: no gripper command is below 0.*--gripper open\+1 where 1 opens.*--gripper open-1"):
            list(lerobot.read(root))
        ((_, got),) = lerobot.read(root, gripper="open+1")
        np.testing.assert_allclose(got.command[:, 6], 1 - 2 * np.array(grips), atol=1e-6)
        convert(root, "episodes", tmp_path / f"{i}-out", Choices(gripper="open-1"))  # what the default is elsewhere may be said
        (got,) = EpisodeSet(tmp_path / f"{i}-out")
        np.testing.assert_array_equal(got.command, command)


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_one_command_below_0_tells_of_the_whole_set(version, tmp_path):
    closing, other = (EPISODES[0].command.copy() for _ in range(2))
    closing[:, 6], other[:, 6] = 1, -1
    root = tmp_path / "set"
    lerobot.write(root, [shown(0, 6, command=closing), shown(1, 6, command=other)], version, "png")
    strip_ours(root, version)
    assert [got.command[0, 6] for _, got in lerobot.read(root)] == [1, -1]


def _text(name, change):
    def apply(root):
        path = root / name
        path.write_text(change(path.read_text()))

    return apply


def _bytes(name, change):
    def apply(root):
        path = root / name
        path.write_bytes(change(path.read_bytes()))

    return apply


def half(data):
    return data[: len(data) // 2]


def spoiled(data):
    at = data.index(b"\x15\x06", 300) if b"PAR1" in data[:4] else len(data) // 2
    return data[: at + 40] + bytes(b ^ 0x55 for b in data[at + 40 : at + 60]) + data[at + 60 :]


MP4_3 = "videos/observation.images.image/chunk-000/file-000.mp4"


@pytest.mark.parametrize(
    ("version", "change", "file"),
    [
        ("v3.0", lambda root: (root / "meta/info.json").unlink(), "info.json"),
        ("v3.0", _text("meta/info.json", half), "info.json"),
        ("v3.0", _text("meta/info.json", lambda t: t.replace('"v3.0"', '"v1.6"')), "info.json"),
        ("v3.0", _text("meta/info.json", lambda t: t.replace('"total_episodes": 4', '"total_episodes": 5')), "info.json"),
        ("v3.0", lambda root: (root / "meta/tasks.parquet").unlink(), "tasks.parquet"),
        ("v3.0", _bytes("meta/tasks.parquet", half), "tasks.parquet"),
        ("v3.0", _bytes("meta/episodes/chunk-000/file-000.parquet", half), "episodes/chunk-000/file-000.parquet"),
        ("v3.0", _bytes("data/chunk-000/file-000.parquet", half), "data/chunk-000/file-000.parquet"),
        ("v3.0", _bytes("data/chunk-000/file-000.parquet", spoiled), "data/chunk-000/file-000.parquet"),
        ("v3.0", lambda root: (root / "data/chunk-000/file-000.parquet").unlink(), "data/chunk-000/file-000.parquet"),
        ("v3.0", lambda root: (root / MP4_3).unlink(), MP4_3),
        ("v3.0", _bytes(MP4_3, half), MP4_3),
        ("v2.1", _text("meta/tasks.jsonl", half), "tasks.jsonl"),
        ("v2.1", _text("meta/episodes.jsonl", half), "episodes.jsonl"),
        ("v2.1", _bytes("data/chunk-000/episode_000001.parquet", half), "episode_000001.parquet"),
        ("v2.1", lambda root: (root / "videos/chunk-000/observation.images.image/episode_000003.mp4").unlink(), "episode_000003.mp4"),
    ],
)
def test_a_damaged_set_is_named(tmp_path, version, change, file):
    root = tmp_path / "set"
    lerobot.write(root, EPISODES, version)
    change(root)
    with pytest.raises(CheckpointError) as error:
        list(lerobot.read(root))
    said = str(error.value).split(": ")[0]
    assert said.startswith(str(root))
    assert said.endswith(file)
    assert "\n" not in str(error.value)


def test_mis_shaped_sets_are_named(tmp_path):
    root = tmp_path / "set"
    lerobot.write(root, EPISODES, "v3.0", "png")
    path = root / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(["worldenv.pose"]), path)
    with pytest.raises(CheckpointError, match=r"file-000.parquet.*worldenv.pose"):
        list(lerobot.read(root))
    pq.write_table(table.slice(0, 20), path)
    with pytest.raises(CheckpointError, match=r"episode 2: 8 rows, 10 said"):
        list(lerobot.read(root))
    info = json.loads((root / "meta/info.json").read_text())
    info["features"]["observation.state"]["shape"] = [14]
    (root / "meta/info.json").write_text(json.dumps(info))
    with pytest.raises(CheckpointError, match=r"observation.state has shape \[14\]"):
        list(lerobot.read(root))


def test_a_set_is_written_whole_or_not_at_all(tmp_path):
    odd = shown(5, 3, side=(12, 12))
    with pytest.raises(ValueError, match="episode 1: pictures of 12 x 12"):
        lerobot.write(tmp_path / "set", [EPISODES[0], odd])
    with pytest.raises(ValueError, match="even sides"):
        lerobot.write(tmp_path / "set", [make(0, 3, frame=np.zeros((4, 9, 10, 3), np.uint8), camera=None)], frames="h264")
    with pytest.raises(ValueError, match="set: no episode"):
        lerobot.write(tmp_path / "set", [])
    with pytest.raises(ValueError, match="v3"):
        lerobot.write(tmp_path / "set", EPISODES, "v4.0")
    assert not list(tmp_path.iterdir())
    lerobot.write(tmp_path / "set", EPISODES)
    with pytest.raises(ValueError, match="nothing is overwritten"):
        lerobot.write(tmp_path / "set", EPISODES)


# The command


def test_the_command_goes_all_the_way_round(tmp_path, capsys):
    ours = EpisodeSet(tmp_path / "a")
    for number, episode in enumerate(EPISODES):
        ours.add(number, episode)
    ours.seal()
    steps = [("a", "lerobot-v3.0", "b"), ("b", "lerobot-v2.1", "c"), ("c", "libero-hdf5", "d"), ("d", "episodes", "e")]
    for source, to, out in steps:
        argv = [str(tmp_path / source), "--to", to, "--out", str(tmp_path / out), "--frames", "h264-lossless"]
        assert command_line.main(argv) == 0
        said = json.loads(capsys.readouterr().out)
        assert (said["episodes"], said["steps"]) == (4, 24)
    back = {(e.instruction, e.state_index, e.steps): e for e in EpisodeSet(tmp_path / "e")}
    for episode in EPISODES:
        again = back[episode.instruction, episode.state_index, episode.steps]
        np.testing.assert_array_equal(again.frame, episode.frame)
        np.testing.assert_array_equal(again.pose, episode.pose)
    assert {path.name for path in (tmp_path / "d").iterdir()} == {"open_the_drawer_demo.hdf5", "push_the_größte_puck_demo.hdf5"}
    assert command_line.main([str(tmp_path / "a"), "--out", str(tmp_path / "b")]) == 2
    assert "nothing is overwritten" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert command_line.main([str(tmp_path / "empty"), "--out", str(tmp_path / "f")]) == 2
    assert "no episodes" in capsys.readouterr().err
    assert command_line.main(["--out", str(tmp_path / "f")]) == 2


@pytest.mark.parametrize("to", ["libero-hdf5", "lerobot-v2.1", "lerobot-v3.0"])
def test_another_robots_fingers_are_written_as_they_are_read(to, tmp_path, capsys):  # of another width: openings of 1 came back as 0.667
    EpisodeSet(tmp_path / "a").add(0, shown(0, 6, gripper=np.linspace(0, 1, 7)))
    EpisodeSet(tmp_path / "a").seal()
    for source, kind, out in (("a", to, "b"), ("b", "episodes", "c")):
        if source == "b" and to != "libero-hdf5":
            strip_ours(tmp_path / "b", to.removeprefix("lerobot-"))  # else the opening itself lies beside the fingers
        argv = [str(tmp_path / source), "--to", kind, "--out", str(tmp_path / out), "--robot", "agibot_g1"]
        assert command_line.main(argv) == 0
    (again,) = EpisodeSet(tmp_path / "c")
    np.testing.assert_allclose(again.gripper, np.linspace(0, 1, 7), atol=1e-6)
    assert command_line.main([str(tmp_path / "a"), "--out", str(tmp_path / "d"), "--robot", "agibot_g1"]) == 2
    assert "ours hold openings; leave it out" in capsys.readouterr().err


@pytest.mark.parametrize("to", ["libero-hdf5", "lerobot-v2.1", "lerobot-v3.0"])
def test_whose_commands_they_are_is_kept_and_no_other_robots(to, tmp_path, capsys):
    for number, robot in enumerate(("agibot_g1", "panda")):
        EpisodeSet(tmp_path / "mixed").add(number, shown(number, robot=robot))
    EpisodeSet(tmp_path / "a").add(0, shown(0, 6, gripper=np.linspace(0, 1, 7), robot="agibot_g1"))
    for source, robot in (("a", "panda"), ("mixed", "agibot_g1"), ("mixed", "panda"), ("mixed", None)):
        flags = ["--robot", robot] if robot else []
        assert command_line.main([str(tmp_path / source), "--to", to, "--out", str(tmp_path / "b"), *flags]) == 2
        wrong = ("agibot_g1", "panda") if robot == "panda" else ("panda", "agibot_g1")
        assert f"its commands are those of robot '{wrong[0]}', not of '{wrong[1]}': give the one whose they are" in capsys.readouterr().err
        assert not (tmp_path / "b").exists()
    convert(tmp_path / "a", to, tmp_path / "b")
    convert(tmp_path / "b", "episodes", tmp_path / "c")
    (again,) = EpisodeSet(tmp_path / "c")
    assert again.robot == "agibot_g1"
    np.testing.assert_allclose(again.gripper, np.linspace(0, 1, 7), atol=1e-6)
    if to == "libero-hdf5":
        (file,) = (tmp_path / "b").glob("*.hdf5")
        with h5py.File(file, "r") as opened:
            assert json.loads(opened["data"].attrs["env_args"])["env_name"] == "agibot_g1"
    else:
        assert json.loads((tmp_path / "b" / "meta" / "info.json").read_text())["robot_type"] == "agibot_g1"


def test_a_set_made_elsewhere_is_of_the_robot_that_is_said(tmp_path):
    published(tmp_path / "bowl_demo.hdf5")
    lerobot.write(tmp_path / "set", [shown(0)])
    ((_, ours),) = read_any(tmp_path / "set", Choices())
    assert ours.robot == ""  # written here, by somebody who did not say it
    strip_ours(tmp_path / "set", "v3.0")
    for source in ("set", "bowl_demo.hdf5"):
        for choices, robot in ((Choices(), ""), (Choices(robot="agibot_g1"), "agibot_g1")):
            assert {episode.robot for _, episode in read_any(tmp_path / source, choices)} == {robot}


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("bowl_demo.hdf5 --view observation.images.image", "--view: says how a LeRobot data set is read, and .*bowl_demo.hdf5 is none; leave it out"),
        (". --gripper open+1", "--gripper: says how a LeRobot data set is read"),
        ("bowl_demo.hdf5 --no-mirrored", "--no-mirrored: says how a LeRobot data set is read"),
        ("bowl_demo.hdf5 --frames png", "--frames png: says how a LeRobot data set is written, not episodes; leave it out"),
        ("ours --leave-out-unfit", "--leave-out-unfit: episodes in our format fit, and .*ours holds such; leave it out"),
        ("set --frames png --to libero-hdf5", "--frames png: says how a LeRobot data set is written, not libero-hdf5"),
    ],
)
def test_a_flag_that_means_nothing_is_refused(words, why, tmp_path, capsys):
    published(tmp_path / "bowl_demo.hdf5")
    lerobot.write(tmp_path / "set", EPISODES[:1])
    save(tmp_path / "ours" / "000000.npz", EPISODES[0])
    source, *flags = words.split()
    assert command_line.main([str(tmp_path / source), *flags, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(rf"convert: {why.replace('+', '.')}.*\n", said)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["episodes", "libero-hdf5", "lerobot-v3.0"])
def test_a_conversion_that_fails_leaves_nothing_and_can_be_repeated(to, tmp_path):
    for number in range(3):
        save(tmp_path / "in" / f"{number:06d}.npz", shown(number))
    EpisodeSet(tmp_path / "in").seal()
    last = tmp_path / "in" / "000002.npz"
    whole = last.read_bytes()
    last.write_bytes(whole[:-40])
    with pytest.raises(CheckpointError, match=r"000002\.npz: .*damaged.*; restore it"):
        convert(tmp_path / "in", to, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]
    last.write_bytes(whole)
    assert convert(tmp_path / "in", to, tmp_path / "out")["episodes"] == 3


def test_instructions_that_would_be_one_file_are_named(tmp_path):
    kept = EpisodeSet(tmp_path / "in")
    for number, words in enumerate(("put the cup/mug down", "put the cup mug down")):
        kept.add(number, shown(number, instruction=words))
    with pytest.raises(ValueError, match="'put the cup/mug down' and 'put the cup mug down' would be one file"):
        convert(tmp_path / "in", "libero-hdf5", tmp_path / "out")
    long = EpisodeSet(tmp_path / "long")
    long.add(0, shown(0, instruction="押す" * 150))
    assert convert(tmp_path / "long", "libero-hdf5", tmp_path / "file")["episodes"] == 1


def test_no_noops_through_the_command(tmp_path):
    published(tmp_path / "bowl_demo.hdf5")
    with h5py.File(tmp_path / "bowl_demo.hdf5", "a") as opened:
        opened["data/demo_0/actions"][3] = [0, 0, 0, 0, 0, 0, opened["data/demo_0/actions"][2, 6]]
    convert(tmp_path / "bowl_demo.hdf5", "episodes", tmp_path / "out", Choices(no_noops=True))
    assert [entry.steps for entry in EpisodeSet(tmp_path / "out").entries] == [6, 7, 7]


@pytest.mark.slow
def test_python_m_runs(tmp_path):
    published(tmp_path / "bowl_demo.hdf5")
    argv = [sys.executable, "-m", "worldenv.cli.convert", str(tmp_path), "--to", "lerobot-v3.0", "--out", str(tmp_path / "out")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(done.stdout.splitlines()[-1])["episodes"] == 3


def test_names_that_tell_nothing_are_believed_and_others_are_not():
    like, layout = lerobot._LAYOUTS["observation.state"]
    ours = [f"ee_pos_{i}" for i in range(3)] + [f"ee_ori_{i}" for i in range(3)] + ["gripper_0", "gripper_1"]
    turns = ["x", "y", "z", "rotvec_x", "rot_vec_y", "rotvec_z", "gripper", "gripper"]
    for names in ([f"motor_{i}" for i in range(8)], ["motors"], [*"01234567"], [f"dim_{i}" for i in range(8)], ours, turns):
        lerobot._want_names(Path("info.json"), "state", names, like, layout)
    for names in ([*"xyz", "roll", "pitch", "yaw", "pad", "gripper"], [*(f"joint_{i}" for i in range(7)), "gripper"]):
        with pytest.raises(CheckpointError, match=r"info.json: state holds .*want LIBERO's"):
            lerobot._want_names(Path("info.json"), "state", names, like, layout)

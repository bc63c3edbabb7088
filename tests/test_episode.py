"""Episodes on disk: what is written is read, damage is named, sets survive interruption; and how episodes are collected.

Tried against wrong versions of the code, each found here: a content hash that leaves out an array; zip members with today's date; an index
that is believed without a look at the file; a policy's factor not given back; noise by place in the batch instead of number; a resumed
batch that is cut smaller; a failed demonstration kept.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pusher import Pusher

from worldenv import noise
from worldenv.action_map import rotation
from worldenv.checkpoint import CheckpointError
from worldenv.config import DemosConfig, EnvConfig, ExploreConfig
from worldenv.data import collect
from worldenv.data.episode import Episode, EpisodeSet, load, save
from worldenv.data.scenes import OneScene, Start
from worldenv.envs.experts import tabletop as expert
from worldenv.envs.tabletop import Tabletop
from worldenv.nouns import Camera

CPU = torch.device("cpu")
ARRAYS = ("frame", "pose", "gripper", "command", "success")


def placed(rng, height, width, mirrored=False):
    """A camera anywhere."""
    to_world = np.eye(4)
    to_world[:3, :3] = rotation((turn := rng.normal(size=4)) / np.linalg.norm(turn))
    to_world[:3, 3] = rng.normal(size=3)
    fx, fy, cx, cy = rng.uniform(1, 9, size=4)
    return Camera(np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]]), to_world, height, width, mirrored)


def make(seed=0, steps=6, **changes):
    rng = np.random.default_rng(seed)
    pose = np.concatenate([rng.normal(size=(steps + 1, 3)), np.tile([1.0, 0, 0, 0], (steps + 1, 1))], axis=1)
    parts = {
        "instruction": 'push the "größte" puck', "task": 1, "split": "train", "state_index": 7, "source": "expert",
        "frame": rng.integers(0, 256, (steps + 1, 8, 10, 3), dtype=np.uint8), "pose": pose, "gripper": rng.random(steps + 1),
        "command": rng.uniform(-1, 1, (steps, 7)).astype(np.float32), "success": rng.random(steps + 1) > 0.5,
        "camera": placed(rng, 8, 10), "versions": {"mujoco": "3.8.1"},
    }  # fmt: skip
    return Episode(**{**parts, **changes})


def equal(a, b):
    words = all(getattr(a, n) == getattr(b, n) for n in ("instruction", "task", "split", "state_index", "source", "versions", "robot"))
    arrays = all(np.array_equal(getattr(a, n), getattr(b, n)) and getattr(a, n).dtype == getattr(b, n).dtype for n in ARRAYS)
    matrices = all(np.array_equal(getattr(a.camera, n), getattr(b.camera, n)) for n in ("intrinsics", "camera_to_world"))
    return words and arrays and matrices and all(getattr(a.camera, n) == getattr(b.camera, n) for n in ("height", "width", "mirrored"))


# One file


def test_what_is_written_is_read(tmp_path):
    episode = make()
    save(tmp_path / "e.npz", episode)
    again = load(tmp_path / "e.npz")
    assert equal(again, episode)
    assert again.content == episode.content
    plain = make(camera=None, versions={})
    save(tmp_path / "f.npz", plain)
    assert load(tmp_path / "f.npz").camera is None
    with np.load(tmp_path / "e.npz", allow_pickle=False) as opened:  # numpy alone can read it
        assert np.array_equal(opened["command"], episode.command)


def test_whose_commands_they_are_is_part_of_an_episode_where_it_is_known(tmp_path):
    """Where it is not, an episode is what it was before they said it: the content of those on disk stays."""
    unsaid, said = make(), make(robot="arm")
    save(tmp_path / "unsaid.npz", unsaid)
    save(tmp_path / "said.npz", said)
    assert "robot" not in json.loads(zipfile.ZipFile(tmp_path / "unsaid.npz").read("episode.json"))
    assert (load(tmp_path / "unsaid.npz").robot, load(tmp_path / "said.npz").robot) == ("", "arm")
    assert len({unsaid.content, said.content, make(robot="hand").content}) == 3


def test_equal_episodes_give_equal_bytes(tmp_path, monkeypatch):
    save(tmp_path / "a", make())
    monkeypatch.setattr("time.time", lambda: 2e9)
    monkeypatch.setattr("time.localtime", lambda *_: (2033, 5, 18, 3, 33, 20, 2, 138, 0))
    save(tmp_path / "b", make())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", [*ARRAYS, "instruction", "task", "split", "state_index", "source", "versions", "camera"])
def test_the_content_hash_sees_every_part(name):
    one, two = make(), make(seed=1, instruction="x", task=0, split="test", state_index=8, source="y", versions={"mujoco": "3.8.0"})
    assert dataclasses.replace(one, **{name: getattr(two, name)}).content != one.content


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"command": np.zeros((0, 7), np.float32)}, "command"),
        ({"command": np.zeros((6, 6), np.float32)}, "command"),
        ({"command": np.full((6, 7), 1.5, np.float32)}, "range"),
        ({"command": np.full((6, 7), np.nan, np.float32)}, "finite"),
        ({"command": np.zeros((6, 7))}, "command"),
        ({"frame": np.zeros((6, 8, 8, 3), np.uint8)}, "frame"),
        ({"frame": np.zeros((7, 8, 8), np.uint8)}, "frame"),
        ({"frame": np.zeros((7, 8, 6, 3), np.uint8)}, r"camera: of \d+ x \d+ px, pictures are 6 x 8"),
        ({"camera": Camera(np.diag([np.nan, 9, 1]), np.eye(4), 8, 10)}, "camera: intrinsics or camera_to_world: a value is not finite"),
        ({"camera": Camera(np.diag([9.0, 9, 1]), np.diag([2.0, 2, 2, 1]), 8, 10)}, "camera: camera_to_world: want a rotation"),
        ({"camera": Camera(np.diag([9.0, -9, 1]), np.eye(4), 8, 10)}, "camera: intrinsics: want fx and fy above 0"),
        ({"frame": np.zeros((7, 8, 8, 3), np.float32)}, "frame"),
        ({"gripper": np.full(7, 1.5)}, "range"),
        ({"success": np.zeros(6, bool)}, "success"),
        ({"pose": np.zeros((7, 7))}, "quaternion"),
        ({"pose": np.tile([0, 0, 0, 1.0, 0, 0, 0], (7, 1)) * np.array([1, -1] * 3 + [1])[:, None]}, "sign"),
    ],
)
def test_an_episode_checks_itself(changes, said):
    with pytest.raises(ValueError, match=said):
        make(**changes)


def test_where_the_first_success_is():
    assert make(success=np.array([0, 0, 0, 1, 0, 1, 1], bool)).first_success == 3
    assert make(success=np.zeros(7, bool)).first_success is None


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damage_is_named_or_harmless(tmp_path, data):
    path, broken, episode = tmp_path / "e.npz", tmp_path / "broken.npz", make(steps=2)
    save(path, episode)
    blob = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        blob = blob[: data.draw(st.integers(0, len(blob) - 1))]
    else:
        for _ in range(data.draw(st.integers(1, 3))):
            blob[data.draw(st.integers(0, len(blob) - 1))] ^= data.draw(st.integers(1, 255))
    broken.write_bytes(blob)
    said = None
    try:
        again = load(broken)
    except CheckpointError as error:
        said = str(error)
    assert equal(again, episode) if said is None else (str(broken) in said and "delete it" in said)  # harmless: a date, say


def rewritten(path, change):
    """Write an episode whose members went through `change`: a dict of name -> bytes. Every CRC is right."""
    save(path, make())
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(path, "w") as archive:
        for name, blob in members.items():
            archive.writestr(name, blob)
    return path


def npy(array, allow_pickle=False):
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=allow_pickle)
    return stream.getvalue()


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update({"command.npy": npy(np.zeros((5, 7), np.float32))}),
        lambda m: m.update({"frame.npy": npy(make(seed=1).frame)}),  # another episode's: fits, but is not this one's
        lambda m: m.pop("success.npy"),
        lambda m: m.pop("episode.json"),
        lambda m: m.update({"episode.json": b"[]"}),
        lambda m: m.update({"episode.json": b"\xff"}),
        lambda m: m.update({"episode.json": m["episode.json"].replace(b"worldenv-episode-1", b"worldenv-episode-0")}),
        lambda m: m.update({"episode.json": m["episode.json"].replace(b'"task": 1', b'"task": 2')}),
    ],
    ids=["shape", "swapped", "array gone", "words gone", "not a record", "not text", "format", "words changed"],
)
def test_a_file_that_does_not_fit_together_is_refused(tmp_path, change):
    path = rewritten(tmp_path / "e.npz", change)
    with pytest.raises(CheckpointError, match=r"e\.npz"):
        load(path)


class Trap:
    """Whoever unpickles it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_nothing_is_unpickled(tmp_path):
    sprung = tmp_path / "sprung"
    array = np.array([Trap(sprung)], dtype=object)
    path = rewritten(tmp_path / "e.npz", lambda m: m.update({"pose.npy": npy(array, allow_pickle=True)}))
    with pytest.raises(CheckpointError, match="pickle"):
        load(path)
    assert not sprung.exists()


def test_foreign_and_missing_files_are_refused(tmp_path):
    (tmp_path / "e.npz").write_bytes(b"PK\x03\x04 not a zip")
    np.savez(tmp_path / "f.npz", a=np.zeros(3))
    for name in ("e.npz", "f.npz"):
        with pytest.raises(CheckpointError, match=f"{name}.*delete it"):
            load(tmp_path / name)
    with pytest.raises(CheckpointError, match="no such episode"):
        load(tmp_path / "g.npz")


# A set


def test_a_set_is_what_was_added_sealed_or_not(tmp_path):
    first = EpisodeSet(tmp_path / "s")
    assert len(first) == 0
    for number in (4, 0, 2):
        first.add(number, make(seed=number))
    unsealed = EpisodeSet(tmp_path / "s")  # as after a kill
    first.seal()
    sealed = EpisodeSet(tmp_path / "s")
    assert [entry.number for entry in sealed.entries] == [0, 2, 4]
    assert first.entries == unsealed.entries == sealed.entries
    assert first.fingerprint == unsealed.fingerprint == sealed.fingerprint
    assert all(equal(a, make(seed=n)) for a, n in zip(sealed, (0, 2, 4), strict=True))
    index = json.loads((tmp_path / "s" / "index.json").read_text())
    assert (index["counts"]["episodes"], index["counts"]["steps"], index["fingerprint"]) == (3, 18, sealed.fingerprint)
    sealed.add(7, make(seed=7))  # goes on after a seal
    assert 7 in EpisodeSet(tmp_path / "s")
    assert sealed.fingerprint != first.fingerprint


def test_a_set_refuses_what_is_not_its_own(tmp_path):
    episodes = EpisodeSet(tmp_path)
    episodes.add(0, make(seed=0))
    with pytest.raises(ValueError, match="there already"):
        episodes.add(0, make(seed=1))
    episodes.add(1, make(seed=1))
    episodes.seal()
    save(tmp_path / "000001.npz", make(seed=5))  # exchanged behind its back
    with pytest.raises(CheckpointError, match=r"000001\.npz: not the episode"):
        EpisodeSet(tmp_path).load(1)
    (tmp_path / "000001.npz").unlink()
    with pytest.raises(CheckpointError, match=r"000001\.npz: missing"):
        EpisodeSet(tmp_path)
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"index\.json.*delete it"):
        EpisodeSet(tmp_path)
    (tmp_path / "index.json").unlink()
    assert len(EpisodeSet(tmp_path)) == 1
    (tmp_path / "mine.npz").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"mine\.npz"):
        EpisodeSet(tmp_path)


# Collecting


@pytest.fixture(scope="module")
def env():
    desk = Tabletop(EnvConfig(image=16, train_states=6))
    yield desk
    desk.close()


class Clumsy:
    """The scripted expert, but one that does not move for one task in some states: told by where its puck is."""

    def __init__(self, fails):
        self.fails = fails

    def command(self, env, variation):
        stuck = env.task == 1 and any(np.allclose(env.pucks[0], place, atol=1e-4) for place in self.fails)
        return np.zeros(7, np.float32) if stuck else expert.command(env, variation)


def test_demonstrations_succeed_and_failures_give_way_to_the_next_state(env, tmp_path):
    fails = []
    for index in (0, 2):
        env.begin(1, "train", index)
        fails.append(env.pucks[0])
    metrics = collect.demonstrate(env, Clumsy(fails), expert.VARIATION, 32, DemosConfig(per_task=3), 0, tmp_path)
    episodes = list(EpisodeSet(tmp_path))
    assert [e.task for e in episodes] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [e.state_index for e in episodes] == [0, 1, 2, 1, 3, 4, 0, 1, 2]
    assert (metrics["episodes"], metrics["expert_failures"]) == (9, 2)
    assert all(e.success[-1] and e.steps == 32 and e.split == "train" and e.instruction == env.tasks[e.task] for e in episodes)
    assert len({e.command.tobytes() for e in episodes}) == 9
    with pytest.raises(ValueError, match="blue puck"):
        collect.demonstrate(env, Clumsy(fails), expert.VARIATION, 32, DemosConfig(per_task=5), 0, tmp_path / "more")


def test_demonstrations_end_after_success_where_that_is_asked(env, tmp_path):
    config = DemosConfig(per_task=2, after_success=5)
    first = collect.demonstrate(env, expert, expert.VARIATION, 32, config, 0, tmp_path)
    for entry in EpisodeSet(tmp_path).entries:
        assert entry.steps == min(32, entry.first_success + 5)
    assert {entry.steps for entry in EpisodeSet(tmp_path).entries} != {32}

    class Silent:
        def command(self, env, variation):
            raise AssertionError("shown again")

    assert collect.demonstrate(env, Silent(), expert.VARIATION, 32, config, 0, tmp_path) == first


def test_a_killed_demonstration_goes_on_and_counts_the_same(env, tmp_path):
    fails = []
    for index in (0, 2):
        env.begin(1, "train", index)
        fails.append(env.pucks[0])
    whole = collect.demonstrate(env, Clumsy(fails), expert.VARIATION, 32, DemosConfig(per_task=3), 0, tmp_path / "whole")
    (tmp_path / "cut").mkdir()
    for number in (0, 1, 2, 3, 4):  # a kill within the second task
        (tmp_path / f"cut/{number:06d}.npz").write_bytes((tmp_path / f"whole/{number:06d}.npz").read_bytes())
    assert collect.demonstrate(env, Clumsy(fails), expert.VARIATION, 32, DemosConfig(per_task=3), 0, tmp_path / "cut") == whole


def test_observations_come_before_actions(env, tmp_path):
    collect.demonstrate(env, expert, expert.VARIATION, 32, DemosConfig(per_task=1), 3, tmp_path)
    for episode in EpisodeSet(tmp_path):
        moments = [env.begin(episode.task, "train", episode.state_index), *(env.advance(command) for command in episode.command)]
        assert np.array_equal(episode.frame, np.stack([m.frame for m in moments]))
        assert np.array_equal(episode.pose, np.stack([m.pose for m in moments]))
        assert np.array_equal(episode.success, [m.success for m in moments])
        assert episode.versions["mujoco"]
        assert np.array_equal(episode.camera.camera_to_world, env.camera.camera_to_world)


def explored(env, out, episodes=14, batch=4, policy=None, seed=5):
    config = ExploreConfig(episodes=episodes, factors=(1.0, 3.0), batch=batch)
    collect.explore(env, policy or Pusher(), 16, config, seed, out, CPU)
    return collect.explored(len(env.tasks), config, out)


def test_exploration_does_not_depend_on_batches_and_goes_past_success(env, tmp_path):
    policy = Pusher()
    metrics = explored(env, tmp_path / "a", policy=policy)
    assert policy.scale_factor == 1.0
    assert max(policy.batches) == 4
    assert {1.0, 3.0} == set(policy.factors)
    explored(env, tmp_path / "b", batch=3)
    one, two = EpisodeSet(tmp_path / "a"), EpisodeSet(tmp_path / "b")
    assert one.fingerprint == two.fingerprint
    assert one.fingerprint != explored(env, tmp_path / "c", seed=6)["fingerprint"]
    assert metrics["fingerprint"] == one.fingerprint
    assert metrics["episodes"] == 14
    entries = one.entries
    assert [e.task for e in entries] == [n % 3 for n in range(14)]
    assert {e.steps for e in entries} == {16}
    assert [e.state_index for e in entries] == [n // 6 for n in range(14)]
    for entry in entries:  # the sample that its number, chunk and factor ask for, and no other
        factor, drawn = float(entry.source.split("x")[-1]), one.load(entry.number).command[:, 3:6]
        uniform = np.concatenate([noise.uniform(5, entry.number, chunk, 0, noise.Stream.POLICY, (8, 7)) for chunk in range(2)])
        assert np.array_equal(drawn, (0.3 * factor * (2 * uniform - 1)).astype(np.float32)[:, 3:6])
    assert {entry.source.split("x")[-1] for entry in entries} == {"1", "3"}


def test_exploration_of_nothing_is_refused(env):
    with pytest.raises(ValueError, match=r"explore\.episodes=0"):
        ExploreConfig(episodes=0)
    with pytest.raises(ValueError, match="multiple of the policy's chunk"):
        collect.act_out(OneScene(env), Pusher(), [Start(0, 0, "train", 0)], 12, None, render=False, device=CPU)


class Killed(Exception):
    pass


def test_an_interrupted_exploration_goes_on_and_ends_the_same(env, tmp_path, monkeypatch):
    explored(env, tmp_path / "whole")
    added, add = [], EpisodeSet.add

    def add_some(self, number, episode):
        if len(added) == 6:
            raise Killed
        added.append(number)
        add(self, number, episode)

    class Batchwise(Pusher):
        """Rounds by the size of the batch, as networks do."""

        def act(self, observation, uniform=None):
            chunk = super().act(observation, uniform)
            return dataclasses.replace(chunk, command=(chunk.command * (1 - len(observation.instruction) * 1e-3)))

    explored(env, tmp_path / "batchwise", policy=Batchwise())
    monkeypatch.setattr(EpisodeSet, "add", add_some)
    policy = Batchwise()
    with pytest.raises(Killed):
        explored(env, tmp_path / "cut", policy=policy)
    assert policy.scale_factor == 1.0
    monkeypatch.setattr(EpisodeSet, "add", add)
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cut").glob("*.npz")}
    assert len(kept) == 6
    explored(env, tmp_path / "cut", policy=policy)
    assert EpisodeSet(tmp_path / "cut").fingerprint == EpisodeSet(tmp_path / "batchwise").fingerprint
    assert EpisodeSet(tmp_path / "cut").fingerprint != EpisodeSet(tmp_path / "whole").fingerprint
    assert all((tmp_path / "cut" / name).stat().st_mtime_ns == when for name, when in kept.items())
    asked = len(policy.batches)
    explored(env, tmp_path / "cut", policy=policy)  # all there: nothing is asked again
    assert len(policy.batches) == asked


def _explorer(out, part):
    config = ExploreConfig(episodes=14, factors=(1.0, 3.0), batch=4)
    collect.explore(Tabletop(EnvConfig(image=16, train_states=6)), Pusher(), 16, config, 5, out, CPU, part)


def _writes_on(part, folder):
    (folder / f"{part[0]}.{os.getpid()}").touch()
    time.sleep(300)


_PARENT = """
import functools, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_episode
from worldenv.data import collect
collect.explore_apart(functools.partial(test_episode._writes_on, folder=Path(sys.argv[2])), 2)
"""


def test_processes_that_explore_do_not_outlive_the_one_that_began_them(tmp_path):
    """Nor what kills it: they would write on into a folder that the next command takes for its own."""
    parent = subprocess.Popen([sys.executable, "-c", _PARENT, str(Path(__file__).parent), str(tmp_path)])
    until = time.monotonic() + 120
    while len(begun := list(tmp_path.iterdir())) < 2:
        assert parent.poll() is None
        assert time.monotonic() < until
        time.sleep(0.1)
    parent.kill()
    parent.wait()
    workers = [int(path.suffix[1:]) for path in begun]
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < until, "they work on"
        time.sleep(0.1)


def _dies(part):
    if part[0]:
        raise ValueError(f"part {part[0]} of {part[1]} ended")


@pytest.mark.slow
def test_processes_side_by_side_explore_what_one_does(env, tmp_path):
    whole = explored(env, tmp_path / "whole")
    collect.explore_apart(functools.partial(_explorer, tmp_path / "apart"), 2)
    config = ExploreConfig(episodes=14, factors=(1.0, 3.0), batch=4)
    assert collect.explored(3, config, tmp_path / "apart") == whole
    (tmp_path / "apart/index.json").unlink()
    (tmp_path / "apart/000003.npz").unlink()
    with pytest.raises(ValueError, match="13 episodes, want 14"):
        collect.explored(3, config, tmp_path / "apart")
    with pytest.raises(ValueError, match="part 1 of 2 ended"):
        collect.explore_apart(_dies, 2)

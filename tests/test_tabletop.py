"""The embedded environment: exact kinematics, sane contacts, known camera, fixed states, a predicate that is seen, and Gymnasium's rules.

Tried against wrong versions of the code, each found here: the camera's middle at W / 2 or its axes as OpenGL has them; a capture without
warm start or without the arm; test states numbered like train states; a palm repositioned instead of moved; fingers
without springs (a puck flies); the predicate without its line, height or side; a held finger not reported.
"""

from __future__ import annotations

import gc
import itertools
import os
import subprocess
import sys
import warnings
import weakref

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from worldenv import kinematics, noise
from worldenv.config import EnvConfig
from worldenv.envs import offscreen, tabletop
from worldenv.envs.experts import tabletop as expert
from worldenv.envs.offscreen import NoOpenGL
from worldenv.envs.tabletop import COLOURS, LINE, PUCK_HALF, PUCK_RADIUS, STRIP_END, STRIP_SIDE, Tabletop, initial_state
from worldenv.robots.tabletop import TABLETOP

STILL = np.zeros(7)


@pytest.fixture(scope="module")
def env():
    desk = Tabletop()
    yield desk
    desk.close()


def commands(seed, steps=32):
    """Smooth noise that reaches pucks, turns the gripper and moves its fingers: (steps, 7)."""
    drawn = noise.normal(seed, 0, 0, 0, noise.Stream.SCENE, (steps // 4 + 1, 7))
    return np.clip(np.repeat(drawn, 4, axis=0)[:steps] + np.array([0.6, 0, -0.5, 0, 0, 0, 0]), -1, 1)


def play(env, task, index, actions, render=True):
    return [env.begin(task, "train", index), *(env.advance(action, render=render) for action in actions)]


def same(a, b):
    return all(
        np.array_equal(x.frame, y.frame) and np.array_equal(x.pose, y.pose) and (x.gripper, x.success) == (y.gripper, y.success)
        for x, y in zip(a, b, strict=True)
    )


def drive(env, goal, gripper, steps):
    """Steer to `goal` [m]; the last snapshot, and the largest speed of a puck on the way [m/s]."""
    fastest, now = 0.0, None
    for _ in range(steps):
        way = (np.array(goal) - env.arm.pose[0, :3].numpy()) / 0.05
        before = env.pucks
        now = env.advance(np.array([*np.clip(way, -1, 1), 0, 0, 0, gripper]), render=False)
        fastest = max(fastest, float(np.linalg.norm(env.pucks - before, axis=1).max()) / 0.05)
    return now, fastest


# Determinism


def test_same_commands_give_the_same_bits(env):
    other = Tabletop()
    actions = commands(1)
    first = play(env, 0, 3, actions)
    play(env, 2, 4, commands(2))  # what came before must not matter
    assert same(first, play(env, 0, 3, actions))
    assert same(first, play(other, 0, 3, actions))
    assert not same(first, play(env, 0, 4, actions))
    other.close()


def test_interleaved_episodes_equal_lonely_ones(env):
    runs = [(task, index, commands(seed)) for seed, (task, index) in enumerate([(0, 0), (1, 7), (2, 7)])]
    alone = [play(env, *run) for run in runs]
    together = [[env.begin(task, "train", index)] for task, index, _ in runs]
    captured = []
    for task, index, _ in runs:
        env.begin(task, "train", index)
        captured.append(env.capture())
    for start in range(0, 32, 4):
        for i, (_, _, actions) in enumerate(runs):
            env.restore(captured[i])
            together[i] += [env.advance(action) for action in actions[start : start + 4]]
            captured[i] = env.capture()
    assert all(same(a, b) for a, b in zip(alone, together, strict=True))


def test_a_moment_can_be_gone_back_to_twice(env):
    play(env, 1, 5, commands(3)[:12])
    moment, rest = env.capture(), commands(3)[12:]
    first = [env.advance(action) for action in rest]
    env.restore(moment)
    assert same(first, [env.advance(action) for action in rest])


def test_without_rendering_only_the_frame_stands_still(env):
    actions = commands(4)
    drawn, blind = play(env, 0, 0, actions), play(env, 0, 0, actions, render=False)
    assert all(np.array_equal(moment.frame, drawn[0].frame) for moment in blind)
    assert all(np.array_equal(a.pose, b.pose) and a.success == b.success for a, b in zip(drawn, blind, strict=True))
    assert not np.array_equal(drawn[1].frame, drawn[0].frame)


# Motion


@pytest.mark.parametrize("seed", range(4))
def test_the_gripper_follows_kinematics_exactly(env, seed):
    actions = commands(seed)
    start = env.begin(0, "train", seed)
    state = kinematics.rest(torch.from_numpy(start.pose)[None], torch.tensor([start.gripper]))
    path, _ = kinematics.follow(state, torch.from_numpy(actions)[None], env.controller)
    moments = [env.advance(action, render=False) for action in actions]
    assert np.array_equal(np.stack([m.pose for m in moments]), path.pose[0].numpy())  # whatever it touched on the way
    assert min(np.sum(a.pose[3:] * b.pose[3:]) for a, b in itertools.pairwise(moments)) > 0


def test_what_is_drawn_and_collides_is_where_the_pose_says(env):
    for action in [env.begin(1, "train", 0), *commands(7)][1:]:
        now = env.advance(action)
        turn = np.empty(9)
        tabletop.mujoco.mju_quat2Mat(turn, now.pose[[6, 3, 4, 5]])
        turn = turn.reshape(3, 3)
        left, right = (env.data.geom(int(env.model.body(name).geomadr[0])) for name in ("left", "right"))
        inner = np.linalg.norm(left.xpos - right.xpos) - 2 * tabletop.FINGER_HALF[1]
        middle = turn.T @ ((left.xpos + right.xpos) / 2 - now.pose[:3])
        assert np.allclose(left.xmat.reshape(3, 3), turn, atol=1e-9)
        assert np.allclose(env.data.body("palm").xpos, now.pose[:3], atol=1e-9)  # a substep's delay would be up to 1 mm
        assert inner == pytest.approx(now.gripper * TABLETOP.finger_m, abs=0.002)
        assert np.abs(middle[:2]).max() < 0.002  # along the gripper's z the springs give way


@pytest.mark.parametrize("axis", [3, 4, 5, 6])
def test_rotation_and_opening_are_seen(env, axis):
    env.begin(0, "train", 0)
    env.advance(STILL)
    moment = env.capture()
    action = STILL.copy()
    action[axis] = 1.0
    for _ in range(8):
        moved = env.advance(action).frame
    env.restore(moment)
    for _ in range(8):
        still = env.advance(STILL).frame
    assert (np.abs(moved.astype(int) - still).max(axis=2) > 30).sum() >= 6


def test_a_pushed_puck_is_in_front_of_the_fingers_and_no_faster_than_they_are(env):
    env.begin(1, "train", 0)
    _, y, _ = env.pucks[1]
    drive(env, (-0.1, y, 0.024), 1, 20)
    contact, fastest = PUCK_RADIUS + tabletop.FINGER_HALF[0], 0.0
    for _ in range(20):
        before = env.pucks[1, 0]
        now = env.advance(np.array([1, 0, 0, 0, 0, 0, 1.0]), render=False)
        gap = env.pucks[1, 0] - now.pose[0] - contact
        fastest = max(fastest, (env.pucks[1, 0] - before) / 0.05)
        assert gap > -0.002
    assert now.success
    assert fastest < 0.28  # the gripper's own is 0.25 m/s
    assert gap < 0.01  # from which friction brakes a puck within 8 mm


def test_a_gripped_puck_is_carried_and_put_down(env):
    env.begin(1, "train", 3)
    x, y, _ = env.pucks[1]
    drive(env, (x, y, 0.12), -1, 25)
    drive(env, (x, y, 0.025), -1, 25)
    now, _ = drive(env, (x, y, 0.025), 1, 10)
    assert now.gripper == pytest.approx(2 * PUCK_RADIUS / TABLETOP.finger_m, abs=0.02)  # stopped by the puck, and said so
    drive(env, (x, y, 0.12), 1, 25)
    assert env.pucks[1, 2] > 0.1
    before, puck = env.arm.pose[0, 3:].numpy(), env.data.qpos[[11, 12, 13, 10]].copy()
    for _ in range(8):
        now = env.advance(np.array([0, 0, 0, 0, 0, 1.0, 1]), render=False)
    turned = [kinematics.multiply(q, p * [-1, -1, -1, 1]) for q, p in ((now.pose[3:], before), (env.data.qpos[[11, 12, 13, 10]], puck))]
    gripper_turn, puck_turn = (kinematics.log(q)[2] for q in turned)
    assert gripper_turn > 0.4
    assert puck_turn == pytest.approx(gripper_turn, rel=0.1)  # the fingers take it along
    now, _ = drive(env, (0.09, -0.05, 0.12), 1, 30)
    assert np.allclose(env.pucks[1, :2], [0.09, -0.05], atol=0.01)
    assert not now.success  # over the strip, but in the air
    drive(env, (0.09, -0.05, 0.03), 1, 20)
    now, _ = drive(env, (0.09, -0.05, 0.03), -1, 8)
    assert now.success
    assert env.pucks[1, 2] == pytest.approx(PUCK_HALF, abs=0.001)


@pytest.mark.parametrize("beside", [(0, 0), (0.02, 0), (0, 0.02), (-0.02, 0.01), (-0.035, 0)])
@pytest.mark.parametrize("gripper", [-1, 1])
def test_coming_down_on_a_puck_does_not_fling_it(env, beside, gripper):
    env.begin(1, "train", 3)
    x, y, _ = env.pucks[1] + np.array([*beside, 0])
    drive(env, (x, y, 0.12), gripper, 20)
    _, fastest = drive(env, (x, y, 0.0), gripper, 25)
    assert fastest < 0.3
    assert np.abs(env.pucks[:, 2] - PUCK_HALF).max() < 0.03


def test_pucks_at_rest_stay_where_they_are(env):
    start = env.begin(0, "train", 0)
    before = env.pucks
    moments = [env.advance(STILL, render=False) for _ in range(40)]
    assert np.abs(env.pucks - before).max() < 1e-5
    assert np.array_equal(moments[-1].pose, start.pose)


@pytest.mark.parametrize("command", [np.zeros(6), np.zeros((1, 7)), np.full(7, np.nan)], ids=str)
def test_commands_that_are_none_are_refused(env, command):
    env.begin(0, "train", 0)
    with pytest.raises(ValueError, match="command"):
        env.advance(command)


def test_commands_are_clipped(env):
    env.begin(0, "train", 0)
    moment = env.capture()
    far = env.advance(np.full(7, 50.0))
    env.restore(moment)
    assert same([far], [env.advance(np.ones(7))])


# Camera


@pytest.mark.parametrize("image", [64, 256])
def test_the_camera_says_where_the_gripper_is_seen(image):
    env = Tabletop(EnvConfig(image=image))
    env.begin(0, "train", 0)
    env.model.geom_rgba[:, 3] = 0  # nothing is drawn ...
    tip = int(env.model.body("left").geomadr[0])
    env.model.geom_rgba[tip], env.model.geom_size[tip] = [1, 1, 1, 1], 0.009  # ... but a cube at the pose
    env.model.geom_pos[tip] = [0, 0, -tabletop._FINGER_Z]
    camera, misses = env.camera, []
    for goal in [(-0.1, 0, 0.05), (-0.1, -0.1, 0.05), (-0.1, 0.12, 0.05), (0.09, 0.1, 0.03), (0.09, -0.1, 0.12), (0.0, 0.02, 0.09)]:
        drive(env, goal, 1, 40)
        now = env.advance(np.array([0, 0, 0, 0, 0, 0, 1.0]))
        assert now.gripper == 0
        rows, columns = np.nonzero(now.frame.max(axis=2))
        in_camera = np.linalg.inv(camera.camera_to_world) @ [*now.pose[:3], 1]
        u, v = (camera.intrinsics @ in_camera[:3])[:2] / in_camera[2]
        misses.append([columns.mean() - u, rows.mean() - v])
    env.close()
    assert np.abs(misses).max() < 1.0
    assert np.abs(np.mean(misses, axis=0)).max() < 0.3  # half a pixel, as between pixel corners and centres, would show


# States


def test_states_are_there_in_number_and_no_train_state_is_a_test_state(env):
    assert (env.states("train"), env.states("test")) == (50, 200)
    train = [env.state_hash(0, "train", i) for i in range(50)]
    test = [env.state_hash(0, "test", i) for i in range(200)]
    assert len(set(train + test)) == 250
    assert env.state_hash(2, "test", 7) == test[7]  # tasks share their scenes


def test_states_lie_within_the_jitter_and_pucks_apart():
    config = EnvConfig(jitter_m=0.03)
    states = [initial_state(config, split, i) for split, n in (("train", 50), ("test", 200)) for i in range(n)]
    pucks = np.stack([s.pucks for s in states])
    assert np.abs(pucks - tabletop.NOMINAL).max() <= 0.03
    assert np.ptp(pucks, axis=0).min() > 0.04  # and really spread
    assert np.diff(pucks[..., 1], axis=1).min() > 2 * PUCK_RADIUS
    poses = np.stack([s.pose for s in states])
    assert np.allclose(np.linalg.norm(poses[:, 3:], axis=1), 1, atol=1e-12)
    assert np.ptp(poses, axis=0).min() > 0  # the gripper starts differently, too
    assert len({s.gripper for s in states}) == 250


def test_states_do_not_depend_on_how_many_there_are():
    few, many = EnvConfig(test_states=3), EnvConfig(test_states=500)
    assert initial_state(few, "test", 2).name() == initial_state(many, "test", 2).name()
    assert initial_state(few, "test", 2).name() != initial_state(EnvConfig(jitter_m=0.02), "test", 2).name()


@pytest.mark.parametrize(
    ("task", "split", "index", "said"),
    [
        (3, "train", 0, "3 tasks"),
        (-1, "train", 0, "3 tasks"),
        (0, "train", 50, "50"),
        (0, "test", 200, "200"),
        (0, "test", -1, "200"),
        (0, "val", 0, "split"),
    ],
)
def test_a_state_that_is_not_there_is_named(env, task, split, index, said):
    with pytest.raises(ValueError, match=said):
        env.begin(task, split, index)


def test_too_much_jitter_is_named():
    with pytest.raises(ValueError, match=r"jitter_m=0\.06"):
        initial_state(EnvConfig(jitter_m=0.06), "train", 1)
    assert initial_state(EnvConfig(jitter_m=0.05), "train", 1).pucks[:, 0].max() < LINE


# Success


def put(env, task, place):
    """Begin, and put the task's puck at `place` [m]."""
    env.begin(task, "train", 0)
    env.data.qpos[7 * task : 7 * task + 3] = place
    return env.advance(STILL)


@pytest.mark.parametrize("task", range(3))
def test_success_is_the_tasks_puck_standing_on_the_strip(env, task):
    assert not put(env, task, (LINE - 0.002, 0.1, PUCK_HALF)).success
    assert put(env, task, (LINE + 0.002, 0.1, PUCK_HALF)).success
    assert put(env, task, (STRIP_END - 0.002, 0.1, PUCK_HALF)).success
    assert not put(env, task, (STRIP_END + 0.002, 0.1, PUCK_HALF)).success
    assert put(env, task, (0.1, STRIP_SIDE - 0.002, PUCK_HALF)).success
    assert not put(env, task, (0.1, STRIP_SIDE + 0.002, PUCK_HALF)).success
    assert not put(env, task, (0.1, 0.1, PUCK_HALF + 0.1)).success
    env.begin(task, "train", 0)
    for other in set(range(3)) - {task}:
        env.data.qpos[7 * other] = 0.1
    assert not env.advance(STILL).success


def test_every_success_is_in_the_picture(env):
    camera = env.camera
    for x, y in itertools.product((LINE, STRIP_END), (-STRIP_SIDE, STRIP_SIDE)):
        seen = np.linalg.inv(camera.camera_to_world) @ [x, y, 0, 1]
        u, v = (camera.intrinsics @ seen[:3])[:2] / seen[2]
        assert 0 <= u <= 63
        assert 0 <= v <= 63
    frame = put(env, 0, (0.11, -0.05, PUCK_HALF)).frame.astype(int)
    red = (frame[..., 0] > 150) & (frame[..., 1] < 80)
    assert red.sum() > 60  # about twelve pixels across


# Expert


def test_the_expert_succeeds_from_training_states_within_the_limit(env):
    first = []
    for task, index in itertools.product(range(3), range(50)):
        env.begin(task, "train", index)
        manner = noise.uniform(0, 50 * task + index, 0, 0, noise.Stream.DEMOS, (expert.VARIATION,))
        done = [env.advance(expert.command(env, manner), render=False).success for _ in range(32)]
        first.append(done.index(True) + 1 if True in done else None)
    hits = [step for step in first if step]
    assert len(hits) >= 0.95 * len(first)
    assert 14 <= np.mean(hits) <= 26
    assert max(hits) <= 30


def test_demonstrations_differ(env):
    env.begin(0, "train", 0)
    for _ in range(5):
        env.advance(STILL, render=False)
    drawn = [expert.command(env, noise.uniform(0, n, 0, 0, noise.Stream.DEMOS, (expert.VARIATION,))) for n in range(8)]
    assert len({command.tobytes() for command in drawn}) == 8
    assert np.abs(drawn).max() <= 1


# Gymnasium


def test_gymnasium_finds_nothing_to_say():
    tabletop.register()
    tabletop.register()  # twice is as good as once
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gymnasium.make(tabletop.ID)
        check_env(env.unwrapped)
    first, said = env.reset(seed=5, options={"task": 2, "split": "test", "index": 9})
    assert said["instruction"] == "push the yellow puck onto the green strip"
    assert np.array_equal(first["proprio"], TABLETOP.proprio(*(lambda s: (s.pose, s.gripper))(env.unwrapped.begin(2, "test", 9))))
    env.reset(options={"task": 2, "split": "test", "index": 9})
    for step in range(32):
        seen, reward, terminated, truncated, said = env.step(np.zeros(7, np.float32))
        assert (reward, terminated, truncated) == (0.0, False, step == 31)
        assert env.observation_space.contains(seen)
    assert np.array_equal(env.render(), seen["frame"])
    assert set(COLOURS) == {env.reset(seed=s)[1]["instruction"].split()[2] for s in range(12)}
    with pytest.raises(ValueError, match="unknown options"):
        env.reset(options={"tusk": 1})
    env.close()


def test_observations_stay_in_their_space_at_the_workspaces_corners(env):
    for x, y, z in itertools.product((-1, 1), repeat=3):
        env.reset(options={"task": 0, "index": 0})
        for _ in range(40):
            seen, *_ = env.step(np.array([x, y, z, 0.2 * x, 0.2 * y, 0.2 * z, x], np.float32))
            assert env.observation_space.contains(seen)


def test_before_the_first_episode_there_is_nothing_to_do():
    fresh = Tabletop()
    for act in (lambda: fresh.advance(STILL), fresh.capture, fresh.render):
        with pytest.raises(RuntimeError, match="begin"):
            act()


def test_an_unknown_render_mode_is_refused():
    with pytest.raises(ValueError, match="render_mode"):
        Tabletop(render_mode="human")


# OpenGL


def test_without_opengl_one_line_says_what_to_install(monkeypatch):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(offscreen, "_egl_works", lambda: False)
    monkeypatch.setattr(offscreen, "_osmesa_works", lambda: False)
    blind = Tabletop()
    with pytest.raises(NoOpenGL, match=r"no OpenGL library .*: install libegl1 libgl1-mesa-dri or libosmesa6") as raised:
        blind.begin(0, "train", 0)
    assert "\n" not in str(raised.value)
    monkeypatch.setattr(offscreen, "_osmesa_works", lambda: True)
    assert offscreen.backend() == os.environ["MUJOCO_GL"] == "osmesa"


def test_a_backend_that_does_not_start_is_named(monkeypatch):
    def broken(name):
        raise AttributeError("'NoneType' object has no attribute 'eglQueryDevicesEXT'")

    monkeypatch.setenv("MUJOCO_GL", "egl")
    monkeypatch.setattr(offscreen.importlib, "import_module", lambda name: broken(name) if name.startswith("mujoco") else None)
    with pytest.raises(NoOpenGL, match=r"MUJOCO_GL=egl .*install"):
        Tabletop().begin(0, "train", 0)


def test_whoever_forgets_to_close_leaves_nothing_open(env):
    before = play(env, 0, 0, commands(1)[:3])
    for _ in range(3):
        forgotten = Tabletop()
        forgotten.begin(1, "train", 1)
        eyes = weakref.ref(forgotten._offscreen)
        del forgotten
        gc.collect()
        assert eyes() is None
    assert same(before, play(env, 0, 0, commands(1)[:3]))  # and takes nothing from others


def run(code, **more):
    clean = {key: value for key, value in os.environ.items() if key != "MUJOCO_GL"} | more
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean, timeout=300)


def test_import_registers_nothing_and_opens_nothing():
    done = run(
        "import os, sys, gymnasium, worldenv.envs.tabletop as t\n"
        "assert t.ID not in gymnasium.registry and 'MUJOCO_GL' not in os.environ and 'OpenGL' not in sys.modules"
    )
    assert done.returncode == 0, done.stderr


def test_triton_loads_after_the_first_picture_and_nothing_is_said_at_the_end():
    """Mesa's LLVM, once in the process, crashes a triton that is loaded after it; EGL's own farewell prints an error for open contexts."""
    done = run(
        "import mujoco\nfrom worldenv.envs.tabletop import Tabletop\nenv = Tabletop()\nenv.begin(0, 'train', 0)\n"
        "import torch._dynamo.convert_frame\ntry:\n  import triton\nexcept ImportError: pass\nprint('alive')"
    )
    assert (done.returncode, done.stdout.strip()) == (0, "alive"), done.stderr
    assert "Error" not in done.stderr


def test_a_backend_that_mujoco_itself_refuses_is_named_when_a_picture_is_wanted():
    done = run("from worldenv.envs.tabletop import Tabletop\nenv = Tabletop()\nenv.begin(0, 'train', 0)", MUJOCO_GL="nonsense")
    assert done.returncode == 1
    assert "NoOpenGL: no OpenGL library works here with MUJOCO_GL=nonsense" in done.stderr.splitlines()[-1]

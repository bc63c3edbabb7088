"""Kinematics: the fast path against the law, the fit against known constants, and what a wrong law would do."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from worldenv import _core, kinematics, noise
from worldenv.kinematics import ControllerModel, KinematicState
from worldenv.robots.panda import PANDA
from worldenv.robots.tabletop import TABLETOP

MODEL = ControllerModel(
    gain=(0.099, 0.124, 0.123, 0.115, 0.068, 0.118),
    decay=(0.60, 0.54, 0.54, 0.56, 0.76, 0.53),
    scale=TABLETOP.action_scale,
    gripper_step=0.125,
)
WALLED = dataclasses.replace(MODEL, low=(-0.02, -0.03, -0.01), high=(0.02, 0.01, 0.03))


def draw(number: int, *shape: int) -> np.ndarray:
    """Uniform in -1 .. 1."""
    return 2 * noise.uniform(1, number, 0, 0, noise.Stream.SCENE, shape) - 1


def start(batch: int, number: int = 0) -> KinematicState:
    """Random poses and grippers, at rest."""
    pose = draw(number, batch, 7)
    pose[:, 3:] /= np.linalg.norm(pose[:, 3:], axis=1, keepdims=True)
    return kinematics.rest(torch.from_numpy(pose), torch.from_numpy(0.5 + 0.5 * draw(number + 1, batch)))


def episodes(model: ControllerModel, count: int, steps: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Paths (steps + 1, 7) and commands (steps, 7) that are smooth, as a hand's are."""
    state = start(count)
    raw = draw(7, count, steps + 4, 7)
    command = np.clip(np.mean([raw[:, i : i + steps] for i in range(5)], axis=0) * 1.6, -1, 1)
    path, _ = kinematics.follow(state, torch.from_numpy(command), model)
    return [np.concatenate([a[None], b]) for a, b in zip(state.pose.numpy(), path.pose.numpy(), strict=True)], list(command)


@pytest.mark.parametrize(
    "model",
    [MODEL, WALLED, dataclasses.replace(MODEL, gain=(9.0,) * 6), ControllerModel.of(PANDA)],
    ids=["free", "walled", "huge turns", "coupled"],
)
@pytest.mark.parametrize("shape", [(1, 1), (5, 8), (3, 40), (0, 8), (2, 0)], ids=str)
def test_core_equals_the_law(model: ControllerModel, shape: tuple[int, int]) -> None:
    batch, steps = shape
    state = dataclasses.replace(start(batch), velocity=torch.from_numpy(0.02 * draw(3, batch, 6)))
    command = 1.3 * draw(4, batch, steps, 7)
    command[:, steps // 3 : steps // 2, 3:6] = 0.0
    path, after = kinematics.follow(state, torch.from_numpy(command), model)
    assert path.pose.shape == (batch, steps, 7)
    if not steps:
        torch.testing.assert_close(after.pose, state.pose, rtol=0, atol=0)
        return
    pose, gripper, velocity = kinematics.follow_definition(*(t.numpy() for t in (state.pose, state.gripper, state.velocity)), command, model)
    for got, want in ((path.pose, pose), (path.gripper, gripper), (after.velocity, velocity)):
        np.testing.assert_allclose(got.numpy(), want, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(after.pose.numpy(), path.pose[:, -1].numpy())
    np.testing.assert_array_equal(after.gripper.numpy(), path.gripper[:, -1].numpy())


def test_chunks_go_on_where_the_last_ended() -> None:
    state, command = start(3), torch.from_numpy(draw(5, 3, 16, 7))
    whole, end = kinematics.follow(state, command, MODEL)
    first, middle = kinematics.follow(state, command[:, :8], MODEL)
    second, last = kinematics.follow(middle, command[:, 8:], MODEL)
    assert torch.equal(torch.cat([first.pose, second.pose], dim=1), whole.pose)
    assert torch.equal(last.velocity, end.velocity)


def test_a_batch_is_its_rows_and_the_start_is_left_alone() -> None:
    state, command = start(4), torch.from_numpy(draw(6, 4, 8, 7)).float()
    before = state.pose.clone()
    path, after = kinematics.follow(state, command, MODEL)
    assert torch.equal(state.pose, before)
    for i, one in enumerate(kinematics.unstack(state)):
        alone, end = kinematics.follow(one, command[i : i + 1], MODEL)
        assert torch.equal(alone.pose[0], path.pose[i])
        assert torch.equal(end.velocity[0], after.velocity[i])
    again = kinematics.stack(kinematics.unstack(after))
    assert all(torch.equal(getattr(again, field.name), getattr(after, field.name)) for field in dataclasses.fields(KinematicState))


def test_a_held_command_reaches_the_steady_speed_and_dies_out() -> None:
    """gain / (1 - decay) of what is asked for per step, then a coast of decay / (1 - decay) of the last displacement."""
    state = start(1)
    push = torch.zeros(1, 60, 7, dtype=torch.float64)
    push[..., 0] = 1.0
    path, after = kinematics.follow(state, push, MODEL)
    speed = 0.099 * 0.05 / (1 - 0.60)
    assert float(path.pose[0, -1, 0] - path.pose[0, -2, 0]) == pytest.approx(speed, rel=1e-9)
    coast, _ = kinematics.follow(after, torch.zeros(1, 100, 7), MODEL)
    assert float(coast.pose[0, -1, 0] - path.pose[0, -1, 0]) == pytest.approx(speed * 0.60 / 0.40, rel=1e-9)


def test_gripper_travels_in_eight_steps_and_stays_within() -> None:
    state = kinematics.rest(start(1).pose, torch.ones(1))
    command = torch.zeros(1, 30, 7)
    command[:, :12, 6], command[:, 14:, 6] = 0.2, -1.0
    path, _ = kinematics.follow(state, command, MODEL)
    want = [*np.linspace(0.875, 0, 8), *[0.0] * 6, *np.linspace(0.125, 1, 8), *[1.0] * 8]
    np.testing.assert_allclose(path.gripper[0].numpy(), want, atol=1e-12)


def test_quaternion_sign_is_continuous_through_a_turn_of_pi_and_two() -> None:
    for sign in (1.0, -1.0):
        state = kinematics.rest(torch.tensor([[0, 0, 0, sign, 0, 0, 0]], dtype=torch.float64), torch.ones(1))
        command = torch.zeros(1, 120, 7, dtype=torch.float64)
        command[:, :60, 3], command[:, 60:, 4] = 1.0, -1.0
        path, _ = kinematics.follow(state, command, MODEL)
        poses = torch.cat([state.pose, path.pose[0]])[:, 3:]
        assert float((poses[1:] * poses[:-1]).sum(dim=1).min()) > 0.99
        assert float(poses[:, 3].max()) > 0.5  # the scalar part goes through 0, where a canonical sign would jump
        assert float(poses[:, 3].min()) < -0.5
        np.testing.assert_allclose(poses.norm(dim=1).numpy(), 1.0, atol=1e-15)


def test_turns_are_of_the_world_frame() -> None:
    """A gripper that points down and is told to turn about the world's z does turn about it: its own z is the other way round."""
    down = torch.tensor([[0.3, 0, 0.2, 1, 0, 0, 0]], dtype=torch.float64)
    command = torch.zeros(1, 1, 7, dtype=torch.float64)
    command[..., 5] = 1.0
    path, after = kinematics.follow(kinematics.rest(down, torch.ones(1)), command, MODEL)
    angle = 0.118 * 0.5
    want = [0.3, 0, 0.2, math.cos(angle / 2), math.sin(angle / 2), 0, 0]
    np.testing.assert_allclose(path.pose[0, 0].numpy(), want, atol=1e-15)
    np.testing.assert_allclose(kinematics.displacements(np.stack([down[0].numpy(), after.pose[0].numpy()]))[0], [0, 0, 0, 0, 0, angle], atol=1e-15)


def test_walls_hold_what_moves_outward_and_move_nobody() -> None:
    pose = torch.tensor([[0.019, 0.02, 0.0, 0, 0, 0, 1]], dtype=torch.float64)  # y begins 1 cm outside
    command = torch.zeros(1, 20, 7, dtype=torch.float64)
    command[..., :3] = torch.tensor([1.0, 0.3, -1.0])
    path, after = kinematics.follow(kinematics.rest(pose, torch.ones(1)), command, WALLED)
    assert path.pose[0, :, 0].max() == 0.02
    assert (path.pose[0, :, 1] == 0.02).all()
    assert path.pose[0, :, 2].min() == -0.01
    assert after.velocity[0, 0] == 0.0
    back, _ = kinematics.follow(after, -command, WALLED)
    assert float(back.pose[0, 0, 0]) == pytest.approx(0.02 - 0.099 * 0.05)  # no memory of having pushed
    assert back.pose[0, -1, 1] < 0.01


@pytest.mark.parametrize("noise_m", [0.0, 1e-4])
def test_fit_finds_the_constants(noise_m: float) -> None:
    poses, commands = episodes(MODEL, 24, 60)
    measured = [pose + noise_m * np.pad(draw(20 + i, 61, 3), ((0, 0), (0, 4))) for i, pose in enumerate(poses)]
    model = kinematics.fit(measured, commands, TABLETOP)
    tolerance = 1e-9 if noise_m == 0 else 0.04
    np.testing.assert_allclose(model.gain, MODEL.gain, atol=tolerance)
    np.testing.assert_allclose(model.decay, MODEL.decay, atol=tolerance)
    assert model.fitted == (True,) * 6
    assert (model.low, model.high) == (None, None)


def test_fit_tells_panda_from_the_tabletop() -> None:
    panda = dataclasses.replace(PANDA, coupling=None, holds_turn=False)
    poses, commands = episodes(ControllerModel.of(panda), 6, 40)
    model = kinematics.fit(poses, commands, TABLETOP)
    near, far = (kinematics.drift(one, poses, commands, 8) for one in (model, ControllerModel.of(TABLETOP)))
    assert near.position.mean() < 1e-12
    assert near.angle.mean() < 1e-12
    assert far.position.mean() > 1e-3
    assert far.angle.mean() > 1e-2


def test_fit_keeps_nominal_constants_where_the_data_cannot_tell() -> None:
    poses, commands = episodes(MODEL, 4, 30)
    still = [np.where(np.arange(7) == 1, 0.0, command) for command in commands]
    path, _ = kinematics.follow(start(4), torch.from_numpy(np.stack(still)), MODEL)
    poses = [np.concatenate([a[:1], b]) for a, b in zip(poses, path.pose.numpy(), strict=True)]
    model = kinematics.fit(poses, still, TABLETOP)
    assert model.fitted == (True, False, True, True, True, True)
    assert (model.gain[1], model.decay[1]) == (TABLETOP.gain[1], TABLETOP.decay[1])
    one = kinematics.fit([pose[:2] for pose in poses], [command[:1] for command in still], TABLETOP)
    assert one.fitted == (False,) * 6  # one step from rest says nothing about decay


def test_fit_keeps_nominal_constants_where_both_causes_are_in_step() -> None:
    pose, command = np.zeros((6, 7)), np.zeros((5, 7))
    pose[:, 6] = 1.0
    pose[1:, 0] = np.cumsum(0.01 * 0.8 ** np.arange(5))
    command[1:, 0] = 0.8 ** np.arange(4)  # always in proportion to the last displacement
    model = kinematics.fit([pose], [command], TABLETOP)
    assert not model.fitted[0]
    assert (model.gain[0], model.decay[0]) == (TABLETOP.gain[0], TABLETOP.decay[0])


def test_fit_counts_commands_as_the_controller_does() -> None:
    """What asks for more than 1 was executed as 1."""
    command = 1.6 * draw(12, 4, 40, 7)
    state = start(4)
    path, _ = kinematics.follow(state, torch.from_numpy(command), MODEL)
    poses = [np.concatenate([a[None], b]) for a, b in zip(state.pose.numpy(), path.pose.numpy(), strict=True)]
    np.testing.assert_allclose(kinematics.fit(poses, list(command), TABLETOP).gain, MODEL.gain, atol=1e-9)


def test_fit_stays_within_bounds() -> None:
    """Motion that grows, and motion that turns back: the best decay within bounds, and the best gain for it."""
    command = np.zeros((12, 7))
    command[:, 0] = np.sin(np.arange(12.0))
    for decay, bound in ((1.3, 0.99), (-0.4, 0.0)):
        d = np.zeros(13)
        for t in range(12):
            d[t + 1] = 0.1 * 0.05 * command[t, 0] + decay * d[t]
        pose = np.zeros((13, 7))
        pose[:, 0], pose[:, 6] = np.cumsum(d), 1.0
        model = kinematics.fit([pose], [command], TABLETOP)
        assert model.decay[0] == bound
        errors = [np.square(d[1:] - g * 0.05 * command[:, 0] - bound * d[:-1]).sum() for g in (model.gain[0] + e for e in (-1e-4, 0.0, 1e-4))]
        assert errors[1] == min(errors)


def test_fit_gives_the_workspace_of_the_data() -> None:
    poses, commands = episodes(MODEL, 4, 30)
    model = kinematics.fit(poses, commands, TABLETOP, margin_m=0.01)
    places = np.concatenate([pose[:, :3] for pose in poses])
    np.testing.assert_allclose(model.low, places.min(axis=0) - 0.01)
    np.testing.assert_allclose(model.high, places.max(axis=0) + 0.01)
    assert ControllerModel.from_dict(json.loads(json.dumps(model.to_dict()))) == model


def right_multiplied(pose: np.ndarray, command: np.ndarray) -> np.ndarray:
    turned = [pose]
    d = np.zeros((len(pose), 6))
    for action in np.moveaxis(command, 1, 0):
        d = np.array(MODEL.gain) * np.array(MODEL.scale) * action[:, :6] + np.array(MODEL.decay) * d
        last = turned[-1]
        turned.append(np.concatenate([last[:, :3] + d[:, :3], kinematics.multiply(last[:, 3:], kinematics.exp(d[:, 3:]))], axis=1))
    return np.stack(turned[1:], axis=1)


def without_lag(pose: np.ndarray, command: np.ndarray) -> np.ndarray:
    ideal = dataclasses.replace(MODEL, gain=(1.0,) * 6, decay=(0.0,) * 6)
    return kinematics.follow_definition(pose, np.ones(len(pose)), np.zeros((len(pose), 6)), command, ideal)[0]


def best_single_gain(pose: np.ndarray, command: np.ndarray) -> np.ndarray:
    steady = tuple(gain / (1 - decay) for gain, decay in zip(MODEL.gain, MODEL.decay, strict=True))
    ideal = dataclasses.replace(MODEL, gain=steady, decay=(0.0,) * 6)
    return kinematics.follow_definition(pose, np.ones(len(pose)), np.zeros((len(pose), 6)), command, ideal)[0]


def canonical_sign(pose: np.ndarray, command: np.ndarray) -> np.ndarray:
    path = kinematics.follow_definition(pose, np.ones(len(pose)), np.zeros((len(pose), 6)), command, MODEL)[0]
    path[..., 3:] *= np.where(path[..., 6:] < 0, -1.0, 1.0)
    return path


@pytest.mark.parametrize("wrong", [right_multiplied, without_lag, best_single_gain, canonical_sign])
def test_wrong_laws_are_far_off(wrong: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> None:
    """The tolerance of the tests above can tell: each of these is off by a million times as much."""
    state, command = start(6), draw(9, 6, 8, 7)
    path, _ = kinematics.follow(state, torch.from_numpy(command), MODEL)
    assert np.abs(path.pose.numpy() - wrong(state.pose.numpy(), command)).max() > 1e-3


def test_drift_grows_with_a_wrong_model_and_needs_long_enough_episodes() -> None:
    poses, commands = episodes(MODEL, 4, 20)
    wrong = dataclasses.replace(MODEL, gain=tuple(1.1 * gain for gain in MODEL.gain))
    near, far = kinematics.drift(wrong, poses, commands, 1), kinematics.drift(wrong, poses, commands, 16)
    assert 0 < near.position.mean() < far.position.mean()
    assert 0 < near.angle.mean() < far.angle.mean()
    path, _ = kinematics.follow(kinematics.rest(torch.from_numpy(poses[0][:1]), torch.ones(1)), torch.from_numpy(commands[0][None]), wrong)
    whole = kinematics.drift(wrong, poses[:1], commands[:1], 20)
    assert whole.position.mean() == pytest.approx(float((path.pose[0, -1, :3] - torch.from_numpy(poses[0][-1, :3])).norm()))
    for horizon in (0, 21):
        with pytest.raises(ValueError, match="horizon"):
            kinematics.drift(wrong, poses, commands, horizon)


def test_exp_and_log_are_inverse() -> None:
    rotation = np.concatenate([draw(11, 50, 3) * 1.8, np.zeros((1, 3)), [[1e-9, 0, 0], [0, 0, math.pi - 1e-9]]])
    np.testing.assert_allclose(kinematics.log(kinematics.exp(rotation)), rotation, atol=1e-14)
    np.testing.assert_allclose(kinematics.log(-kinematics.exp(rotation)), rotation, atol=1e-14)


def test_bad_input_is_named() -> None:
    state = start(2)
    with pytest.raises(ValueError, match=r"follow: command \(2, 8, 6\)"):
        kinematics.follow(state, torch.zeros(2, 8, 6), MODEL)
    with pytest.raises(ValueError, match=r"follow: command \(3, 8, 7\)"):
        kinematics.follow(state, torch.zeros(3, 8, 7), MODEL)
    with pytest.raises(ValueError, match="not finite"):
        kinematics.follow(state, torch.full((2, 1, 7), float("nan")), MODEL)
    with pytest.raises(ValueError, match="unit quaternions"):
        kinematics.rest(torch.ones(2, 7), torch.ones(2))
    with pytest.raises(ValueError, match=r"rest: pose \(7,\)"):
        kinematics.rest(torch.ones(7), torch.ones(1))
    with pytest.raises(ValueError, match="KinematicState"):
        dataclasses.replace(state, velocity=state.velocity[:1])
    with pytest.raises(ValueError, match="float64"):
        dataclasses.replace(state, pose=state.pose.float())
    poses, commands = episodes(MODEL, 2, 10)
    for bad_poses, bad_commands in (
        ([], []),
        (poses, commands[:1]),
        ([p[1:] for p in poses], commands),
        (poses, [c[:, :6] for c in commands]),
    ):
        with pytest.raises(ValueError, match="kinematics"):
            kinematics.fit(bad_poses, bad_commands, TABLETOP)
    with pytest.raises(ValueError, match=r"episode 1 .*not finite"):
        kinematics.fit([poses[0], poses[1] * np.inf], commands, TABLETOP)


@pytest.mark.parametrize(
    "change",
    [
        {"gain": (0.1,) * 5},
        {"decay": (1.0,) * 6},
        {"decay": (-0.1,) * 6},
        {"gripper_step": float("nan")},
        {"coupling": ((0.0,) * 17,) * 6},
        {"coupling": ((0.0,) * 12 + (0.7,) * 6,) * 6},
        {"coupling": ((float("nan"),) * 18,) * 6},
        {"gripper_shares": (0.8, 0.3)},
        {"gripper_shares": (0.0, 0.0)},
        {"low": (0.0, 0.0, 0.0), "high": (1.0, -1.0, 1.0)},
    ],
    ids=str,
)
def test_a_model_that_cannot_be_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="ControllerModel"):
        dataclasses.replace(MODEL, **change)


def test_a_stored_model_of_another_version_is_refused() -> None:
    plain = MODEL.to_dict()
    with pytest.raises(ValueError, match="decay"):
        ControllerModel.from_dict({name: value for name, value in plain.items() if name != "decay"})
    with pytest.raises(ValueError, match="lag"):
        ControllerModel.from_dict(plain | {"lag": 1})


def test_core_refuses_what_does_not_fit() -> None:
    constants = [*(np.zeros(6) for _ in range(3)), 0.1, np.zeros(3), np.zeros(3), np.zeros((6, 18)), True, 1.0, 0.0]
    model = _core.ControllerModel(*constants)
    state, command = np.zeros((2, 25)), np.zeros((2, 3, 7))
    _core.follow(state, command, model)
    for bad in ((state[:1], command), (np.zeros((2, 24)), command), (np.zeros(25), command), (state, command[0]), (state, np.zeros((2, 3, 6)))):
        with pytest.raises(ValueError, match="want"):
            _core.follow(*bad, model)
    for bad in ((state.astype(np.float32), command), (np.zeros((2, 50))[:, ::2], command), (state, command.astype(np.float32))):
        with pytest.raises(TypeError):
            _core.follow(*bad, model)
    for where, wrong in ((0, np.zeros(5)), (1, np.zeros(7)), (2, np.zeros((6, 1))), (4, np.zeros(2)), (5, np.zeros(4)), (6, np.zeros((18, 6)))):
        with pytest.raises(ValueError, match="want"):
            _core.ControllerModel(*(wrong if i == where else one for i, one in enumerate(constants)))


COUPLED = ControllerModel.of(PANDA)


def test_old_laws_are_special_cases_to_the_last_bit() -> None:
    """Nothing coupled is the same as coupled by zeros, and a gripper that is its ramp is the old gripper."""
    state, command = start(4), torch.from_numpy(1.3 * draw(31, 4, 30, 7))
    zeros = dataclasses.replace(MODEL, coupling=((0.0,) * 18,) * 6)
    (path, end), (again, last) = (kinematics.follow(state, command, one) for one in (MODEL, zeros))
    assert torch.equal(path.pose, again.pose)
    assert torch.equal(end.velocity, last.velocity)
    ramp = state.gripper.clone()
    for t in range(30):
        ramp = (ramp - 0.125 * torch.sign(command[:, t, 6])).clamp(0, 1)
        assert torch.equal(path.gripper[:, t], ramp)


def test_a_turn_is_held_where_nothing_is_asked() -> None:
    state = start(2)
    command = torch.zeros(2, 200, 7, dtype=torch.float64)
    command[:, 0, 3:6] = torch.tensor([0.6, -0.4, 0.2])
    aim = kinematics.multiply(kinematics.exp(0.5 * np.array([0.6, -0.4, 0.2])), state.pose[:, 3:].numpy())
    path, _ = kinematics.follow(state, command, COUPLED)
    left = kinematics.log(kinematics.multiply(aim, path.pose[:, -1, 3:].numpy() * np.array([-1.0, -1, -1, 1])))
    assert np.abs(left).max() < 2e-3
    command[:, 1:, 3] = 1e-9  # all but nothing is something: it asks for where the gripper is now
    path, _ = kinematics.follow(state, command, COUPLED)
    left = kinematics.log(kinematics.multiply(aim, path.pose[:, -1, 3:].numpy() * np.array([-1.0, -1, -1, 1])))
    assert np.linalg.norm(left, axis=1).min() > 0.1


def test_fit_finds_a_coupled_controller() -> None:
    """From other constants, on enough motion; what was not moved stays the robot's own."""
    rng = np.random.default_rng(3)
    other = np.array(PANDA.coupling) + 0.02 * rng.normal(size=(6, 18))
    truth = dataclasses.replace(COUPLED, coupling=tuple(map(tuple, other.tolist())))
    poses, commands = episodes(truth, 40, 60)
    for command in commands[::3]:
        command[20:40, 3:6] = 0.0
    state = kinematics.rest(torch.from_numpy(np.stack([pose[0] for pose in poses])), torch.ones(40))
    path, _ = kinematics.follow(state, torch.from_numpy(np.stack(commands)), truth)
    poses = [np.concatenate([a[:1], b]) for a, b in zip(poses, path.pose.numpy(), strict=True)]
    model = kinematics.fit(poses, commands, PANDA)
    assert model.fitted == (True,) * 6
    near, far = (kinematics.drift(one, poses, commands, 8) for one in (model, COUPLED))
    assert near.position.mean() < 0.1 * far.position.mean()
    assert near.angle.mean() < 0.1 * far.angle.mean()
    assert ControllerModel.from_dict(json.loads(json.dumps(model.to_dict()))) == model
    little = kinematics.fit([pose[:2] for pose in poses[:1]], [command[:1] for command in commands[:1]], PANDA)
    assert little.fitted == (False,) * 6
    np.testing.assert_allclose(little.coupling, PANDA.coupling, atol=0.1)


def test_a_coupled_fit_that_never_comes_to_rest_says_that_it_is_none() -> None:
    """Motion that grows by itself, 15 % a step, is no controller's."""
    poses, commands = [], []
    for number in range(30):
        moved = 1e-3 * draw(number, 1, 3) * 1.15 ** np.arange(24)[:, None]
        place = np.concatenate([np.zeros((1, 3)), np.cumsum(moved, axis=0)])
        poses.append(np.concatenate([place, np.tile([1.0, 0, 0, 0], (25, 1))], axis=1))
        commands.append(1e-3 * draw(100 + number, 24, 7))
    got = kinematics.fit(poses, commands, PANDA)
    assert (got.coupling, got.gain, got.decay) == (PANDA.coupling, PANDA.gain, PANDA.decay)
    assert not any(got.fitted)


def test_drift_knows_what_was_asked_before() -> None:
    """Of the model that made the path, no error: after holding a turn, with a gripper under way, from every state."""
    poses, commands = episodes(COUPLED, 6, 40)
    for command in commands:
        command[10:25, 3:6] = 0.0
    state = kinematics.rest(torch.from_numpy(np.stack([pose[0] for pose in poses])), torch.full((6,), 0.9, dtype=torch.float64))
    path, _ = kinematics.follow(state, torch.from_numpy(np.stack(commands)), COUPLED)
    poses = [np.concatenate([a[:1], b]) for a, b in zip(poses, path.pose.numpy(), strict=True)]
    grippers = [np.append(0.9, opening) for opening in path.gripper.numpy()]
    errors = kinematics.drift(COUPLED, poses, commands, 8)
    assert errors.position.max() < 1e-12
    assert errors.angle.max() < 1e-12
    assert kinematics.drift(COUPLED, poses, commands, 1, grippers).gripper.max() < 1e-12
    forgetful = dataclasses.replace(COUPLED, holds_turn=False)
    assert kinematics.drift(forgetful, poses, commands, 8).angle.max() > 1e-3


def test_models_from_before_axes_were_coupled_are_read() -> None:
    plain = MODEL.to_dict()
    for name in ("coupling", "holds_turn", "gripper_shares"):
        del plain[name]
    assert ControllerModel.from_dict(plain) == MODEL

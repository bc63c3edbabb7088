"""How commands become motion: a controller that lags, fitted to the world that it moves.

A command does not move the gripper by what it asks for. Per axis i of x y z [m] and rx ry rz [rad], in the world frame,

    asked_t = scale_i * clip(a_t, -1, 1)          d_t = gain_i * asked_t + decay_i * d_{t-1},    d_{-1} = 0 at rest
    x_t = x_{t-1} + d_t[:3], held by the workspace          q_t = exp(d_t[3:]) * q_{t-1}: turned in the world frame, from the left
    ramp_t = clip(ramp_{t-1} - gripper_step * sign(a_t[6]), 0, 1)          gripper_t = ramp_t

A robot whose axes move each other and whose fingers lag behind (LIBERO's Panda) has three terms more:

    d_t += C [asked_t, asked_{t-1}, d_{t-1}]: a matrix `coupling` (6, 18), what single axes leave out
    asked_t[3:] = log(aim * q_{t-1}^-1) where a_t[3:6] is exactly 0, else aim = exp(asked_t[3:]) * q_{t-1}: a turn, once asked for, is held
    gripper_t = c_0 ramp_t + c_1 ramp_{t-1} + (1 - c_0 - c_1) gripper_{t-1},    (c_0, c_1) = `gripper_shares`

Source: OSC_POSE (Khatib 1987) with a critically damped PD law, as LIBERO runs it. Between control steps such a law is linear in what is asked
for and in position and velocity; the velocity, which is not seen, is told by the last displacement and what was asked for last. Position and
rotation are decoupled by separate mass matrices, which leaves them coupled through the arm. The constants are fitted; how far off they are in
LIBERO is in docs/kinematics.md.

The sign of a quaternion is continuous in time and never made canonical: policies read rotation vectors whose angle passes pi.
`follow` runs in csrc/core/kinematics; `follow_definition` is the same in plain Python and judges it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from worldenv import _core
from worldenv.nouns import ACTION_DIM, StatePath
from worldenv.robots.contract import Robot, Six

Doubles = NDArray[np.float64]
Coupling = tuple[tuple[float, ...], ...]
"""(6, 18): on what is asked for now, what was asked for last, and the last displacement, six each."""
_AXES = ("x", "y", "z", "rx", "ry", "rz")
_CONJUGATE = np.array([-1.0, -1.0, -1.0, 1.0])
_LARGEST_DECAY = 0.99  # a fit beyond it is noise, and rollouts would never come to rest
_PRIOR_TRANSITIONS = 20  # how many the robot's own constants count for, where axes are coupled
_ENOUGH = 200  # transitions, for 18 constants an axis


@dataclass(frozen=True)
class ControllerModel:
    """Constants of the law above. `of(robot)` has a robot's nominal ones, `fit` a world's own."""

    gain: Six
    """Share of the asked displacement that is made in the same step."""
    decay: Six
    """Share of the last displacement that goes on."""
    scale: Six
    """Displacement that a command of 1 asks for [m, rad]."""
    gripper_step: float
    """Travel of the gripper per step [share of full travel]."""
    low: tuple[float, float, float] | None = None
    """Lower corner of the workspace [m]; no limit if None. Whoever starts outside is not moved by it."""
    high: tuple[float, float, float] | None = None
    """Upper corner of the workspace [m]; no limit if None."""
    fitted: tuple[bool, bool, bool, bool, bool, bool] = (False,) * 6
    """Axes whose constants come from data; the others are the robot's nominal ones."""
    coupling: Coupling | None = None
    """(6, 18): what the axes do to each other, see the law; None where they do nothing."""
    holds_turn: bool = False
    """A rotation command of exactly 0 asks for the orientation that was asked for before."""
    gripper_shares: tuple[float, float] = (1.0, 0.0)
    """Shares of the ramp, now and one step ago, in the gripper's opening; the rest is its last opening."""

    def __post_init__(self) -> None:
        for name in ("gain", "decay", "scale", "fitted"):
            if len(getattr(self, name)) != 6:
                raise ValueError(f"ControllerModel: {name}={getattr(self, name)}, want one value for each of {' '.join(_AXES)}")
        if self.coupling is not None and [len(row) for row in self.coupling] != [18] * 6:
            raise ValueError("ControllerModel: coupling: want 6 rows of 18 numbers")
        coupling = [number for row in self.coupling or () for number in row]
        numbers = [*self.gain, *self.decay, *self.scale, self.gripper_step, *(self.low or ()), *(self.high or ()), *coupling]
        if not all(math.isfinite(number) for number in numbers):
            raise ValueError(f"ControllerModel: {self}: want finite numbers")
        if not all(0.0 <= decay < 1.0 for decay in self.decay):
            raise ValueError(f"ControllerModel: decay={self.decay}, want each in [0, 1): at 1 the arm never stops")
        if self.coupling is not None and (most := _spectral_radius(self)) >= 1.0:
            raise ValueError(f"ControllerModel: coupling: a displacement goes on by a factor of {most:.3g}, want below 1: the arm never stops")
        now, last = self.gripper_shares
        if not (now >= 0.0 and last >= 0.0 and 0.0 < now + last <= 1.0):
            raise ValueError(f"ControllerModel: gripper_shares={self.gripper_shares}, want two shares, 0 or more, with a sum in (0, 1]")
        if self.low and self.high and not all(a <= b for a, b in zip(self.low, self.high, strict=True)):
            raise ValueError(f"ControllerModel: low={self.low}, high={self.high}: want low <= high on each axis")

    @classmethod
    def of(cls, robot: Robot) -> ControllerModel:
        """The robot's nominal constants, without a workspace."""
        return cls(
            gain=robot.gain, decay=robot.decay, scale=robot.action_scale, gripper_step=robot.gripper_step,
            coupling=robot.coupling, holds_turn=robot.holds_turn, gripper_shares=robot.gripper_shares,
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values, kept with checkpoints."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> ControllerModel:
        """The inverse of `to_dict`; ValueError where a field is missing or unknown. Models from before axes were coupled are read as they were."""
        names = {field.name for field in fields(cls)}
        if odd := sorted((plain.keys() ^ names) - ({"coupling", "holds_turn", "gripper_shares"} - plain.keys())):
            raise ValueError(f"controller model: fields {odd} are missing or unknown; fit it again")
        return cls(**{name: _frozen(value) for name, value in plain.items()})


def _frozen(value: Any) -> Any:
    """Lists as tuples, all the way down."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _spectral_radius(model: ControllerModel) -> float:
    """By how much a displacement may go on from one step to the next, nothing being asked for."""
    return float(np.abs(np.linalg.eigvals(np.diag(model.decay) + np.array(model.coupling)[:, 12:])).max())


@dataclass(frozen=True)
class KinematicState:
    """Where B grippers are, and how they move; all tensors float64, on one device."""

    pose: torch.Tensor
    """(B, 7): x y z [m], unit quaternion x y z w."""
    gripper: torch.Tensor
    """(B,): 0 shut .. 1 open."""
    velocity: torch.Tensor
    """(B, 6): displacement of the last control step [m, rad], world frame."""
    asked: torch.Tensor
    """(B, 6): what the last command asked for [m, rad], world frame."""
    aim: torch.Tensor
    """(B, 4): the orientation that was asked for last, unit quaternion x y z w."""
    ramp: torch.Tensor
    """(B,): what the gripper follows, 0 shut .. 1 open."""

    def __post_init__(self) -> None:
        batch = self.gripper.shape[0] if self.gripper.dim() == 1 else -1
        for name, shape in (("pose", (batch, 7)), ("gripper", (batch,)), *((n, (batch, w)) for n, w in _MEMORY), ("ramp", (batch,))):
            part = getattr(self, name)
            if tuple(part.shape) != shape or part.dtype != torch.float64:
                want = ", ".join(("B", *map(str, shape[1:])))
                raise ValueError(f"KinematicState: {name} {tuple(part.shape)} {part.dtype}, want ({want}) float64")


_MEMORY = (("velocity", 6), ("asked", 6), ("aim", 4))
_STATE = ("pose", "gripper", *(name for name, _ in _MEMORY), "ramp")  # in the order in which csrc/core keeps them


def rest(pose: torch.Tensor, gripper: torch.Tensor) -> KinematicState:
    """B grippers that do not move, at `pose` (B, 7) [m, unit quaternion xyzw] and `gripper` (B,); the pose is normalised."""
    pose, gripper = pose.double(), gripper.double()
    if pose.dim() != 2 or pose.shape[1] != 7:
        raise ValueError(f"rest: pose {tuple(pose.shape)}, want (B, 7)")
    length = pose[:, 3:].norm(dim=1, keepdim=True)
    if not bool(((length - 1.0).abs() < 1e-3).all()):
        raise ValueError(f"rest: quaternions of length {length.min():.6g} .. {length.max():.6g}, want unit quaternions x y z w")
    turn, still = pose[:, 3:] / length, pose.new_zeros(pose.shape[0], 6)
    return KinematicState(torch.cat([pose[:, :3], turn], dim=1), gripper, still, still, turn, gripper)


def stack(states: Sequence[KinematicState]) -> KinematicState:
    """Several states as one, in order."""
    return KinematicState(*(torch.cat([getattr(state, name) for state in states]) for name in _STATE))


def unstack(state: KinematicState) -> list[KinematicState]:
    """The B states of `state`, each with B = 1."""
    return [KinematicState(*(getattr(state, name)[i : i + 1] for name in _STATE)) for i in range(state.pose.shape[0])]


def _plain(tensor: torch.Tensor) -> Doubles:
    array: Doubles = tensor.detach().to("cpu", torch.float64).contiguous().numpy()
    return array


def _limits(model: ControllerModel) -> tuple[Doubles, Doubles]:
    """Corners of the workspace (3,), infinite where there is no limit."""
    return np.array(model.low or (-math.inf,) * 3, np.float64), np.array(model.high or (math.inf,) * 3, np.float64)


def follow(state: KinematicState, command: torch.Tensor, model: ControllerModel) -> tuple[StatePath, KinematicState]:
    """Where K commands take B grippers, and how they are moving then.

    `command` (B, K, 7) in [-1, 1] (clipped), gripper -1 open .. +1 close, any float dtype and device. The path and the new state are on
    the state's device; `state` is not changed. ValueError where shapes do not fit or a command is not finite.
    """
    if command.dim() != 3 or command.shape[0] != state.pose.shape[0] or command.shape[2] != ACTION_DIM:
        raise ValueError(f"follow: command {tuple(command.shape)}, want ({state.pose.shape[0]}, K, {ACTION_DIM})")
    commands = _plain(command)
    if not np.isfinite(commands).all():
        raise ValueError("follow: a command is not finite: the policy that gave it has diverged")
    device = state.pose.device
    parts = [_plain(getattr(state, name)) for name in _STATE]
    rows = np.concatenate([part if part.ndim == 2 else part[:, None] for part in parts], axis=1)
    path_pose, path_gripper, end = (torch.from_numpy(array).to(device) for array in _core.follow(rows, commands, _constants(model)))
    return StatePath(path_pose, path_gripper), KinematicState(*_parts(end))


@functools.lru_cache(maxsize=64)
def _constants(model: ControllerModel) -> Any:
    """The model as csrc/core has it."""
    gain, decay, scale = (np.array(values, np.float64) for values in (model.gain, model.decay, model.scale))
    coupling = None if model.coupling is None else np.array(model.coupling, np.float64)
    return _core.ControllerModel(gain, decay, scale, model.gripper_step, *_limits(model), coupling, model.holds_turn, *model.gripper_shares)


def _parts(rows: torch.Tensor) -> list[torch.Tensor]:
    """The fields of a state, in their order, of its rows (B, 25)."""
    pose, gripper, velocity, asked, aim, ramp = (part.contiguous() for part in torch.split(rows, [7, 1, 6, 6, 4, 1], dim=1))
    return [pose, gripper[:, 0], velocity, asked, aim, ramp[:, 0]]


def multiply(p: Doubles, q: Doubles) -> Doubles:
    """Product of quaternions (..., 4) x y z w: first `q` turns, then `p`."""
    x, y, z, w = (p[..., i] for i in range(4))
    a, b, c, d = (q[..., i] for i in range(4))
    parts = [
        w * a + x * d + y * c - z * b,
        w * b - x * c + y * d + z * a,
        w * c + x * b - y * a + z * d,
        w * d - x * a - y * b - z * c,
    ]
    return np.stack(parts, axis=-1)


def exp(rotation: Doubles) -> Doubles:
    """Unit quaternions (..., 4) of rotation vectors (..., 3) [rad], w >= 0: the shorter way to the same rotation."""
    angle = np.linalg.norm(rotation, axis=-1, keepdims=True)
    factor = np.where(angle > 1e-8, np.sin(0.5 * angle) / np.where(angle > 1e-8, angle, 1.0), 0.5)
    quaternion = np.concatenate([factor * rotation, np.cos(0.5 * angle)], axis=-1)
    return np.where(quaternion[..., 3:] < 0.0, -quaternion, quaternion)


def log(quaternion: Doubles) -> Doubles:
    """Rotation vectors (..., 3) [rad] of unit quaternions (..., 4), of length at most pi."""
    quaternion = np.where(quaternion[..., 3:] < 0.0, -quaternion, quaternion)
    length = np.linalg.norm(quaternion[..., :3], axis=-1, keepdims=True)
    angle = 2.0 * np.arctan2(length, quaternion[..., 3:])
    rotation: Doubles = quaternion[..., :3] * np.where(length > 0.0, angle / np.where(length > 0.0, length, 1.0), 2.0)
    return rotation


def unwrapped(rotation: Doubles) -> Doubles:
    """Unit quaternions (..., 4) of rotation vectors (..., 3) [rad] whose angle is 2 acos(w), not wrapped: the sign that they were made from."""
    angle = np.linalg.norm(rotation, axis=-1, keepdims=True)
    factor = np.divide(np.sin(0.5 * angle), angle, out=np.full_like(angle, 0.5), where=angle > 0.0)
    return np.concatenate([factor * rotation, np.cos(0.5 * angle)], axis=-1)


def continuous(quaternion: Doubles) -> Doubles:
    """Unit quaternions of a path (T, 4), normalised only where need be, each with the sign that is nearer to the one before; the first keeps its own.

    Raises ValueError where a length is not 1 to within 1e-3.
    """
    length = np.linalg.norm(quaternion, axis=1, keepdims=True)
    if (np.abs(length - 1.0) > 1e-3).any():
        raise ValueError(f"quaternions of length {length.min():.6g} .. {length.max():.6g}, want unit quaternions x y z w")
    quaternion = np.where(np.abs(length - 1.0) > 1e-9, quaternion / length, quaternion)
    turned = np.sum(quaternion[1:] * quaternion[:-1], axis=1) < 0.0
    sign = np.where(np.concatenate([[False], np.cumsum(turned) % 2 == 1]), -1.0, 1.0)
    return quaternion * sign[:, None]


def follow_definition(
    pose: Doubles, gripper: Doubles, velocity: Doubles, command: Doubles, model: ControllerModel
) -> tuple[Doubles, Doubles, Doubles]:
    """The law at the head of this file, step by step, of arms that were asked for nothing before: path pose (B, K, 7), path gripper (B, K), last
    velocity (B, 6).
    """
    gain, decay, scale = (np.array(values) for values in (model.gain, model.decay, model.scale))
    coupling = np.zeros((6, 18)) if model.coupling is None else np.array(model.coupling)
    low, high = _limits(model)
    now, last = model.gripper_shares
    poses, grippers = [], []
    asked_last, aim, ramp = np.zeros_like(velocity), pose[:, 3:], gripper
    for action in np.moveaxis(command, 1, 0):
        asked = scale * np.clip(action[:, :6], -1.0, 1.0)
        if model.holds_turn:
            still = (action[:, 3:6] == 0.0).all(axis=1, keepdims=True)
            aim = np.where(still, aim, multiply(exp(asked[:, 3:]), pose[:, 3:]))
            asked[:, 3:] = np.where(still, log(multiply(aim, pose[:, 3:] * _CONJUGATE)), asked[:, 3:])
        displacement = gain * asked + decay * velocity + np.concatenate([asked, asked_last, velocity], axis=1) @ coupling.T
        asked_last = asked
        before = pose[:, :3]
        position = np.clip(before + displacement[:, :3], np.minimum(low, before), np.maximum(high, before))
        quaternion = multiply(exp(displacement[:, 3:]), pose[:, 3:])
        velocity = np.concatenate([position - before, displacement[:, 3:]], axis=1)
        pose = np.concatenate([position, quaternion / np.linalg.norm(quaternion, axis=1, keepdims=True)], axis=1)
        ramp_last, ramp = ramp, np.clip(ramp - model.gripper_step * np.sign(action[:, 6]), 0.0, 1.0)
        gripper = now * ramp + last * ramp_last + (1.0 - now - last) * gripper
        poses.append(pose)
        grippers.append(gripper)
    return np.stack(poses, axis=1), np.stack(grippers, axis=1), velocity


def displacements(pose: Doubles) -> Doubles:
    """What each control step moved: (T, 6) [m, rad], world frame, of a path `pose` (T + 1, 7)."""
    turned = multiply(pose[1:, 3:], pose[:-1, 3:] * _CONJUGATE)
    return np.concatenate([np.diff(pose[:, :3], axis=0), log(turned)], axis=1)


def _check_episodes(poses: Sequence[Doubles], commands: Sequence[NDArray[np.floating[Any]]]) -> None:
    if not poses or len(poses) != len(commands):
        raise ValueError(f"kinematics: {len(poses)} paths and {len(commands)} command lists: want as many, and at least one")
    for i, (pose, command) in enumerate(zip(poses, commands, strict=True)):
        steps = len(command)
        if pose.shape != (steps + 1, 7) or command.shape != (steps, ACTION_DIM):
            raise ValueError(f"kinematics: episode {i}: pose {pose.shape}, command {command.shape}: want (T + 1, 7) and (T, {ACTION_DIM})")
        if not (np.isfinite(pose).all() and np.isfinite(command).all()):
            raise ValueError(f"kinematics: episode {i} holds a number that is not finite; record it again")


def fit(
    poses: Sequence[Doubles], commands: Sequence[NDArray[np.floating[Any]]], robot: Robot, margin_m: float | None = None
) -> ControllerModel:
    """Gain and decay of each axis by least squares over all transitions, 0 <= decay <= 0.99.

    Episode i is `poses[i]` (T + 1, 7) and `commands[i]` (T, 7), pose t before command t, at rest at its start. An axis that the data
    cannot tell (never commanded, or its two causes in step with each other) keeps the robot's nominal constants; `fitted` says which.
    Of a robot whose axes are coupled, gain, decay and coupling are fitted together, by ridge regression towards the robot's own: what the data
    does not tell stays as it is, and all axes count as fitted from `_ENOUGH` transitions on. With `margin_m`, the workspace is the range of the
    data and that much more [m]. ValueError where shapes do not fit.
    """
    _check_episodes(poses, commands)
    gain, decay, fitted = list(robot.gain), list(robot.decay), [False] * 6
    moved = [displacements(pose) for pose in poses]
    asked = np.concatenate([np.clip(command[:, :6], -1.0, 1.0) for command in commands]) * np.array(robot.action_scale)
    last = np.concatenate([np.concatenate([np.zeros((1, 6)), d[:-1]]) for d in moved])
    result = np.concatenate(moved)
    coupling = robot.coupling
    if coupling is not None:
        gain, decay, coupling = _fit_coupled(poses, commands, moved, robot)
        fitted = [len(result) >= _ENOUGH and coupling != robot.coupling] * 6
    for i in range(6) if coupling is None else ():
        causes = np.stack([asked[:, i], last[:, i]], axis=1)
        size = np.linalg.norm(causes, axis=0)
        if len(result) < 2 or not size.all() or np.linalg.svd(causes / size, compute_uv=False)[-1] < 1e-6:
            continue
        (gain[i], decay[i]), *_ = np.linalg.lstsq(causes, result[:, i], rcond=None)
        if not 0.0 <= decay[i] <= _LARGEST_DECAY:  # of a parabola in two unknowns, the least value within bounds lies on the bound
            decay[i] = min(max(decay[i], 0.0), _LARGEST_DECAY)
            gain[i] = asked[:, i] @ (result[:, i] - decay[i] * last[:, i]) / size[0] ** 2
        fitted[i] = True
    low = high = None
    if margin_m is not None:
        places = np.concatenate([pose[:, :3] for pose in poses])
        low, high = places.min(axis=0) - margin_m, places.max(axis=0) + margin_m
    return ControllerModel.from_dict(
        {
            "gain": [float(g) for g in gain],
            "decay": [float(d) for d in decay],
            "scale": list(robot.action_scale),
            "gripper_step": robot.gripper_step,
            "low": None if low is None else low.tolist(),
            "high": None if high is None else high.tolist(),
            "fitted": fitted,
            "coupling": None if coupling is None else [list(row) for row in coupling],
            "holds_turn": robot.holds_turn,
            "gripper_shares": list(robot.gripper_shares),
        }
    )


def _remembered(pose: Doubles, command: NDArray[np.floating[Any]], model: ControllerModel) -> tuple[Doubles, Doubles]:
    """What each of T commands asked for (T, 6), and the orientation that was asked for before it (T, 4), on a path that is known."""
    asked, aims = np.clip(command[:, :6], -1.0, 1.0) * np.array(model.scale), np.empty((len(command), 4))
    aim = pose[0, 3:]
    for t, turn in enumerate(pose[:-1, 3:]):
        aims[t] = aim
        if model.holds_turn and not command[t, 3:6].any():
            asked[t, 3:] = log(multiply(aim, turn * _CONJUGATE))
        else:
            aim = multiply(exp(asked[t, 3:]), turn)
    return asked, aims


def _causes(pose: Doubles, command: NDArray[np.floating[Any]], moved: Doubles, model: ControllerModel) -> Doubles:
    """(T, 18): what is asked for, was asked for last, and moved last."""
    asked, _ = _remembered(pose, command, model)
    still = np.zeros((1, 6))
    return np.concatenate([asked, np.concatenate([still, asked[:-1]]), np.concatenate([still, moved[:-1]])], axis=1)


def _fit_coupled(
    poses: Sequence[Doubles], commands: Sequence[NDArray[np.floating[Any]]], moved: Sequence[Doubles], robot: Robot
) -> tuple[list[float], list[float], Coupling]:
    """Gain, decay and coupling by ridge regression towards the robot's own; these, where the fit would never come to rest."""
    model = ControllerModel.of(robot)
    causes = np.concatenate([_causes(*one, model) for one in zip(poses, commands, moved, strict=True)])
    nominal = np.array(robot.coupling) + np.hstack([np.diag(robot.gain), np.zeros((6, 6)), np.diag(robot.decay)])
    left = np.concatenate(moved) - causes @ nominal.T
    # as much as so many transitions in which every cause has its usual size
    ridge = _PRIOR_TRANSITIONS * np.tile(np.square(0.2 * np.array(robot.action_scale)), 3) * np.repeat([1.0, 1.0, 0.05], 6)
    found = nominal + np.linalg.solve(causes.T @ causes + np.diag(ridge), causes.T @ left).T
    if np.abs(np.linalg.eigvals(found[:, 12:])).max() > _LARGEST_DECAY:
        found = nominal
    gain, decay = np.diag(found[:, :6]), np.clip(np.diag(found[:, 12:]), 0.0, _LARGEST_DECAY)
    rest_of = found - np.hstack([np.diag(gain), np.zeros((6, 6)), np.diag(decay)])
    return gain.tolist(), decay.tolist(), _frozen(rest_of.tolist())


@dataclass(frozen=True)
class Errors:
    """How far off a model is after a number of open-loop steps, from every state of some episodes."""

    position: Doubles
    """(n,) [m]."""
    angle: Doubles
    """(n,) [rad]."""
    gripper: Doubles
    """(n,) [share of full travel]; of episodes without a gripper, 0."""


def drift(
    model: ControllerModel,
    poses: Sequence[Doubles],
    commands: Sequence[NDArray[np.floating[Any]]],
    horizon: int,
    grippers: Sequence[Doubles] | None = None,
) -> Errors:
    """Errors after `horizon` steps from every state of the episodes, the last displacement and what was asked for before being known.

    `grippers` are openings (T + 1,), the ramp beginning at rest. ValueError if no episode is that long.
    """
    _check_episodes(poses, commands)
    starts, windows, ends, openings = [], [], [], []
    for i, (pose, command) in enumerate(zip(poses, commands, strict=True)):
        count = len(command) - horizon + 1
        if horizon < 1 or count < 1:
            continue
        opening = np.zeros(len(pose)) if grippers is None else grippers[i]
        asked, aims = _remembered(pose, command, model)
        still = np.zeros((1, 6))
        memory = {
            "pose": pose[:count], "gripper": opening[:count], "velocity": np.concatenate([still, displacements(pose)])[:count],
            "asked": np.concatenate([still, asked])[:count], "aim": aims[:count], "ramp": _ramp(opening[0], command, model)[:count],
        }  # fmt: skip
        starts.append(KinematicState(*(torch.from_numpy(np.array(memory[name], np.float64)) for name in _STATE)))
        windows += [command[t : t + horizon] for t in range(count)]
        ends.append(pose[horizon:])
        openings.append(opening[horizon:])
    if not starts:
        raise ValueError(f"drift: horizon={horizon}, longest episode {max(map(len, commands))} steps: want 1 .. that many")
    _, after = follow(stack(starts), torch.from_numpy(np.stack(windows)), model)
    got, want = after.pose.numpy(), np.concatenate(ends)
    position = np.linalg.norm(got[:, :3] - want[:, :3], axis=1)
    angle = np.linalg.norm(log(multiply(got[:, 3:], want[:, 3:] * _CONJUGATE)), axis=1)
    off = np.abs(after.gripper.numpy() - np.concatenate(openings)) if grippers is not None else np.zeros(len(position))
    return Errors(position, angle, off)


def _ramp(opening: float, command: NDArray[np.floating[Any]], model: ControllerModel) -> Doubles:
    """What the gripper follows (T + 1,), from `opening` at rest."""
    ramp = [float(opening)]
    for grip in command[:, 6]:
        ramp.append(min(max(ramp[-1] - model.gripper_step * float(np.sign(grip)), 0.0), 1.0))
    return np.array(ramp)

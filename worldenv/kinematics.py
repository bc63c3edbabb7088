"""How commands become motion: a controller that lags, fitted to the world that it moves.

A command does not move the gripper by what it asks for. Per axis i of x y z [m] and rx ry rz [rad], in the world frame,

    asked_t = scale_i * clip(a_t, -1, 1)          d_t = gain_i * asked_t + decay_i * d_{t-1},    d_{-1} = 0 at rest
    x_t = x_{t-1} + d_t[:3], held by the workspace          q_t = exp(d_t[3:]) * q_{t-1}: turned in the world frame, from the left
    gripper_t = clip(gripper_{t-1} - gripper_step * sign(a_t[6]), 0, 1)

Source: OSC_POSE (Khatib 1987) with a critically damped PD law, as LIBERO runs it, is of this form between control steps; the two
constants per axis are fitted. In LIBERO, `x + 0.05 a` is 26 mm off after one step and this 0.8 mm; after 8 steps 170 and 6 mm.

The sign of a quaternion is continuous in time and never made canonical: policies read rotation vectors whose angle passes pi.
`follow` runs in csrc/core/kinematics; `follow_definition` is the same in plain Python and judges it.
"""

from __future__ import annotations

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
_AXES = ("x", "y", "z", "rx", "ry", "rz")
_LARGEST_DECAY = 0.99  # a fit beyond it is noise, and rollouts would never come to rest


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

    def __post_init__(self) -> None:
        for name in ("gain", "decay", "scale", "fitted"):
            if len(getattr(self, name)) != 6:
                raise ValueError(f"ControllerModel: {name}={getattr(self, name)}, want one value for each of {' '.join(_AXES)}")
        numbers = [*self.gain, *self.decay, *self.scale, self.gripper_step, *(self.low or ()), *(self.high or ())]
        if not all(math.isfinite(number) for number in numbers):
            raise ValueError(f"ControllerModel: {self}: want finite numbers")
        if not all(0.0 <= decay < 1.0 for decay in self.decay):
            raise ValueError(f"ControllerModel: decay={self.decay}, want each in [0, 1): at 1 the arm never stops")
        if self.low and self.high and not all(a <= b for a, b in zip(self.low, self.high, strict=True)):
            raise ValueError(f"ControllerModel: low={self.low}, high={self.high}: want low <= high on each axis")

    @classmethod
    def of(cls, robot: Robot) -> ControllerModel:
        """The robot's nominal constants, without a workspace."""
        return cls(gain=robot.gain, decay=robot.decay, scale=robot.action_scale, gripper_step=robot.gripper_step)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values, kept with checkpoints."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> ControllerModel:
        """The inverse of `to_dict`; ValueError where a field is missing or unknown."""
        names = {field.name for field in fields(cls)}
        if plain.keys() != names:
            odd = sorted(plain.keys() ^ names)
            raise ValueError(f"controller model: fields {odd} are missing or unknown; fit it again")
        values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in plain.items()}
        return cls(**values)


@dataclass(frozen=True)
class KinematicState:
    """Where B grippers are, and how they move; all tensors float64, on one device."""

    pose: torch.Tensor
    """(B, 7): x y z [m], unit quaternion x y z w."""
    gripper: torch.Tensor
    """(B,): 0 shut .. 1 open."""
    velocity: torch.Tensor
    """(B, 6): displacement of the last control step [m, rad], world frame."""

    def __post_init__(self) -> None:
        batch = self.gripper.shape[0] if self.gripper.dim() == 1 else -1
        shapes = tuple(self.pose.shape), tuple(self.gripper.shape), tuple(self.velocity.shape)
        if shapes != ((batch, 7), (batch,), (batch, 6)):
            raise ValueError("KinematicState: pose {}, gripper {}, velocity {}: want (B, 7), (B,), (B, 6)".format(*shapes))
        if {self.pose.dtype, self.gripper.dtype, self.velocity.dtype} != {torch.float64}:
            raise ValueError(f"KinematicState: {self.pose.dtype}, {self.gripper.dtype}, {self.velocity.dtype}: want float64")


def rest(pose: torch.Tensor, gripper: torch.Tensor) -> KinematicState:
    """B grippers that do not move, at `pose` (B, 7) [m, unit quaternion xyzw] and `gripper` (B,); the pose is normalised."""
    pose, gripper = pose.double(), gripper.double()
    if pose.dim() != 2 or pose.shape[1] != 7:
        raise ValueError(f"rest: pose {tuple(pose.shape)}, want (B, 7)")
    length = pose[:, 3:].norm(dim=1, keepdim=True)
    if not bool(((length - 1.0).abs() < 1e-3).all()):
        raise ValueError(f"rest: quaternions of length {length.min():.6g} .. {length.max():.6g}, want unit quaternions x y z w")
    return KinematicState(torch.cat([pose[:, :3], pose[:, 3:] / length], dim=1), gripper, pose.new_zeros(pose.shape[0], 6))


def stack(states: Sequence[KinematicState]) -> KinematicState:
    """Several states as one, in order."""
    return KinematicState(
        torch.cat([state.pose for state in states]),
        torch.cat([state.gripper for state in states]),
        torch.cat([state.velocity for state in states]),
    )


def unstack(state: KinematicState) -> list[KinematicState]:
    """The B states of `state`, each with B = 1."""
    rows = range(state.pose.shape[0])
    return [KinematicState(state.pose[i : i + 1], state.gripper[i : i + 1], state.velocity[i : i + 1]) for i in rows]


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
    gain, decay, scale = (np.array(values, np.float64) for values in (model.gain, model.decay, model.scale))
    low, high = _limits(model)
    device = state.pose.device
    outcome = _core.follow(
        _plain(state.pose), _plain(state.gripper), _plain(state.velocity), commands, gain, decay, scale, model.gripper_step, low, high
    )
    path_pose, path_gripper, pose, gripper, velocity = (torch.from_numpy(array).to(device) for array in outcome)
    return StatePath(path_pose, path_gripper), KinematicState(pose, gripper, velocity)


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
    """The law at the head of this file, step by step: path pose (B, K, 7), path gripper (B, K), last velocity (B, 6)."""
    gain, decay, scale = (np.array(values) for values in (model.gain, model.decay, model.scale))
    low, high = _limits(model)
    poses, grippers = [], []
    for action in np.moveaxis(command, 1, 0):
        displacement = gain * (scale * np.clip(action[:, :6], -1.0, 1.0)) + decay * velocity
        before = pose[:, :3]
        position = np.clip(before + displacement[:, :3], np.minimum(low, before), np.maximum(high, before))
        quaternion = multiply(exp(displacement[:, 3:]), pose[:, 3:])
        velocity = np.concatenate([position - before, displacement[:, 3:]], axis=1)
        pose = np.concatenate([position, quaternion / np.linalg.norm(quaternion, axis=1, keepdims=True)], axis=1)
        gripper = np.clip(gripper - model.gripper_step * np.sign(action[:, 6]), 0.0, 1.0)
        poses.append(pose)
        grippers.append(gripper)
    return np.stack(poses, axis=1), np.stack(grippers, axis=1), velocity


def displacements(pose: Doubles) -> Doubles:
    """What each control step moved: (T, 6) [m, rad], world frame, of a path `pose` (T + 1, 7)."""
    turned = multiply(pose[1:, 3:], pose[:-1, 3:] * np.array([-1.0, -1.0, -1.0, 1.0]))
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
    With `margin_m`, the workspace is the range of the data and that much more [m]. ValueError where shapes do not fit.
    """
    _check_episodes(poses, commands)
    gain, decay, fitted = list(robot.gain), list(robot.decay), [False] * 6
    moved = [displacements(pose) for pose in poses]
    asked = np.concatenate([np.clip(command[:, :6], -1.0, 1.0) for command in commands]) * np.array(robot.action_scale)
    last = np.concatenate([np.concatenate([np.zeros((1, 6)), d[:-1]]) for d in moved])
    result = np.concatenate(moved)
    for i in range(6):
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
        }
    )


def drift(
    model: ControllerModel, poses: Sequence[Doubles], commands: Sequence[NDArray[np.floating[Any]]], horizon: int
) -> tuple[float, float]:
    """Mean error after `horizon` open-loop steps from every state of the episodes: position [m], and angle [rad].

    The model starts with the true pose and the true last displacement. ValueError if no episode is that long.
    """
    _check_episodes(poses, commands)
    starts, velocities, windows, ends = [], [], [], []
    for pose, command in zip(poses, commands, strict=True):
        last = np.concatenate([np.zeros((1, 6)), displacements(pose)])
        for t in range(len(command) - horizon + 1):
            starts.append(pose[t])
            velocities.append(last[t])
            windows.append(command[t : t + horizon])
            ends.append(pose[t + horizon])
    if horizon < 1 or not starts:
        raise ValueError(f"drift: horizon={horizon}, longest episode {max(map(len, commands))} steps: want 1 .. that many")
    state = KinematicState(
        torch.from_numpy(np.stack(starts)), torch.zeros(len(starts), dtype=torch.float64), torch.from_numpy(np.stack(velocities))
    )
    _, after = follow(state, torch.from_numpy(np.stack(windows)), model)
    got, want = after.pose.numpy(), np.stack(ends)
    distance = np.linalg.norm(got[:, :3] - want[:, :3], axis=1)
    angle = np.linalg.norm(log(multiply(got[:, 3:], want[:, 3:] * np.array([-1.0, -1.0, -1.0, 1.0]))), axis=1)
    return float(distance.mean()), float(angle.mean())

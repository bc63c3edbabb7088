"""A path of the gripper, drawn on the camera's image plane: poses become pixels, and the camera becomes a map of rays.

The drawn frame of an arm is  world_to_camera * pose * Rz(yaw) * Trans(0, 0, tool);  its origin and the tips of its axes go to
K (X / Z), cut off toward zero. There is no test of depth: an arm behind the camera is drawn mirrored, as in EVAC's own maps. Numbers of
an arm that is not there: deltas 0, and nothing is drawn.
Source: EnerVerse-AC (arXiv:2505.09723) sec. 3 and its public code; ray maps: Plücker-style direction and origin at latent pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from worldenv.kernels import action_map as kernels
from worldenv.kernels.action_map import Brush, paint
from worldenv.nouns import ActionMap, Camera, StatePath
from worldenv.robots.contract import ArmDrawing, Robot

Doubles = NDArray[np.float64]

_ARM_DIMS = 7
_SIDES = ("left", "right")
_LOCK_RAD = 1e-7
"""Nearer to a pitch of 90 degrees than this, angles are rounding; SciPy, which the published code calls, draws the line there too."""
_SHADES = 256
_THIRTEEN = 12.999999999999998  # matplotlib holds 13 / 255 to 16 digits, which is below it, and it shows once cut off
_BREWER: dict[str, list[tuple[float, float, float]]] = {
    "Greens": [
        (247, 252, 245), (229, 245, 224), (199, 233, 192), (161, 217, 155), (116, 196, 118), (65, 171, 93), (35, 139, 69), (0, 109, 44), (0, 68, 27),
    ],
    "Reds": [
        (255, 245, 240), (254, 224, 210), (252, 187, 161), (252, 146, 114), (251, 106, 74), (239, 59, 44), (203, 24, 29), (165, 15, 21),
        (103, 0, _THIRTEEN),
    ],
}  # fmt: skip
"""ColorBrewer's sequential palettes of nine colours (Brewer et al. 2003), as matplotlib interpolates them."""


def _palette(name: str) -> NDArray[np.uint8]:
    """(256, 3) RGB, cut off to integers: with matplotlib's order of operations, since products such as 8 / 255 * 255 are not whole."""
    colours = np.array(_BREWER[name]) / 255.0
    knots, grid = np.linspace(0.0, 1.0, len(colours)) * (_SHADES - 1), np.arange(_SHADES, dtype=np.float64)
    right = np.clip(np.searchsorted(knots, grid), 1, len(knots) - 1)
    share = ((grid - knots[right - 1]) / (knots[right] - knots[right - 1]))[:, None]
    shades: NDArray[np.uint8] = ((share * (colours[right] - colours[right - 1]) + colours[right - 1]) * 255).astype(np.uint8)
    return shades


_PALETTES = {name: _palette(name) for name in _BREWER}


def shade(palette: str, openness: Doubles) -> NDArray[np.uint8]:
    """RGB (..., 3) of a gripper at `openness` (...), 0 shut .. 1 open; beyond, the palette's ends."""
    return _PALETTES[palette][np.clip((openness * _SHADES).astype(np.int64), 0, _SHADES - 1)]


def rotation(quaternion: Doubles) -> Doubles:
    """Matrices (..., 3, 3) of unit quaternions x y z w (..., 4)."""
    x, y, z, w = np.moveaxis(quaternion, -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def _roll_pitch_yaw(matrix: Doubles) -> Doubles:
    """Angles (..., 3) [rad] about the fixed axes x, then y, then z. Where x ends up along z, roll and yaw are one turn: then yaw is 0."""
    level = np.hypot(matrix[..., 2, 1], matrix[..., 2, 2])
    locked = level < _LOCK_RAD
    roll = np.where(locked, np.arctan2(-matrix[..., 1, 2], matrix[..., 1, 1]), np.arctan2(matrix[..., 2, 1], matrix[..., 2, 2]))
    pitch = np.arctan2(-matrix[..., 2, 0], level)
    yaw = np.where(locked, 0.0, np.arctan2(matrix[..., 1, 0], matrix[..., 0, 0]))
    return np.stack([roll, pitch, yaw], axis=-1)


def _wrap(angle: Doubles) -> Doubles:
    """Into (-pi, pi]."""
    return np.pi - np.mod(np.pi - angle, 2 * np.pi)


def deltas(pose: Doubles, gripper: Doubles, arms: Sequence[ArmDrawing]) -> Doubles:
    """(..., N, 14) from one state to the next: per side dxyz [m], d(roll pitch yaw) [rad] and the new gripper; an absent side is 0.

    `pose` (..., N + 1, A, 7) and `gripper` (..., N + 1, A) of the A `arms`.
    """
    angles = _roll_pitch_yaw(rotation(pose[..., 3:]))
    moved = np.concatenate([np.diff(pose[..., :3], axis=-3), _wrap(np.diff(angles, axis=-3)), gripper[..., 1:, :, None]], axis=-1)
    out = np.zeros((*moved.shape[:-2], _ARM_DIMS * len(_SIDES)))
    for i, arm in enumerate(arms):
        first = _ARM_DIMS * _SIDES.index(arm.side)
        out[..., first : first + _ARM_DIMS] = moved[..., i, :]
    return out


def _from_camera(pose: Doubles, camera: Camera, arms: Sequence[ArmDrawing]) -> Doubles:
    """(..., A, 4, 3) [m], z forward: the drawn frame's origin and its axes' tips, of `pose` (..., A, 7)."""
    points = []
    to_camera = np.linalg.inv(camera.camera_to_world)
    for i, arm in enumerate(arms):
        cos, sin = np.cos(arm.yaw_rad), np.sin(arm.yaw_rad)
        turned = rotation(pose[..., i, 3:]) @ np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])
        local = arm.tool_m * np.array([0.0, 0.0, 1.0]) + arm.axis_m * np.vstack([np.zeros(3), np.eye(3)])
        points.append(np.einsum("...ij,kj->...ki", turned, local) + pose[..., i, None, :3])
    seen: Doubles = np.stack(points, axis=-3) @ to_camera[:3, :3].T + to_camera[:3, 3]
    return seen


def project(pose: Doubles, camera: Camera, arms: Sequence[ArmDrawing]) -> Doubles:
    """(..., A, 4, 2) x, y [px] of the drawn frame's origin and of its axes' tips, of `pose` (..., A, 7)."""
    x, y, z = np.moveaxis(_from_camera(pose, camera, arms), -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):  # a point in the plane of the camera is infinitely far off the canvas
        normalised = np.stack([x / z, y / z, np.ones_like(z)], axis=-1)
        pixels = (normalised @ camera.intrinsics.T)[..., :2]
    if camera.mirrored:
        pixels[..., 0] = camera.width - 1 - pixels[..., 0]
    return pixels


def in_picture(pose: Doubles, camera: Camera, arm: ArmDrawing) -> NDArray[np.bool_]:
    """(N,) whether the drawn origin of `arm` at `pose` (N, 7) is before the camera and within its picture."""
    x, y = np.moveaxis(project(pose[:, None], camera, [arm])[:, 0, 0], -1, 0)
    before = _from_camera(pose[:, None], camera, [arm])[:, 0, 0, 2] > 0
    inside: NDArray[np.bool_] = before & (x > -0.5) & (x < camera.width - 0.5) & (y > -0.5) & (y < camera.height - 0.5)
    return inside


def drawn_over(frames: NDArray[np.uint8], pose: Doubles, gripper: Doubles, camera: Camera, robot: Robot, arms: Sequence[ArmDrawing]) -> torch.Tensor:
    """`frames` (N, H, W, 3) of `camera` with the action map of `pose` (N, A, 7) and `gripper` (N, A) over them, half transparent: uint8.

    Where the disc is not on the gripper, camera, poses or robot are not what took these pictures.
    """
    maps = pictures(pose, gripper, camera, robot, arms)
    painted = (maps != robot.background).any(-1, keepdim=True)
    shown = torch.from_numpy(np.ascontiguousarray(frames))
    return torch.where(painted, ((shown.short() + maps) // 2).byte(), shown)


def pictures(
    pose: Doubles,
    gripper: Doubles,
    camera: Camera,
    robot: Robot,
    arms: Sequence[ArmDrawing] | None = None,
    device: torch.device | None = None,
) -> torch.Tensor:
    """Action maps (N, H, W, 3) uint8 of `pose` (N, A, 7) and `gripper` (N, A), at the camera's size, on `device` (default: the CPU).

    `arms` say how they are drawn at that size; without them, as `robot` has it, in proportion to the picture's height.
    """
    arms = robot.arms_at(camera.height) if arms is None else arms
    pixels = np.trunc(np.nan_to_num(project(pose, camera, arms), nan=1e9, posinf=1e9, neginf=-1e9).clip(-1e9, 1e9)).astype(np.int64)
    colours = np.stack([shade(arm.palette, gripper[:, i]) for i, arm in enumerate(arms)], axis=1)
    brushes = [Brush(round(arm.radius_px), round(arm.thickness_px), arm.axis_rgb) for arm in arms]
    return paint(pixels, colours, brushes, (camera.height, camera.width), robot.background, device)


def resized(camera: Camera, height: int, width: int) -> Camera:
    """The same camera with its picture stretched to `height` x `width` [px], each axis by its own factor: intrinsics as EVAC scales them, which
    leaves what is drawn up to half a pixel from where a picture resized about its pixels' edges has it.
    """
    stretch = np.array([[width / camera.width], [height / camera.height], [1.0]])
    return replace(camera, intrinsics=camera.intrinsics * stretch, height=height, width=width)


def rays(camera: Camera, latent: tuple[int, int], device: torch.device | None = None) -> torch.Tensor:
    """(6, h, w) float32: the unit direction in the world of the ray through each latent pixel's centre, then the camera's place [m].

    On `device` (default: the CPU). Intrinsics are scaled from the picture to `latent` (h, w).
    """
    intrinsics = resized(camera, *latent).intrinsics
    return kernels.rays(intrinsics, camera.camera_to_world, camera.mirrored, latent, device)


def draw(
    path: StatePath,
    before: tuple[torch.Tensor, torch.Tensor],
    camera: Camera,
    robot: Robot,
    latent: tuple[int, int],
    device: torch.device | None = None,
) -> ActionMap:
    """The action map of one arm's `path` (B rollouts, K steps), on `device` (default: the path's).

    `before` is the pose (B, 7) and gripper (B,) that the path starts from; `latent` (h, w) the simulator's latent size. A robot of two
    arms moves its last one here; the other is absent. Raises ValueError where batches differ.
    """
    device = path.pose.device if device is None else device
    batch, chunk = path.gripper.shape
    if before[0].shape != (batch, _ARM_DIMS) or before[1].shape != (batch,):
        raise ValueError(f"draw: before {tuple(before[0].shape)}, {tuple(before[1].shape)}, want ({batch}, 7), ({batch},)")
    pose = torch.cat([before[0][:, None], path.pose], dim=1).cpu().double().numpy()[:, :, None]
    gripper = torch.cat([before[1][:, None], path.gripper], dim=1).cpu().double().numpy()[:, :, None]
    arms = robot.arms_at(camera.height)[-1:]
    painted = pictures(pose[:, 1:].reshape(-1, 1, _ARM_DIMS), gripper[:, 1:].reshape(-1, 1), camera, robot, arms, device)
    return ActionMap(
        picture=painted.view(batch, chunk, *painted.shape[1:]),
        rays=rays(camera, latent, device).expand(batch, -1, -1, -1),
        delta=torch.from_numpy(deltas(pose, gripper, arms).astype(np.float32)).to(device),
    )

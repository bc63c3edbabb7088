"""What is true of one robot: how its commands are scaled, how its gripper moves, what a policy reads of it, how its arms are drawn."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Literal, overload

import numpy as np
import torch
from numpy.typing import NDArray

Rgb = tuple[int, int, int]
"""A colour, each 0 .. 255."""
Six = tuple[float, float, float, float, float, float]
"""One number for each of x y z [m] and rx ry rz [rad], world frame."""


def signed_like(pose: NDArray[np.float64], like: NDArray[np.float64]) -> NDArray[np.float64]:
    """`pose` (..., 7) with the sign of its quaternions that is nearer to that of `like` (7,): the same turn, and `Robot.proprio` follows the sign.

    Of an episode (T, 7), whose sign is continuous, all change where the first does.
    """
    first = pose.reshape(-1, 7)[0, 3:]
    turned = pose.copy()
    if first @ like[3:] < 0:
        turned[..., 3:] *= -1
    return turned


@dataclass(frozen=True)
class ArmDrawing:
    """How an action map draws one arm: a disc at the tool, coloured by openness, and the three axes of its frame.

    The frame that is drawn is pose * Rz(yaw_rad) * Trans(0, 0, tool_m): both turn and shift are in the gripper's own frame.
    """

    side: Literal["left", "right"]
    """Which half of the 14-D delta the arm fills (left 0..6, right 7..13), and the order of drawing: left first."""
    yaw_rad: float
    """Turn about the gripper's own z before anything is drawn [rad]."""
    tool_m: float
    """From the pose along the gripper's own z to the point that is drawn [m]."""
    axis_m: float
    """Length of the drawn axes [m]."""
    radius_px: float
    """Radius of the disc on a canvas of `Robot.canvas` [px]."""
    thickness_px: float
    """Width of the axes' lines on a canvas of `Robot.canvas` [px]."""
    palette: Literal["Greens", "Reds"]
    """Matplotlib's colour map of the disc, from 0 (shut) to 1 (open)."""
    axis_rgb: tuple[Rgb, Rgb, Rgb]
    """Colours of the x, y and z axis."""

    def __post_init__(self) -> None:
        if self.radius_px <= 0 or self.thickness_px <= 0 or self.axis_m <= 0:
            raise ValueError(
                f"ArmDrawing: radius {self.radius_px} px, thickness {self.thickness_px} px, axis {self.axis_m} m: want all above 0"
            )


LEFT_AXES: tuple[Rgb, Rgb, Rgb] = ((0, 0, 255), (255, 255, 0), (0, 255, 255))
"""Axis colours of a left arm in EVAC's maps."""
RIGHT_AXES: tuple[Rgb, Rgb, Rgb] = ((255, 0, 255), (255, 0, 0), (0, 255, 0))
"""Axis colours of a right arm in EVAC's maps."""


@dataclass(frozen=True)
class Robot:
    """One robot. Poses are x y z [m] and a unit quaternion x y z w in the world frame; gripper 0 shut .. 1 open."""

    name: str
    """As in reports and checkpoints."""
    source: str
    """Where the numbers come from."""
    control_hz: float
    """Control steps per second [1/s]."""
    action_scale: Six
    """What a command of 1 asks for in one control step [m, rad]."""
    gain: Six
    """Share of the asked displacement that the controller makes in the same step: nominal; `kinematics.fit` finds a world's own."""
    decay: Six
    """Share of the last step's displacement that goes on: nominal, as `gain`."""
    gripper_step: float
    """Travel of the gripper in one control step [share of full travel]."""
    finger_m: float
    """Distance between the fingers when open [m]."""
    arms: tuple[ArmDrawing, ...]
    """How the arms are drawn, left before right. A robot with one arm has a left one; rollouts move the last."""
    canvas: tuple[int, int]
    """Height and width [px] of the picture at which radius and thickness hold."""
    example_pose: tuple[float, float, float, float, float, float, float]
    """A state that the robot really is in: x y z [m], unit quaternion x y z w."""
    example_gripper: float
    """Its gripper, 0 shut .. 1 open."""
    background: int = 50
    """Grey level of an empty action map."""
    coupling: tuple[tuple[float, ...], ...] | None = None
    """(6, 18): what the axes do to each other, beside gain and decay; see kinematics. None where they do nothing."""
    holds_turn: bool = False
    """A rotation command of exactly 0 asks for the orientation that was asked for before."""
    gripper_shares: tuple[float, float] = (1.0, 0.0)
    """Shares of the gripper's ramp, now and one step ago, in its opening; the rest is its last opening."""

    def __post_init__(self) -> None:
        for name, given in (("control_hz", (self.control_hz,)), ("finger_m", (self.finger_m,)), ("action_scale", self.action_scale)):
            if not all(0.0 < one < math.inf for one in given):
                raise ValueError(f"{self.name}: {name}={given}, want more than 0")
        shares, rows = self.gripper_shares, self.coupling or ()
        if not all(map(math.isfinite, (*self.gain, *self.decay, *itertools.chain(*rows)))):
            raise ValueError(f"{self.name}: gain={self.gain}, decay={self.decay}, coupling={self.coupling}: want finite numbers")
        if self.coupling is not None and [len(row) for row in rows] != [18] * 6:
            raise ValueError(f"{self.name}: coupling of {[len(row) for row in rows]} numbers a row, want 6 rows of 18")
        if min(shares) < 0.0 or sum(shares) > 1.0 or not 0 <= self.background <= 255:
            raise ValueError(f"{self.name}: gripper_shares={shares}, background={self.background}: want shares of 1 in all at most, and 0 .. 255")
        if not 0.0 < self.gripper_step <= 1.0:
            raise ValueError(f"{self.name}: gripper_step={self.gripper_step}, want a share of full travel in (0, 1]")
        if any(not 0.0 <= d < 1.0 for d in self.decay):
            raise ValueError(f"{self.name}: decay={self.decay}, want each in [0, 1): at 1 the arm never stops")
        if [arm.side for arm in self.arms] not in (["left"], ["left", "right"]):
            raise ValueError(f"{self.name}: arms {[arm.side for arm in self.arms]}, want left, or left then right")
        norm = float(np.linalg.norm(self.example_pose[3:]))
        if abs(norm - 1.0) > 1e-6 or not 0.0 <= self.example_gripper <= 1.0:
            raise ValueError(f"{self.name}: example quaternion of length {norm}, gripper {self.example_gripper}: want 1, and 0 .. 1")

    @overload
    def proprio(self, pose: NDArray[np.float64], gripper: NDArray[np.float64] | float) -> NDArray[np.float32]: ...

    @overload
    def proprio(self, pose: torch.Tensor, gripper: torch.Tensor) -> torch.Tensor: ...

    def proprio(
        self, pose: NDArray[np.float64] | torch.Tensor, gripper: NDArray[np.float64] | torch.Tensor | float
    ) -> NDArray[np.float32] | torch.Tensor:
        """What a policy reads of the robot: LIBERO's 8 values (..., 8) float32 of `pose` (..., 7) and `gripper` (...).

        x y z [m]; the rotation vector [rad] whose angle 2 acos(w) in [0, 2 pi] is *not* wrapped, so it follows the sign of the
        quaternion, which is continuous in time; the fingers' positions +w/2, -w/2 [m], w = gripper * finger_m.
        numpy in, numpy out; torch in, torch out on the same device. ValueError where shapes do not fit.
        """
        if isinstance(pose, torch.Tensor):
            opening = torch.as_tensor(gripper, dtype=torch.float64).cpu().numpy()
            return torch.from_numpy(self.proprio(pose.detach().cpu().double().numpy(), opening)).to(pose.device)
        opening = np.asarray(gripper, dtype=np.float64)
        if pose.ndim < 1 or pose.shape[-1] != 7 or pose.shape[:-1] != opening.shape:
            raise ValueError(f"proprio: pose {pose.shape}, gripper {opening.shape}: want (..., 7) and (...)")
        axis, w = pose[..., 3:6], pose[..., 6]
        length = np.linalg.norm(axis, axis=-1)
        angle = 2.0 * np.arctan2(length, w)  # 2 acos(w) of a unit quaternion, and accurate near no turn at all
        factor = np.divide(angle, length, out=np.zeros_like(length), where=length > 0)
        finger = 0.5 * self.finger_m * opening
        values = [pose[..., :3], axis * factor[..., None], finger[..., None], -finger[..., None]]
        return np.concatenate(values, axis=-1).astype(np.float32)

    def arms_at(self, height: int) -> tuple[ArmDrawing, ...]:
        """The arms as drawn on a canvas of `height` [px]: radius and thickness scaled with it, at least 1 px."""
        scale = height / self.canvas[0]
        return tuple(
            replace(arm, radius_px=max(1.0, arm.radius_px * scale), thickness_px=max(1.0, arm.thickness_px * scale)) for arm in self.arms
        )

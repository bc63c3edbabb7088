"""AgiBot G1, two arms: the robot of AgiBot World, on which EVAC's released weights were trained.

What is published is how its recorded poses are drawn (EnerVerse-AC, arXiv:2505.09723, and its code): the frame is turned by -30
degrees (left) or +30 (right) about the gripper's own z, the drawn point lies 0.23 m along z, the disc has 50 px and the lines 8 px
at 320 x 512, discs are coloured by openness. Poses are those of the flange in the robot's base frame [m, quaternion x y z w].

No law from commands to motion is published: the data set holds absolute poses. The constants below say that each is reached at
once; `kinematics.fit` finds others in recorded commands.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from worldenv.robots.contract import LEFT_AXES, RIGHT_AXES, ArmDrawing, Rgb, Robot

OPEN_RAW = 120.0
"""Recorded opening of an open gripper, `state/effector/position` [mm]."""
_LONGEST_OFF = 1e-2  # a recorded quaternion may be this much off length 1, and is normalised


def openness(raw: ArrayLike) -> NDArray[np.float64]:
    """Gripper 0 shut .. 1 open of the recorded opening [mm]. Not clipped, as EVAC's deltas: recordings reach 121."""
    return np.asarray(raw, dtype=np.float64) / OPEN_RAW


def states(raw: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64], tuple[ArmDrawing, ...]]:
    """Poses (T, A, 7), grippers (T, A) and drawings of the A arms that are there, of EVAC's rows `raw` (T, 16).

    A row is x y z [m], quaternion x y z w, opening [mm] of the left arm, then of the right one. An arm whose quaternion is 0 in every row is
    absent: a path that was padded with zeros, which is no pose. Raises ValueError that names the row and column where a row is no state.
    """
    rows = np.asarray(raw, dtype=np.float64)
    if rows.ndim != 2 or rows.shape[1] != 16 or len(rows) < 2:
        raise ValueError(f"poses {rows.shape}, want (T, 16) of at least two moments")
    if not np.isfinite(rows).all():
        row, column = np.argwhere(~np.isfinite(rows))[0]
        raise ValueError(f"poses: row {row}, column {column} is {rows[row, column]}")
    arms = rows.reshape(len(rows), 2, 8)
    length = np.linalg.norm(arms[..., 3:7], axis=-1)
    there = [i for i in range(2) if length[:, i].any()]
    if not there:
        raise ValueError("poses: every quaternion is 0, so there is no arm")
    arms, length = arms[:, there], length[:, there]
    if (wrong := np.abs(length - 1.0) > _LONGEST_OFF).any():
        row, i = np.argwhere(wrong)[0]
        raise ValueError(f"poses: row {row}, {AGIBOT_G1.arms[there[i]].side} arm: quaternion of length {length[row, i]:.4g}, want 1 (x y z w)")
    pose = np.concatenate([arms[..., :3], arms[..., 3:7] / length[..., None]], axis=-1)
    return pose, openness(arms[..., 7]), tuple(AGIBOT_G1.arms[i] for i in there)


def _arm(side: Literal["left", "right"], yaw_rad: float, palette: Literal["Greens", "Reds"], axis_rgb: tuple[Rgb, Rgb, Rgb]) -> ArmDrawing:
    return ArmDrawing(side, yaw_rad, tool_m=0.23, axis_m=0.1, radius_px=50.0, thickness_px=8.0, palette=palette, axis_rgb=axis_rgb)


AGIBOT_G1 = Robot(
    name="agibot_g1",
    source="EnerVerse-AC (arXiv:2505.09723) and its public code; AgiBot World's description of its data",
    control_hz=30.0,
    action_scale=(0.05, 0.05, 0.05, 0.5, 0.5, 0.5),
    gain=(1.0,) * 6,
    decay=(0.0,) * 6,
    gripper_step=1.0,
    finger_m=0.12,
    arms=(_arm("left", -0.5236, "Greens", LEFT_AXES), _arm("right", 0.5236, "Reds", RIGHT_AXES)),
    canvas=(320, 512),
    # in front of the body at the height of a table, pointing forward
    example_pose=(0.6, 0.2, 0.3, 0.0, 0.7071067811865476, 0.0, 0.7071067811865476),
    example_gripper=1.0,
)

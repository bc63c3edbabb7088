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


def openness(raw: ArrayLike) -> NDArray[np.float64]:
    """Gripper 0 shut .. 1 open of the recorded opening [mm]. Not clipped, as EVAC's deltas: recordings reach 121."""
    return np.asarray(raw, dtype=np.float64) / OPEN_RAW


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

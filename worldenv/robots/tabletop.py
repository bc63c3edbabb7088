"""The gripper of the embedded environment: LIBERO's commands and lag, at constants that are exactly these.

envs/tabletop.py moves its gripper by this controller, so kinematics with these constants has no error in free space.
Source: the shape and size of the lag are measured on LIBERO (robots/panda.py); the values here are round by choice.
"""

from __future__ import annotations

from worldenv.robots.contract import LEFT_AXES, ArmDrawing, Robot

TABLETOP = Robot(
    name="tabletop",
    source="embedded environment, by definition",
    control_hz=20.0,
    action_scale=(0.05, 0.05, 0.05, 0.5, 0.5, 0.5),
    gain=(0.1, 0.1, 0.1, 0.085, 0.085, 0.085),
    decay=(0.6, 0.6, 0.6, 0.6, 0.6, 0.6),
    gripper_step=1.0 / 8.0,
    finger_m=0.08,
    arms=(
        ArmDrawing(
            side="left",
            yaw_rad=0.0,
            tool_m=0.0,
            axis_m=0.05,
            radius_px=5.0,
            thickness_px=2.0,
            palette="Greens",
            axis_rgb=LEFT_AXES,
        ),
    ),
    canvas=(64, 64),
    example_pose=(0.0, 0.0, 0.1, 1.0, 0.0, 0.0, 0.0),
    example_gripper=1.0,
)

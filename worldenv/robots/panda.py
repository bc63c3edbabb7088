"""Franka Panda in LIBERO: robosuite's OSC_POSE at 20 Hz, with the simulated Panda gripper.

Commands and state: robosuite 1.4 (controllers/config/osc_pose.json, grippers/panda_gripper.py), LIBERO's OffScreenRenderEnv.
A command of 1 asks for 0.05 m or 0.5 rad from where the gripper is, world frame, rotation from the left; the sign of the gripper
command moves the fingers' target through their travel in 8 control steps, -1 open, +1 close, and they follow with a lag (10 to 14 steps). A
rotation command of exactly 0 holds the orientation that was asked for before. Position and rotation move each other: turning about x moves the
gripper along y, since they are decoupled by separate mass matrices. Gain, decay, coupling and gripper_shares are least-squares fits to 9,600
transitions of random motion in three scenes; `python -m benchmarks.controller` records, fits and measures (docs/kinematics.md).

The pose is that of the point between the fingertips (`grip_site`), so nothing is added to it to draw it. Pictures: OpenVLA-OFT turns
robosuite's upside-down array by 180 degrees, which leaves it upright and mirrored: such a camera is `Camera(mirrored=True)`.
The map's sizes are EVAC's, in proportion to the height of the picture.
"""

from __future__ import annotations

from worldenv.robots.contract import LEFT_AXES, ArmDrawing, Robot

PANDA = Robot(
    name="panda",
    source="robosuite 1.4 OSC_POSE and PandaGripper in LIBERO; gain, decay, coupling and gripper_shares fitted in LIBERO",
    control_hz=20.0,
    action_scale=(0.05, 0.05, 0.05, 0.5, 0.5, 0.5),
    gain=(0.0869, 0.1063, 0.1045, 0.1085, 0.0902, 0.1141),
    decay=(0.4603, 0.3563, 0.3122, 0.5557, 0.6352, 0.5092),
    gripper_step=1.0 / 8.0,
    finger_m=0.08,
    arms=(
        ArmDrawing(
            side="left",
            yaw_rad=0.0,
            tool_m=0.0,
            axis_m=0.1,
            radius_px=50.0,
            thickness_px=8.0,
            palette="Greens",
            axis_rgb=LEFT_AXES,
        ),
    ),
    canvas=(320, 512),
    # where LIBERO's table suites start: over the table, pointing straight down, fingers 68 mm apart
    example_pose=(-0.21, 0.0, 1.17, 1.0, 0.0, 0.0, 0.0),
    example_gripper=0.85,
    # rows x y z rx ry rz; of each the three lines are: asked for now, asked for last, moved last
    coupling=(
        (
            0.0000, 0.0001, 0.0014, 0.0008, -0.0150, -0.0015,
            0.0529, -0.0008, -0.0115, -0.0001, -0.0035, -0.0029,
            0.0000, -0.0011, 0.0398, -0.0009, 0.0713, 0.0162,
        ),
        (
            -0.0006, 0.0000, -0.0008, 0.0148, 0.0003, 0.0061,
            0.0019, 0.0631, 0.0017, 0.0061, -0.0005, 0.0045,
            -0.0051, 0.0000, -0.0032, -0.0784, 0.0019, -0.0397,
        ),
        (
            -0.0056, -0.0012, 0.0000, 0.0006, -0.0138, -0.0004,
            -0.0261, 0.0060, 0.0774, 0.0008, -0.0046, 0.0041,
            0.1184, -0.0183, 0.0000, -0.0101, 0.0706, -0.0148,
        ),
        (
            0.0026, 0.0875, 0.0052, 0.0000, -0.0006, 0.0000,
            -0.0004, 0.0034, 0.0013, 0.0094, -0.0001, 0.0061,
            -0.0087, -0.3417, -0.0210, 0.0000, 0.0023, -0.0256,
        ),
        (
            -0.1441, -0.0014, -0.0614, -0.0007, 0.0000, 0.0011,
            -0.0484, 0.0031, 0.0201, -0.0017, 0.0055, 0.0083,
            0.7477, 0.0055, 0.1305, 0.0063, 0.0000, -0.0386,
        ),
        (
            -0.0107, 0.0638, 0.0013, -0.0043, -0.0003, 0.0000,
            -0.0024, -0.0023, -0.0004, 0.0017, 0.0010, 0.0080,
            0.0471, -0.2328, -0.0046, 0.0083, -0.0028, 0.0000,
        ),
    ),
    holds_turn=True,
    gripper_shares=(0.1467, 0.2213),
)

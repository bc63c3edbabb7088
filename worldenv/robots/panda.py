"""Franka Panda in LIBERO: robosuite's OSC_POSE at 20 Hz, with the simulated Panda gripper.

Commands and state: robosuite 1.4 (controllers/config/osc_pose.json, grippers/panda_gripper.py), LIBERO's OffScreenRenderEnv.
A command of 1 asks for 0.05 m or 0.5 rad from where the gripper is, world frame, rotation from the left; the sign of the gripper
command moves the fingers' target through their travel in 8 control steps, -1 open, +1 close, and they follow with a lag (10 to 14 steps). A
rotation command of exactly 0 holds the orientation that was asked for before. Position and rotation move each other: turning about x moves the
gripper along y, since they are decoupled by separate mass matrices. Gain, decay, coupling and gripper_shares are least-squares fits to random
motion and expert motion in three scenes; `python -m benchmarks.controller` records, fits and measures (docs/kinematics.md).

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
    gain=(0.0845, 0.1100, 0.1068, 0.1120, 0.0901, 0.0736),
    decay=(0.4432, 0.2935, 0.2713, 0.5631, 0.5883, 0.6662),
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
            0.0000, -0.0010, 0.0015, 0.0001, -0.0163, 0.0002,
            0.0588, -0.0031, -0.0076, 0.0009, -0.0052, -0.0010,
            0.0000, 0.0080, 0.0261, -0.0002, 0.0834, 0.0053,
        ),
        (
            -0.0020, 0.0000, 0.0020, 0.0147, -0.0001, 0.0078,
            0.0004, 0.0770, -0.0003, 0.0108, -0.0003, 0.0055,
            0.0115, 0.0000, -0.0073, -0.0973, 0.0009, -0.0526,
        ),
        (
            -0.0069, -0.0008, 0.0000, -0.0002, -0.0156, -0.0001,
            -0.0133, 0.0014, 0.0872, 0.0022, -0.0079, 0.0002,
            0.0703, -0.0023, 0.0000, -0.0100, 0.0930, -0.0013,
        ),
        (
            0.0088, 0.0715, -0.0145, 0.0000, 0.0037, -0.0052,
            0.0014, -0.0003, 0.0001, 0.0038, 0.0000, 0.0076,
            -0.0327, -0.2650, 0.0506, 0.0000, -0.0071, -0.0078,
        ),
        (
            -0.1342, -0.0036, -0.0525, 0.0056, 0.0000, 0.0044,
            -0.0698, -0.0076, 0.0190, -0.0036, 0.0146, -0.0051,
            0.7945, 0.0431, 0.1269, 0.0010, 0.0000, -0.0015,
        ),
        (
            0.0204, 0.0582, -0.0002, -0.0077, -0.0055, 0.0000,
            0.0095, -0.0297, -0.0016, 0.0000, -0.0059, -0.0134,
            -0.1146, -0.1137, 0.0283, 0.0168, 0.0382, 0.0000,
        ),
    ),
    holds_turn=True,
    gripper_shares=(0.1427, 0.2275),
)

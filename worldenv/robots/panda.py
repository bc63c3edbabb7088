"""Franka Panda in LIBERO: robosuite's OSC_POSE at 20 Hz, with the simulated Panda gripper.

Commands and state: robosuite 1.4 (controllers/config/osc_pose.json, grippers/panda_gripper.py), LIBERO's OffScreenRenderEnv.
A command of 1 asks for 0.05 m or 0.5 rad from where the gripper is, world frame, rotation from the left; the sign of the gripper
command drives the fingers through their travel in 8 control steps, -1 open, +1 close. Gain and decay are least-squares fits to
random motion in LIBERO-Spatial (R2 0.99 in position, 0.91 to 0.98 in rotation): one step 0.8 mm off on average, eight 6 mm.

The pose is that of the point between the fingertips (`grip_site`), so nothing is added to it to draw it. Pictures: OpenVLA-OFT turns
robosuite's upside-down array by 180 degrees, which leaves it upright and mirrored: such a camera is `Camera(mirrored=True)`.
The map's sizes are EVAC's, in proportion to the height of the picture.
"""

from __future__ import annotations

from worldenv.robots.contract import LEFT_AXES, ArmDrawing, Robot

PANDA = Robot(
    name="panda",
    source="robosuite 1.4 OSC_POSE and PandaGripper in LIBERO; gain and decay fitted on LIBERO-Spatial",
    control_hz=20.0,
    action_scale=(0.05, 0.05, 0.05, 0.5, 0.5, 0.5),
    gain=(0.099, 0.124, 0.123, 0.115, 0.068, 0.118),
    decay=(0.60, 0.54, 0.54, 0.56, 0.76, 0.53),
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
)

"""A scripted expert for reaching: straight over the puck, turning upright on the way. It is in no hurry: its commands grow with the distance up
to 10 cm, so that they tell where the puck is.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from worldenv import kinematics
from worldenv.envs.reaching import OVER_M, Reaching
from worldenv.envs.tabletop import DOWN

VARIATION = 2
"""Numbers in (0, 1) that make one demonstration differ from another."""


def command(env: Reaching, variation: NDArray[np.float64]) -> NDArray[np.float32]:
    """The expert's next command (7,) in [-1, 1]. `variation` (2,) in (0, 1) is one demonstration's manner: briskness and its limit."""
    briskness, limit = 0.4 + 0.15 * variation[0], 0.85 + 0.15 * variation[1]
    pose = env.arm.pose[0].numpy()
    way = np.array([*env.pucks[env.task, :2], OVER_M]) - pose[:3]
    twist = kinematics.log(kinematics.multiply(DOWN, np.array([-1.0, -1.0, -1.0, 1.0]) * pose[3:]))
    asked = briskness * np.concatenate([way, twist]) / np.array(env.robot.action_scale)
    return np.append(np.clip(asked, -limit, limit), 1.0).astype(np.float32)

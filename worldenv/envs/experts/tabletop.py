"""A scripted expert for the tabletop: sink behind the puck, line up, push it onto the strip. It sees where all pucks are.

What it does is a function of the scene as it is now, without memory, so that it can be imitated from single observations; it steers by
where things are, through the lag, and so corrects a puck that drifts aside.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from worldenv import kinematics
from worldenv.envs.tabletop import DOWN, FINGER_HALF, LINE, PUCK_RADIUS, Tabletop

VARIATION = 5
"""Numbers in (0, 1) that make one demonstration differ from another."""

_CLEAR_M = 0.016  # between the fingers and whatever they pass behind
_BESIDE_M = 0.05  # nearer to its puck than this (y), the gripper leaves the lane behind all pucks
_ALIGNED_M = 0.012  # off the puck's middle (y) by less than this, it pushes
_LOW_M = 0.045  # and below this height
_PAST_LINE_M = 0.065  # how far past the line a puck's centre is pushed in the end


def command(env: Tabletop, variation: NDArray[np.float64]) -> NDArray[np.float32]:
    """The expert's next command (7,) in [-1, 1]. `variation` (5,) in (0, 1) is one demonstration's manner: briskness, aim, height, distance."""
    briskness, limit = 0.8 + 0.3 * variation[0], 0.85 + 0.15 * variation[1]
    aim, height, distance = 0.008 * (variation[2] - 0.5), 0.022 + 0.010 * variation[3], _CLEAR_M + 0.014 * variation[4]
    state = env.arm
    place, turn = state.pose[0, :3].numpy(), state.pose[0, 3:].numpy()
    pucks = env.pucks
    x, y, _ = pucks[env.task]
    reach = PUCK_RADIUS + FINGER_HALF[0]  # from a puck's centre to the fingers' middle
    side = y + aim - place[1]
    if abs(side) < _ALIGNED_M and place[2] < _LOW_M:
        forward = LINE + _PAST_LINE_M - reach
    elif abs(side) < _BESIDE_M:
        forward = x - reach - distance
    else:
        forward = pucks[:, 0].min() - reach - distance
    way = np.array([forward - place[0], side, height - place[2]])
    upright = np.array([-1.0, -1.0, -1.0, 1.0]) * turn
    twist = kinematics.log(kinematics.multiply(DOWN, upright))
    asked = briskness * np.concatenate([way, twist]) / np.array(env.robot.action_scale)
    return np.append(np.clip(asked, -limit, limit), 1.0).astype(np.float32)

"""Everything about one episode of known commands, as arrays: what a third party needs to check that this is LIBERO."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from worldenv import action_map
from worldenv.envs import suites
from worldenv.envs.contract import Split
from worldenv.envs.libero import SETTLE_STEPS, Libero
from worldenv.nouns import Camera
from worldenv.robots.contract import Robot


def _drawn(pose: NDArray[np.float64], camera: Camera, robot: Robot) -> NDArray[np.float64]:
    """(T, 2) pixels u right, v down, where action maps draw the gripper at `pose` (T, 7)."""
    return action_map.project(pose[:, None], camera, robot.arms[-1:])[:, 0, 0]


def inspect(suite: str, task: int, split: Split, index: int, command: NDArray[np.floating[Any]], image: int) -> dict[str, NDArray[Any]]:
    """The episode that `command` (T, 7) makes of initial state `index` of `task`, past success and past the step limit.

    `initial_state` (n,), before settling; `state_path` (T + 1, n): time, joint positions, velocities; `pose` (T + 1, 7), `gripper` (T + 1,),
    `frames` (T + 1, H, W, 3), `success` (T + 1,); of agentview `intrinsics` (3, 3) with the picture's middle at W / 2 as LIBERO's own functions
    have it, and `extrinsics` (4, 4) camera to world; the gripper's place in the upright picture by these, `gripper_uv` (T + 1, 2), and on the
    frames, which are mirrored, in pixel centres, `gripper_uv_frame` (T + 1, 2); `step_limit`, `settle_steps`, `instruction`, `state_hash`.
    Raises ValueError for what is not there, and for commands of another shape or not finite.
    """
    commands = np.asarray(command)
    if commands.ndim != 2 or commands.shape[1] != 7 or not np.issubdtype(commands.dtype, np.floating):
        raise ValueError(f"actions {commands.shape} {commands.dtype}: want (T, 7) floating point")
    env = suites.open_suite(suite, image)
    try:
        moments = [env.begin(task, split, index)]
        states = [env.sim_state]
        initial = env.initial_state if isinstance(env, Libero) else env.sim_state
        for one in commands:
            moments.append(env.advance(one))
            states.append(env.sim_state)
        camera = env.camera_of(task)
        instruction, state_hash = env.tasks[task], env.state_hash(task, split, index)
    finally:
        env.close()
    edges = camera.intrinsics.copy()  # where a pixel's own place is its corner, not its middle
    edges[:2, 2] += 0.5
    pose = np.stack([moment.pose for moment in moments])
    return {
        "initial_state": initial,
        "state_path": np.stack(states),
        "pose": pose,
        "gripper": np.array([moment.gripper for moment in moments]),
        "frames": np.stack([moment.frame for moment in moments]),
        "success": np.array([moment.success for moment in moments]),
        "intrinsics": edges,
        "extrinsics": camera.camera_to_world,
        "gripper_uv": _drawn(pose, replace(camera, intrinsics=edges, mirrored=False), env.robot),
        "gripper_uv_frame": _drawn(pose, camera, env.robot),
        "step_limit": np.array(suites.step_limit(suite)),
        "settle_steps": np.array(SETTLE_STEPS if isinstance(env, Libero) else 0),
        "instruction": np.array(instruction),
        "state_hash": np.array(state_hash),
    }

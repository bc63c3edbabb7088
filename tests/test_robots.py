"""Each robot: its numbers against published ones, its proprioception against LIBERO's, its drawing at other sizes."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from worldenv.robots.agibot_g1 import AGIBOT_G1, openness
from worldenv.robots.panda import PANDA
from worldenv.robots.tabletop import TABLETOP

ROBOTS = [TABLETOP, PANDA, AGIBOT_G1]

# q01 and q99 of the proprioception in LIBERO-Spatial's regenerated demonstrations, as published with OpenVLA-OFT's checkpoints
LIBERO_Q01 = np.array([-0.2728, -0.2372, 0.9160, 2.7795, -1.3188, -0.4199, 0.00150, -0.03990])
LIBERO_Q99 = np.array([0.1353, 0.3629, 1.2862, 3.2830, 0.9333, 0.6326, 0.03993, -0.00167])


def test_panda_starts_within_liberos_published_range() -> None:
    proprio = PANDA.proprio(np.array(PANDA.example_pose), PANDA.example_gripper)
    assert ((proprio >= LIBERO_Q01) & (proprio <= LIBERO_Q99)).all(), proprio
    np.testing.assert_allclose(proprio, [-0.21, 0, 1.17, math.pi, 0, 0, 0.034, -0.034], atol=1e-6)


@pytest.mark.parametrize(
    ("axis", "angle"), [((1, 0, 0), 0.3), ((0, 1, 0), 3.1), ((0.6, 0, 0.8), 3.3), ((1, 0, 0), 3.63), ((0, 0, 1), 6.0), ((0, 1, 0), 1e-9)]
)
def test_rotation_vector_is_not_wrapped(axis: tuple[float, float, float], angle: float) -> None:
    half = 0.5 * angle
    pose = np.array([0, 0, 0, *(math.sin(half) * np.array(axis)), math.cos(half)])
    vector = TABLETOP.proprio(pose, 0.5)[3:6]
    np.testing.assert_allclose(vector, angle * np.array(axis), rtol=1e-6, atol=1e-16)


def test_rotation_vector_runs_on_through_pi() -> None:
    angles = np.linspace(2.8, 3.6, 81)
    pose = np.zeros((81, 7))
    pose[:, 3], pose[:, 6] = np.sin(0.5 * angles), np.cos(0.5 * angles)
    np.testing.assert_allclose(np.diff(PANDA.proprio(pose, np.ones(81))[:, 3]), 0.01, rtol=1e-3)


def test_no_turn_is_the_zero_vector() -> None:
    np.testing.assert_array_equal(TABLETOP.proprio(np.array([1, 2, 3, 0, 0, 0, 1.0]), 0.0), [1, 2, 3, 0, 0, 0, 0, 0])


def test_fingers_are_liberos() -> None:
    poses = np.tile([0, 0, 0, 1.0, 0, 0, 0], (3, 1))
    np.testing.assert_allclose(PANDA.proprio(poses, np.array([0, 0.5, 1]))[:, 6:], [[0, 0], [0.02, -0.02], [0.04, -0.04]], atol=1e-8)


def test_tensors_and_arrays_agree() -> None:
    pose, gripper = torch.tensor(PANDA.example_pose, dtype=torch.float64).repeat(2, 3, 1), torch.rand(2, 3, dtype=torch.float64)
    got = PANDA.proprio(pose, gripper)
    assert got.dtype == torch.float32
    np.testing.assert_array_equal(got.numpy(), PANDA.proprio(pose.numpy(), gripper.numpy()))


@pytest.mark.parametrize(("pose", "gripper"), [((7,), (1,)), ((6,), ()), ((2, 7), (3,)), ((2, 8), (2,)), ((), ())])
def test_wrong_shapes_are_refused(pose: tuple[int, ...], gripper: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="proprio"):
        TABLETOP.proprio(np.zeros(pose), np.zeros(gripper))


def test_arms_scale_with_the_picture() -> None:
    (arm,) = PANDA.arms_at(256)
    assert (arm.radius_px, arm.thickness_px) == (40.0, 6.4)
    assert AGIBOT_G1.arms_at(320) == AGIBOT_G1.arms
    assert TABLETOP.arms_at(8)[0].thickness_px == 1.0
    assert arm.axis_m == PANDA.arms[0].axis_m


def test_agibot_is_drawn_as_published() -> None:
    left, right = AGIBOT_G1.arms
    assert (left.side, right.side) == ("left", "right")
    assert (left.palette, right.palette) == ("Greens", "Reds")
    np.testing.assert_allclose([left.yaw_rad, right.yaw_rad], np.radians([-30, 30]), atol=2e-6)
    assert left.axis_rgb == ((0, 0, 255), (255, 255, 0), (0, 255, 255))
    assert right.axis_rgb == ((255, 0, 255), (255, 0, 0), (0, 255, 0))
    assert {(arm.tool_m, arm.axis_m, arm.radius_px, arm.thickness_px) for arm in AGIBOT_G1.arms} == {(0.23, 0.1, 50.0, 8.0)}
    np.testing.assert_allclose(openness([0, 60, 120]), [0, 0.5, 1])


@pytest.mark.parametrize(
    "change",
    [
        {"gripper_step": 0.0},
        {"gripper_step": 1.5},
        {"decay": (1.0,) * 6},
        {"arms": ()},
        {"arms": AGIBOT_G1.arms[::-1]},
        {"example_pose": (0, 0, 0, 0, 0, 0, 2.0)},
        {"example_gripper": 1.2},
    ],
    ids=str,
)
def test_a_robot_that_cannot_be_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="agibot_g1"):
        dataclasses.replace(AGIBOT_G1, **change)


def test_an_arm_that_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match="above 0"):
        dataclasses.replace(AGIBOT_G1.arms[0], radius_px=0.0)

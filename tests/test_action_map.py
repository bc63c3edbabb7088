"""Action maps: OpenCV's pixels against the definition, and what must hold for any camera, robot and size."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from worldenv import action_map
from worldenv.kernels.action_map import Brush, paint, paint_ref
from worldenv.nouns import Camera, StatePath
from worldenv.robots.agibot_g1 import AGIBOT_G1
from worldenv.robots.panda import PANDA
from worldenv.robots.tabletop import TABLETOP

AXES = ((0, 0, 255), (255, 255, 0), (0, 255, 255))
DOWN = (1.0, 0.0, 0.0, 0.0)


def above(height: int = 64, width: int = 64, mirrored: bool = False) -> Camera:
    """A camera 0.8 m above the table's middle that looks straight down; the picture's up is world +y."""
    to_world = np.eye(4)
    to_world[:3, :3] = np.diag([1.0, -1.0, -1.0])
    to_world[2, 3] = 0.8
    focal = 1.2 * height
    return Camera(np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]]), to_world, height, width, mirrored)


def path(places: list[tuple[float, float, float]], gripper: float = 1.0) -> StatePath:
    """One rollout through `places` [m], pointing down."""
    pose = torch.tensor([[(*place, *DOWN) for place in places]], dtype=torch.float64)
    return StatePath(pose, torch.full((1, len(places)), gripper, dtype=torch.float64))


def before(of: StatePath) -> tuple[torch.Tensor, torch.Tensor]:
    return of.pose[:, 0], of.gripper[:, 0]


@settings(max_examples=40, deadline=None)
@given(
    points=st.lists(st.tuples(st.integers(-60, 120), st.integers(-60, 120)), min_size=8, max_size=8),
    radius=st.integers(1, 25), thickness=st.integers(1, 9), size=st.sampled_from([(40, 64), (64, 64), (33, 47)]),
)  # fmt: skip
def test_opencv_paints_the_definition(points: list[tuple[int, int]], radius: int, thickness: int, size: tuple[int, int]) -> None:
    pixels = np.array(points, dtype=np.int64).reshape(1, 2, 4, 2)
    colours = np.array([[[10, 20, 30], [200, 100, 0]]], dtype=np.uint8)
    brushes = [Brush(radius, thickness, AXES), Brush(radius, thickness, AXES[::-1])]
    ours = paint(pixels, colours, brushes, size, 50)
    want = paint_ref(pixels, colours, brushes, size, 50)
    assert ours.shape == want.shape == (1, *size, 3)
    # Discs are equal; lines are not, at their edges: two arms of three lines, each up to about the picture's diagonal long.
    edge_pixels = 6 * 2 * (size[0] + size[1])
    assert int((ours != want).any(-1).sum()) <= 0.35 * edge_pixels


def test_discs_are_exact() -> None:
    for radius in (1, 4, 5, 25, 50):
        pixels = np.array([[[[30, 20]] * 4]], dtype=np.int64)
        args = (pixels, np.array([[[1, 2, 3]]], np.uint8), [Brush(radius, 1, ((1, 2, 3),) * 3)], (64, 80), 0)
        assert torch.equal(paint(*args), paint_ref(*args))


def test_palettes_are_matplotlibs() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    openness = np.linspace(-0.1, 1.2, 1301)
    for name in ("Greens", "Reds"):
        palette = matplotlib.colormaps[name]
        want = np.array([[int(channel * 255) for channel in palette(max(0.0, float(x)))[:3]] for x in openness])
        np.testing.assert_array_equal(action_map.shade(name, openness), want)


def test_draw_has_one_arm_and_an_absent_one() -> None:
    moved = path([(0.0, 0.0, 0.1), (0.01, 0.0, 0.1), (0.01, -0.02, 0.1)], gripper=0.25)
    drawn = action_map.draw(
        moved, (moved.pose[:, 0] - torch.tensor([0.002, 0, 0, 0, 0, 0, 0]), torch.ones(1, dtype=torch.float64)), above(), TABLETOP, (8, 8)
    )
    assert drawn.picture.shape == (1, 3, 64, 64, 3)
    (arm,) = TABLETOP.arms
    left, right = drawn.delta.split(7, dim=-1)
    own, absent = (left, right) if arm.side == "left" else (right, left)
    assert absent.abs().max() == 0
    want = [[0.002, 0, 0, 0, 0, 0, 0.25], [0.01, 0, 0, 0, 0, 0, 0.25], [0, -0.02, 0, 0, 0, 0, 0.25]]
    torch.testing.assert_close(own[0], torch.tensor(want), rtol=0, atol=1e-7)
    disc = torch.from_numpy(action_map.shade(arm.palette, np.array(0.25)))
    for k, (x, y) in enumerate([(0.0, 0.0), (0.01, 0.0), (0.01, -0.02)]):
        u, v = 32 + 76.8 * x / 0.7, 32 - 76.8 * y / 0.7
        shown = (drawn.picture[0, k] == disc).all(-1).nonzero().float()
        assert len(shown) > 20
        assert (shown.mean(0) - torch.tensor([v, u])).abs().max() < 2.5
    assert (drawn.picture[0, 0, 0, 0] == TABLETOP.background).all()


def test_the_gripper_shows_how_far_it_is_open() -> None:
    shut, opened = (action_map.draw(p := path([(0.0, 0.0, 0.1)], g), before(p), above(), TABLETOP, (8, 8)) for g in (0.0, 1.0))
    assert (shut.picture != opened.picture).any()


def test_off_the_canvas_nothing_is_drawn() -> None:
    far = path([(5.0, 0.0, 0.1)])
    drawn = action_map.draw(far, before(far), above(), TABLETOP, (8, 8))
    assert (drawn.picture == TABLETOP.background).all()


def test_behind_the_camera_is_drawn_mirrored_and_in_its_plane_not_at_all() -> None:
    behind = path([(0.05, 0.1, 1.5)])  # 0.7 m behind, as (-0.05, -0.1) would be in front
    front = path([(-0.05, -0.1, 0.1)])
    disc = torch.from_numpy(action_map.shade(TABLETOP.arms[0].palette, np.array(1.0)))
    places = []
    for one in (behind, front):
        picture = action_map.draw(one, before(one), above(), TABLETOP, (8, 8)).picture[0, 0]
        places.append((picture == disc).all(-1).nonzero().float().mean(0))
    assert (places[0] - places[1]).abs().max() < 2.0
    plane = path([(0.1, 0.0, 0.8)])
    assert (action_map.draw(plane, before(plane), above(), TABLETOP, (8, 8)).picture == TABLETOP.background).all()


def test_a_mirrored_camera_mirrors_pixels_and_rays() -> None:
    pose, straight, mirrored = np.array([[[0.03, 0.05, 0.1, *DOWN]]]), above(), above(mirrored=True)
    u, v = np.moveaxis(action_map.project(pose, straight, TABLETOP.arms), -1, 0)
    other = np.moveaxis(action_map.project(pose, mirrored, TABLETOP.arms), -1, 0)
    np.testing.assert_allclose(other, [63 - u, v])
    assert torch.equal(action_map.rays(mirrored, (8, 8)), action_map.rays(straight, (8, 8)).flip(-1))


def test_rays_lead_where_points_are_seen() -> None:
    """A point on the ray of a latent pixel's centre is projected onto that centre."""
    tilted = above(320, 512)
    turn = action_map.rotation(np.array([0.2, -0.1, 0.3, np.sqrt(1 - 0.14)]))
    tilted = dataclasses.replace(
        tilted, camera_to_world=np.block([[turn, np.array([[0.3], [-0.2], [1.1]])], [np.zeros((1, 3)), np.ones((1, 1))]])
    )
    ray = action_map.rays(tilted, (40, 64)).double().numpy()
    np.testing.assert_allclose(np.linalg.norm(ray[:3], axis=0), 1.0, atol=1e-6)
    points = ray[3:] + 0.7 * ray[:3]
    pose = np.concatenate([points.reshape(3, -1).T, np.tile(DOWN, (40 * 64, 1))], axis=1)[:, None]
    arm = dataclasses.replace(PANDA.arms[0], yaw_rad=0.0, tool_m=0.0)
    u, v = action_map.project(pose, tilted, [arm])[:, 0, 0].T
    j, i = np.meshgrid(np.arange(64), np.arange(40))
    np.testing.assert_allclose(u, (j.ravel() + 0.5) * 8, atol=1e-3)
    np.testing.assert_allclose(v, (i.ravel() + 0.5) * 8, atol=1e-3)


def test_sizes_scale_with_the_picture() -> None:
    """The same scene at twice the size paints about four times the pixels, at twice the coordinates."""
    camera = above(160, 160)
    still = path([(0.02, 0.03, 0.1)])
    small = action_map.draw(still, before(still), camera, PANDA, (20, 20)).picture[0, 0]
    large = action_map.draw(still, before(still), action_map.resized(camera, 320, 320), PANDA, (40, 40)).picture[0, 0]
    painted = [(p != PANDA.background).any(-1) for p in (small, large)]
    assert abs(float(painted[1].sum()) / float(painted[0].sum()) - 4.0) < 0.3
    centres = [p.nonzero().double().mean(0) for p in painted]
    assert (centres[1] / centres[0] - 2.0).abs().max() < 0.03


def test_two_arms_keep_their_sides() -> None:
    pose = np.tile(np.array([0.0, 0.0, 0.1, *DOWN]), (3, 2, 1))
    pose[1, 0, 0] += 0.01
    pose[2, 1, 2] += 0.02
    delta = action_map.deltas(pose, np.array([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]]), AGIBOT_G1.arms)
    assert delta.shape == (2, 14)
    np.testing.assert_allclose(delta[0, [0, 6, 7, 9, 13]], [0.01, 0.3, -0.0, 0.0, 0.4], atol=1e-12)
    np.testing.assert_allclose(delta[1, [0, 6, 7, 9, 13]], [-0.01, 0.5, 0.0, 0.02, 0.6], atol=1e-12)


@pytest.mark.parametrize("pitch", [90.0, -90.0])
def test_where_roll_and_yaw_are_one_turn_yaw_is_none(pitch: float) -> None:
    # pointing forward, as the AgiBot's example pose does: there the angles of rounding would be deltas of up to pi
    half = np.radians([pitch, 40.0, 10.0]) / 2
    rolls = [np.array([np.sin(roll), 0.0, 0.0, np.cos(roll)]) for roll in half[1:]]
    y, w = np.sin(half[0]), np.cos(half[0])
    turned = [np.array([w * x, y * c, -y * x, w * c]) for x, _, _, c in rolls]  # first about x, then about y
    pose = np.stack([np.concatenate([[0.0, 0.0, 0.1], q]) for q in turned])[:, None]
    delta = action_map.deltas(pose, np.zeros((2, 1)), AGIBOT_G1.arms[:1])
    np.testing.assert_allclose(np.degrees(delta[0, 3:6]), [-30.0, 0.0, 0.0], atol=1e-9)


def test_draw_refuses_batches_that_differ() -> None:
    still = path([(0.0, 0.0, 0.1)])
    with pytest.raises(ValueError, match="before"):
        action_map.draw(still, (still.pose, still.gripper), above(), TABLETOP, (8, 8))
    with pytest.raises(ValueError, match="want"):
        paint(np.zeros((1, 2, 4, 2), np.int64), np.zeros((1, 1, 3), np.uint8), [Brush(1, 1, AXES)], (8, 8), 0)


def test_drawn_gripper_is_in_the_picture_or_not() -> None:
    """Before the camera, beside its picture, and behind it, where projection alone would see it again."""
    camera = Camera(np.array([[60.0, 0, 32], [0, 60.0, 32], [0, 0, 1]]), np.eye(4), 64, 64)
    arm = dataclasses.replace(TABLETOP.arms[-1], tool_m=0.0)
    place = np.array([[0.0, 0, 0.5], [0.25, 0, 0.5], [0.3, 0, 0.5], [0.0, 0, -0.5], [0.0, -0.27, 0.5], [0.0, -0.28, 0.5]])
    pose = np.concatenate([place, np.tile([0.0, 0, 0, 1], (len(place), 1))], axis=1)
    want = [True, True, False, False, True, False]
    assert action_map.in_picture(pose, camera, arm).tolist() == want
    mirrored = dataclasses.replace(camera, mirrored=True)
    assert action_map.in_picture(pose * [-1, 1, 1, 1, 1, 1, 1], mirrored, arm).tolist() == want


def test_a_turn_through_half_a_circle_is_a_small_delta() -> None:
    """A gripper that points down has a roll of pi: a little further, and the angle is -pi."""
    arm = TABLETOP.arms_at(64)[-1:]
    rolls = np.array([np.pi - 0.03, np.pi + 0.02, np.pi - 0.01])
    quaternion = np.stack([np.sin(rolls / 2), 0 * rolls, 0 * rolls, np.cos(rolls / 2)], axis=-1)
    pose = np.concatenate([np.zeros((3, 3)), quaternion], axis=-1)[:, None]
    moved = action_map.deltas(pose, np.ones((3, 1)), arm)
    first = 0 if arm[0].side == "left" else 7
    np.testing.assert_allclose(moved[:, first + 3 : first + 6], [[0.05, 0, 0], [-0.03, 0, 0]], atol=1e-9)

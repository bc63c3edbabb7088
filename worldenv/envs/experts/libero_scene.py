"""What LIBERO's experts see: a scene as plain arrays, read from the simulator. Nothing here decides anything.

World frame [m]. The gripper's own frame has x along the line between the fingers, z out of the palm; `Scene.place` is LIBERO's `robot0_eef_pos`,
the point between the fingertips. Collision geometry stands for every object, as boxes, which is what LIBERO's objects are made of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]

PREDICATES = {"on": 2, "in": 2, "open": 1, "close": 1, "turnon": 1}
"""LIBERO's goal predicates that an expert can be asked for, and their number of arguments."""

_MESH, _PLANE = 7, 0
_HANGING_M = 0.012  # what touches nothing and is nearer to the fingertips' point than this hangs in the gripper


@dataclass(frozen=True)
class Goal:
    """One predicate of a task's goal, as LIBERO's BDDL parser gives it: `in alphabet_soup_1 basket_1_contain_region`."""

    predicate: str
    what: str
    """An object, a region with a joint, or a fixture."""
    where: str = ""
    """An object or a region, for predicates of two arguments."""


def parse_goals(state: Sequence[Sequence[str]]) -> tuple[Goal, ...]:
    """Goals of a parsed BDDL `goal_state`, in its order.

    ValueError for a predicate or number of arguments that no expert knows.
    """
    goals = []
    for predicate, *arguments in state:
        if PREDICATES.get(predicate.lower()) != len(arguments):
            raise ValueError(f"goal {predicate} {' '.join(arguments)}: experts know {', '.join(f'{p} with {n}' for p, n in PREDICATES.items())}")
        goals.append(Goal(predicate.lower(), *arguments))
    return tuple(goals)


@dataclass(frozen=True)
class Body:
    """An object or a fixture."""

    kind: str
    """LIBERO's category: `akita_black_bowl`."""
    place: Doubles
    """(3,) origin [m]."""
    turn: Doubles
    """(3, 3) its axes as columns."""


@dataclass(frozen=True)
class Region:
    """A box that predicates speak of; it moves with the part that it is fixed to."""

    place: Doubles
    """(3,) centre [m]."""
    turn: Doubles
    """(3, 3) its axes as columns."""
    half: Doubles
    """(3,) half sizes along its axes [m]."""
    owner: str
    """The object or fixture that it belongs to; "" is the room: a part of a table or a floor."""
    joint: str = ""
    """The joint that moves it, if any."""


@dataclass(frozen=True)
class Boxes:
    """n collision boxes."""

    centre: Doubles
    """(n, 3) [m]."""
    turn: Doubles
    """(n, 3, 3) axes as columns."""
    half: Doubles
    """(n, 3) half sizes [m]."""
    owner: NDArray[np.str_]
    """(n,) name of the object or fixture; "" is the room: table, floor, walls."""

    def of(self, *owners: str) -> Boxes:
        """Those that belong to `owners`."""
        return self._where(np.isin(self.owner, owners))

    def without(self, *owners: str) -> Boxes:
        """Those that do not belong to `owners`."""
        return self._where(~np.isin(self.owner, owners))

    def near(self, place: Doubles, radius: float) -> Boxes:
        """Those that come within `radius` [m] of `place` (3,), and perhaps some that do not."""
        return self._where(np.linalg.norm(self.centre - place, axis=1) - np.linalg.norm(self.half, axis=1) < radius)

    def _where(self, mask: NDArray[np.bool_]) -> Boxes:
        return Boxes(self.centre[mask], self.turn[mask], self.half[mask], self.owner[mask])

    def reach(self) -> Doubles:
        """(n, 3) half sizes of the upright boxes around them [m]."""
        reach: Doubles = np.einsum("nij,nj->ni", np.abs(self.turn), self.half)
        return reach

    def bounds(self, place: Doubles, turn: Doubles) -> tuple[Doubles, Doubles]:
        """Lowest and highest corner (3,) of all boxes in the frame at `place` with axes `turn` [m]."""
        centre = (self.centre - place) @ turn
        reach = np.einsum("nij,nj->ni", np.abs(np.einsum("ki,nkj->nij", turn, self.turn)), self.half)
        return (centre - reach).min(0), (centre + reach).max(0)

    def distance(self, points: Doubles) -> Doubles:
        """(p,) distance from each of `points` (p, 3) to the nearest box, negative inside [m]; infinite where there are none."""
        if not len(self.half):
            return np.full(len(points), np.inf)
        local = np.abs(np.matmul((points - self.centre[:, None]), self.turn)) - self.half[:, None]  # (n, p, 3)
        outside = np.sqrt(np.square(np.maximum(local, 0.0)).sum(2))
        return np.asarray((outside + np.minimum(local.max(2), 0.0)).min(0), np.float64)


@dataclass(frozen=True)
class Scene:
    """One moment."""

    place: Doubles
    """(3,) the point between the fingertips [m]."""
    turn: Doubles
    """(3, 3) the gripper's axes as columns."""
    opening: float
    """Distance between the fingers [m], 0 .. 0.08."""
    held: str
    """The object in the gripper, or ""."""
    base: Doubles
    """(3,) where the robot stands [m]."""
    bodies: dict[str, Body]
    regions: dict[str, Region]
    boxes: Boxes
    joints: dict[str, float]
    """Position of each joint of a fixture [m or rad]."""
    goals: tuple[Goal, ...]
    met: tuple[bool, ...]
    """Whether each goal's predicate holds, by LIBERO."""


def _owners(inner: Any) -> NDArray[np.str_]:
    """(ngeom,) the object that each geometry belongs to, "" for the room, "robot" for the robot."""
    model = inner.sim.model
    name_of_root = {model.body_rootid[body]: name for name, body in inner.obj_body_id.items()}
    for body in range(model.nbody):
        if model.body_id2name(body).startswith(("robot0", "gripper0", "mount0")):
            name_of_root[model.body_rootid[body]] = "robot"
    return np.array([name_of_root.get(model.body_rootid[body], "") for body in model.geom_bodyid])


def _held(inner: Any, owner: NDArray[np.str_], boxes: Boxes, place: Doubles) -> str:
    """The object that both fingers touch, or that hangs between them touching nothing else: contacts of a firm grip flicker."""
    fingers = inner.robots[0].gripper.important_geoms
    touching = inner.sim.data.contact.geom.reshape(-1, 2)
    pairs = owner[touching]
    sides = [np.isin(touching, [inner.sim.model.geom_name2id(name) for name in fingers[finger]]).any(1) for finger in ("left_finger", "right_finger")]
    for name in inner.objects_dict:
        with_it = (pairs == name).any(1)
        if all((with_it & side).any() for side in sides):
            return str(name)
        if set(pairs[with_it].ravel()) <= {name, "robot"} and boxes.of(name).distance(place[None])[0] < _HANGING_M:
            return str(name)
    return ""


def look(inner: Any) -> Scene:
    """The scene as it is now in LIBERO's domain `inner` (a `BDDLBaseDomain`). ValueError for a goal that no expert knows."""
    model, data = inner.sim.model, inner.sim.data
    problem = inner.parsed_problem
    kinds = {name: kind for group in ("objects", "fixtures") for kind, names in problem[group].items() for name in names}
    bodies = {
        name: Body(kinds[name], data.body_xpos[body].copy(), data.body_xmat[body].reshape(3, 3).copy()) for name, body in inner.obj_body_id.items()
    }
    regions, joints = {}, {}
    for name, site in inner.object_sites_dict.items():
        joint = site.joints[0] if site.joints else ""
        if joint:
            joints[joint] = float(data.qpos[model.get_joint_qpos_addr(joint)])
        regions[name] = Region(data.get_site_xpos(name).copy(), data.get_site_xmat(name).copy(), np.array(site.size), site.parent_name or "", joint)
    for name in inner.fixtures_dict:
        for joint in inner.get_object(name).joints:
            joints[joint] = float(data.qpos[model.get_joint_qpos_addr(joint)])
    owner = _owners(inner)
    solid = ((model.geom_contype > 0) | (model.geom_conaffinity > 0)) & (owner != "robot")
    solid &= (model.geom_type != _MESH) & (model.geom_type != _PLANE)
    half = model.geom_size[solid].copy()
    round_ = np.isin(model.geom_type[solid], (3, 5))  # capsule, cylinder: size is (radius, half length)
    half[round_, 2], half[round_, 1] = half[round_, 1] + np.where(model.geom_type[solid] == 3, half[:, 0], 0.0)[round_], half[round_, 0]
    boxes = Boxes(data.geom_xpos[solid].copy(), data.geom_xmat[solid].reshape(-1, 3, 3).copy(), half, owner[solid])
    robot = inner.robots[0]
    grip = model.site_name2id("gripper0_grip_site")
    fingers = [data.qpos[i] for i in robot._ref_gripper_joint_pos_indexes]
    goals = parse_goals(problem["goal_state"])
    met = tuple(bool(inner._eval_predicate([g.predicate, g.what, *([g.where] if g.where else [])])) for g in goals)
    place, turn = data.site_xpos[grip].copy(), data.site_xmat[grip].reshape(3, 3).copy()
    return Scene(
        place, turn, float(fingers[0] - fingers[1]), _held(inner, owner, boxes, place), data.body_xpos[model.body_name2id("robot0_base")].copy(),
        bodies, regions, boxes, joints, goals, met,
    )  # fmt: skip

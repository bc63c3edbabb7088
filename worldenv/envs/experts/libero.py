"""Scripted experts for LIBERO: pick, place, turn, pull and push, by where things are. A task is what its BDDL goal asks for.

What an expert does is a function of the scene as it is now, without memory, so that it can be imitated from single observations: which
goal is next, whether its object is held, whether the gripper is over it, and whether it is where it belongs all show in the scene.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from worldenv.envs.experts.libero_scene import Boxes, Doubles, Goal, Scene, look
from worldenv.envs.libero import Libero

TASKS: dict[str, tuple[int, ...]] = {
    "libero_spatial": (0, 1, 2, 3, 4, 5, 6, 7, 8, 9),
    "libero_object": (0, 1, 2, 3, 4, 5, 6, 7, 8, 9),
    "libero_goal": (1, 2, 4, 6, 7, 8),
    "libero_10": (0, 1, 2, 4, 5, 6, 7, 8),
}
"""Tasks of each suite that there is an expert for. The others open drawers, close doors, push, or reach into a rack or a microwave."""

VARIATION = 6
"""Numbers in (0, 1) that make one demonstration differ from another."""

_OPEN, _SHUT = -1.0, 1.0
_POSITION_SCALE, _ROTATION_SCALE = 0.05, 0.5  # what a command of 1 asks for [m, rad]

_HAND = np.array([0.104, 0.032])  # half size of the palm, along the fingers' line and across
_PALM = 0.031  # from the fingertips' point up to the palm
_REST_M = 0.08  # over everything near, when all is done
_CARRIED_M = 0.08  # what is put down comes from this much higher: there too, the elbow must not be straight, or the arm is stuck
_FINGER_ROOM_M = 0.035  # beside what is put down, for a finger that opens
_NARROW_M = 0.035  # half a compartment that is narrower than this decides how things stand in it
_TIP = 0.010  # from the fingertips' point down to the end of the fingers
_WIDEST = 0.076  # what fits between the open fingers
_OPENED = 0.065  # from here on the gripper counts as open

# Of the Panda, fingers down: the wrist is 0.21 m over the fingertips' point and 0.088 m behind it, 0.316 and 0.384 m are upper arm and forearm
_SHOULDER, _WRIST_UP, _WRIST_BACK, _ARM = 0.333, 0.21, 0.088, 0.685


@dataclass(frozen=True)
class Manner:
    """What may differ between demonstrations of the same task."""

    briskness: float
    """Share of the way that a command asks for."""
    limit: float
    """Largest command."""
    height: float
    """Clearance over what is passed [m]."""
    depth: float
    """How much deeper than usual it grips [m]."""
    taste: float
    """Which of several good grasps it likes, 0 .. 1."""
    aside: float
    """Where on the target it puts things, off the middle, -1 .. 1."""

    @classmethod
    def of(cls, variation: NDArray[np.float64]) -> Manner:
        """From `variation` (VARIATION,) in (0, 1)."""
        v = variation
        return cls(0.5 + 0.2 * v[0], 0.9 + 0.1 * v[1], 0.015 + 0.02 * v[2], 0.004 * (v[3] - 0.5), v[4], 2.0 * v[5] - 1.0)


@dataclass(frozen=True)
class Grasp:
    """Where the gripper closes: fingers down, the line between them turned by `yaw` from world y."""

    place: Doubles
    """(3,) of the fingertips' point [m]."""
    yaw: float
    """[rad]; a half turn is the same grasp."""


@dataclass(frozen=True)
class Rim:
    """How a hollow object is gripped: over its wall."""

    centre: tuple[float, float]
    """Of the opening, in the object's frame [m]."""
    radius: float
    """Of the middle of the wall [m]."""
    height: float
    """Of the fingertips' point over the object's origin [m]."""
    handle: float | None = None
    """Direction of a handle in the object's frame [rad]."""


RIMS = {
    "akita_black_bowl": Rim((0.0, 0.0), 0.0475, 0.040),
    "porcelain_mug": Rim((0.016, 0.0), 0.041, 0.093, np.pi),
    "white_yellow_mug": Rim((-0.018, 0.0), 0.042, 0.088, 0.0),
}
"""Kinds that are too wide to be gripped across."""

_HANDLES = {"moka_pot": (0.0, 0.073, 0.042)}
"""Kinds that are gripped by a handle: the fingertips' point in the object's frame [m]; the fingers close along its x."""

_KNOBS = {"flat_stove": (-0.004, 0.032)}
"""Of a knob whose bar lies along its fixture's x when it is off: the middle of the bar, and the height at which it is gripped [m]."""
_KNOB_GRIPPED_M = 0.045  # fingers nearer than this have the bar between them
_KNOB_TWIST = 0.8  # how far the gripper is asked to turn ahead of the knob [rad]


@dataclass(frozen=True)
class Target:
    """What the gripper is to do next."""

    place: Doubles
    """(3,) of the fingertips' point [m]."""
    yaw: float
    """Of the line between the fingers, from world y [rad]."""
    fingers: float
    """-1 opens, +1 shuts."""


def _up(height: float) -> Doubles:
    return np.array([0.0, 0.0, height])


def yaw_of(turn: Doubles) -> float:
    """Angle of the gripper's line between the fingers from world y [rad]; a half turn is the same."""
    x, y = turn[:2, 0]
    return float(np.arctan2(-x, y))


def _half_turn(angle: float) -> float:
    """`angle` brought into -pi/2 .. pi/2: a gripper turned by pi is the same gripper."""
    return float((angle + np.pi / 2) % np.pi - np.pi / 2)


def downward(yaw: float) -> Doubles:
    """(3, 3) axes of a gripper that points down with its fingers' line at `yaw` from world y."""
    s, c = np.sin(yaw), np.cos(yaw)
    return np.array([[-s, c, 0.0], [c, s, 0.0], [0.0, 0.0, -1.0]])


def clear_height(boxes: Boxes, start: Doubles, end: Doubles) -> float:
    """Height of the fingertips' point [m] at which an empty gripper passes over all `boxes` on the straight way from `start` to `end`."""
    if not len(boxes.half):
        return -np.inf
    reach = boxes.reach()
    points = start[:2] + np.linspace(0.0, 1.0, 12)[:, None] * (end[:2] - start[:2])
    gap = np.maximum(np.abs(points[:, None] - boxes.centre[:, :2]) - reach[:, :2], 0.0)
    near = np.linalg.norm(gap, axis=2).min(0)
    top = boxes.centre[:, 2] + reach[:, 2]
    under_fingers = top[near < 0.06].max(initial=-np.inf) + _TIP
    under_palm = top[near < _HAND[0] + 0.01].max(initial=-np.inf) - _PALM
    return float(max(under_fingers, under_palm))


def beyond(scene: Scene, place: Doubles) -> float:
    """How far `place` (3,) lies out of the arm's reach, fingers down [m]; not positive where it can go."""
    rise = place[2] + _WRIST_UP - scene.base[2] - _SHOULDER
    return float(np.linalg.norm(place[:2] - scene.base[:2]) - np.sqrt(max(_ARM**2 - rise**2, 0.0)) - _WRIST_BACK)


_HAND_POINTS = np.array(
    [(side * out, a, h) for side in (-1, 1) for out in (0.014, 0.029, 0.044) for a in (-0.008, 0.008) for h in (-_TIP, 0.01, 0.03)]
    + [(side * out, a, h) for side in (-1, 1) for out in (0.045, 0.075, 0.104) for a in (-0.032, 0.032) for h in (0.035, 0.075, 0.115)]
)
"""(p, 3) points of open fingers, of the ways on which they close, and of the palm: along the line between the fingers, across it, and up."""


def _hand_points(grasp: Grasp) -> Doubles:
    """(p, 3) points of the gripper at `grasp`, in the world."""
    s, c = np.sin(grasp.yaw), np.cos(grasp.yaw)
    turned: Doubles = _HAND_POINTS @ np.array([[-s, c, 0.0], [c, s, 0.0], [0.0, 0.0, 1.0]])
    return grasp.place + turned


def grasps(scene: Scene, name: str, manner: Manner) -> list[Grasp]:
    """All ways to grip `name` from above."""
    body = scene.bodies[name]
    boxes = scene.boxes.of(name)
    rim = RIMS.get(body.kind)
    if rim:
        facing = np.arctan2(body.turn[1, 0], body.turn[0, 0])
        middle = body.place + body.turn @ np.array([*rim.centre, 0.0])
        found = []
        for k in range(16):
            angle = np.pi / 8 * k
            if rim.handle is not None and abs(np.angle(np.exp(1j * (angle - facing - rim.handle)))) < 0.9:
                continue
            out = np.array([np.cos(angle), np.sin(angle), 0.0])
            found.append(Grasp(middle + rim.radius * out + [0.0, 0.0, rim.height - manner.depth], _half_turn(angle - np.pi / 2)))
        return found
    handle = _HANDLES.get(body.kind)
    if handle:
        yaw = np.arctan2(body.turn[1, 0], body.turn[0, 0]) - np.pi / 2
        return [Grasp(body.place + body.turn @ np.array(handle) - [0.0, 0.0, manner.depth], _half_turn(yaw))]
    low, high = boxes.bounds(np.zeros(3), np.eye(3))
    found = []
    for axis in range(3):
        direction = body.turn[:, axis]
        if abs(direction[2]) > 0.7:
            continue
        frame = np.column_stack([direction, np.cross([0.0, 0.0, 1.0], direction), [0.0, 0.0, 1.0]])
        near, far = boxes.bounds(body.place, frame)
        if far[0] - near[0] > _WIDEST:
            continue
        middle = body.place + frame @ ((near + far) / 2 * [1, 1, 0])
        height = max((low[2] + high[2]) / 2, high[2] - 0.026) - manner.depth
        height = max(height, low[2] + _TIP + 0.001)
        found.append(Grasp(np.array([middle[0], middle[1], height]), _half_turn(np.arctan2(direction[1], direction[0]) - np.pi / 2)))
    return found


def best_grasp(scene: Scene, goal: Goal, manner: Manner) -> Grasp:
    """The grasp of the goal's object that keeps clear of everything else, here, and within reach there; then with the least turning, and to taste."""
    name = goal.what
    spot = _spot(scene, goal, manner)
    others = scene.boxes.without(name).near(scene.bodies[name].place, 0.25)
    candidates = grasps(scene, name, manner)
    if not candidates:
        raise ValueError(f"{name} ({scene.bodies[name].kind}) is too wide to be gripped, and no other grasp is known")
    scores = []
    distance = others.distance(np.concatenate([_hand_points(grasp) for grasp in candidates])).reshape(len(candidates), -1).min(1)
    for grasp, clear in zip(candidates, distance, strict=True):
        side = np.cos(np.arctan2(*(grasp.place - scene.bodies[name].place)[1::-1]) - 2 * np.pi * manner.taste)
        there = spot + grasp.place - scene.bodies[name].place
        far = max(beyond(scene, grasp.place), 0.0) + max(beyond(scene, there), 0.0)
        scores.append(min(clear, 0.015) - far - 0.004 * abs(grasp.yaw) + 0.002 * side)
    return candidates[int(np.argmax(scores))]


def _over(scene: Scene, place: Doubles, yaw: float, boxes: Boxes, hang: float, manner: Manner, fingers: float) -> Target:
    """On the way to `place`: up, across, down, as one smooth way; `hang` is how far what is held reaches below the fingertips' point."""
    here = scene.place
    way = place[:2] - here[:2]
    distance = float(np.linalg.norm(way))
    off = max(distance, 0.03 * abs(_half_turn(yaw - yaw_of(scene.turn))))
    if off < 0.02:
        height = place[2] + 4.0 * max(off - 0.005, 0.0)
        return Target(np.array([place[0], place[1], height]), yaw, fingers)
    needed = max(clear_height(boxes, here, place) + hang + manner.height, place[2] + 0.02)
    free = np.clip(1.0 - (needed - 0.01 - here[2]) / 0.03, 0.0, 1.0)
    return Target(np.array([*(here[:2] + free * way), needed]), yaw, fingers)


def _pick(scene: Scene, goal: Goal, manner: Manner) -> Target:
    grasp = best_grasp(scene, goal, manner)
    off = scene.place - grasp.place
    closing = scene.opening < _OPENED
    slack = 2.0 if closing else 1.0  # a gripper that has begun to close goes on
    turned = abs(_half_turn(grasp.yaw - yaw_of(scene.turn)))
    if np.linalg.norm(off[:2]) < 0.006 * slack and abs(off[2]) < 0.008 * slack and turned < 0.1 * slack and scene.opening > 0.004:
        return Target(grasp.place, grasp.yaw, _SHUT)
    if closing and off[2] < 0.03 and np.linalg.norm(off[:2]) < 0.03:  # shut beside it: up before it opens, or it would close again here
        return Target(scene.place + _up(0.05), grasp.yaw, _SHUT if scene.opening < 0.004 else _OPEN)
    return _over(scene, grasp.place, grasp.yaw, scene.boxes, 0.0, manner, _OPEN)


def _free_part(scene: Scene, name: str, place: Doubles, reach: Doubles) -> Doubles:
    """(2,) From the middle `place` of a table's region to the nearest part of it that has room for `name` and the fingers at its sides [m]."""
    others = scene.boxes.without(name, "").near(place, 0.3)
    low, high = scene.boxes.of(name).bounds(np.zeros(3), np.eye(3))
    shares = np.linspace(-0.8, 0.8, 9)
    steps: Doubles = np.stack(np.meshgrid(shares * reach[0], shares * reach[1]), axis=-1).reshape(-1, 2)
    gap = np.abs(place[:2] + steps[:, None] - others.centre[:, :2]) - others.reach()[:, :2] - (high - low)[:2] / 2
    room = gap.max(2).min(1, initial=_FINGER_ROOM_M)
    best: Doubles = steps[int(np.argmax(room - 0.1 * np.linalg.norm(steps, axis=1)))]
    return best


def _spot(scene: Scene, goal: Goal, manner: Manner) -> Doubles:
    """(3,) Where the origin of the goal's object is to be put: the middle of the target, or of the part that is free; z is the support [m]."""
    aside = 0.006 * manner.aside
    if goal.where in scene.bodies:
        body = scene.bodies[goal.where]
        boxes = scene.boxes.of(goal.where)
        reach = boxes.reach()
        over = (np.abs(boxes.centre[:, :2] - body.place[:2]) < reach[:, :2]).all(1)
        top = (boxes.centre[:, 2] + reach[:, 2])[over].max(initial=body.place[2])
        return np.array([body.place[0], body.place[1] + aside, top])
    region = scene.regions[goal.where]
    place = region.place.copy()
    reach = np.abs(region.turn @ region.half)
    place[2] -= reach[2]
    if not region.owner:
        place[:2] += _free_part(scene, goal.what, place, reach)
    place[1] += aside
    others = [g.what for g in scene.goals if g.where == goal.where and g.what != goal.what]
    if others:  # two things that share a region lie side by side, along the side on which they are narrow
        low, high = scene.boxes.of(goal.what).bounds(np.zeros(3), np.eye(3))
        axis = int(np.argmin(np.round((high - low)[:2], 2)[::-1]) == 0)
        half = (high - low)[axis] / 2 + 0.002
        place[axis] += (-1.0 if goal.what < others[0] else 1.0) * min(half, (0.33 if goal.predicate == "in" else 0.6) * reach[axis])
    return place


def _held_offset(scene: Scene, goal: Goal) -> tuple[Doubles, float]:
    """How the gripper holds the goal's object: from its origin to the fingertips' point (3,) [m], and how far it hangs below that point [m]."""
    low, _ = scene.boxes.of(goal.what).bounds(np.zeros(3), np.eye(3))
    return scene.place - scene.bodies[goal.what].place, max(scene.place[2] - low[2], 0.0)


def _place(scene: Scene, goal: Goal, manner: Manner) -> Target:
    """Carry what is held to where it belongs, and let go of it there."""
    spot = _spot(scene, goal, manner)
    offset, hang = _held_offset(scene, goal)
    rest = scene.boxes.without(goal.what)
    yaw = yaw_of(scene.turn)
    place = np.array([spot[0] + offset[0], spot[1] + offset[1], spot[2] + hang + 0.008])
    slack = 0.008
    if goal.where in scene.regions:
        region = scene.regions[goal.where]
        reach = np.abs(region.turn @ region.half)[:2]
        far = beyond(scene, place + _up(_CARRIED_M))
        if far > 0.0:  # into reach, as far as the region goes
            inward = scene.base[:2] - place[:2]
            shift = (far + 0.01) * inward / np.linalg.norm(inward)
            place[:2] += np.clip(shift, -np.maximum(reach - 0.03, 0.0), np.maximum(reach - 0.03, 0.0))
        if goal.predicate == "in":  # the palm does not enter, what is let go falls in
            walls = rest.of(region.owner)
            place[2] = max(place[2], (walls.centre[:, 2] + walls.reach()[:, 2]).max() - _PALM + 0.012)
            slack = 0.03
            if min(reach) < _NARROW_M:  # what is narrow is turned to fit
                yaw = 0.0 if reach[1] < reach[0] else np.pi / 2
    off = scene.place - place
    arrived = np.linalg.norm(off[:2]) < 0.015 and off[2] < slack and abs(_half_turn(yaw - yaw_of(scene.turn))) < 0.1
    met = scene.met[scene.goals.index(goal)]
    if arrived or (met and off[2] < slack + 0.02):
        return Target(scene.place, yaw_of(scene.turn), _OPEN)
    return _over(scene, place, yaw, rest, hang, manner, _SHUT)


def _turn_on(scene: Scene, goal: Goal, manner: Manner) -> Target:
    """Grip the knob's bar across and turn it."""
    body = scene.bodies[goal.what]
    middle, height = _KNOBS[body.kind]
    angle = next(value for joint, value in scene.joints.items() if joint.startswith(goal.what))
    along = body.turn @ np.array([np.cos(angle), np.sin(angle), 0.0])  # the bar
    place = body.place + middle * along + [0.0, 0.0, height]
    yaw = float(np.arctan2(along[1], along[0]))
    off = scene.place - place
    turned = _half_turn(yaw - yaw_of(scene.turn))
    if np.linalg.norm(off[:2]) < 0.015 and off[2] < 0.015:
        if scene.opening < _KNOB_GRIPPED_M:
            return Target(place, yaw + _KNOB_TWIST, _SHUT)
        if (abs(turned) < 0.15 and off[2] < 0.008) or scene.opening < _OPENED:
            return Target(place, yaw, _SHUT)
    return _over(scene, place, yaw, scene.boxes, 0.0, manner, _OPEN)


def _in_turn(scene: Scene) -> list[tuple[Goal, bool]]:
    """Goals and whether they hold, those of low objects before those of tall ones: the palm comes down beside what stands there already."""

    def height(goal: Goal) -> int:
        if goal.predicate not in ("on", "in"):
            return 0
        low, high = scene.boxes.of(goal.what).bounds(np.zeros(3), np.eye(3))
        return round(float(high[2] - low[2]) / 0.05)

    order = {"turnon": 0, "close": 2}
    return sorted(zip(scene.goals, scene.met, strict=True), key=lambda one: (order.get(one[0].predicate, 1), height(one[0])))


def next_target(scene: Scene, manner: Manner) -> Target:
    """The skill that the scene asks for: put down what is held, else the first goal that does not hold."""
    for goal in scene.goals:
        if goal.predicate in ("on", "in") and scene.held == goal.what:
            return _place(scene, goal, manner)
    for goal, met in _in_turn(scene):
        if met:
            continue
        if goal.predicate in ("on", "in"):
            return _pick(scene, goal, manner)
        if goal.predicate == "turnon":
            return _turn_on(scene, goal, manner)
        raise ValueError(f"no expert for {goal.predicate} {goal.what}")
    height = clear_height(scene.boxes, scene.place, scene.place) + _REST_M
    return Target(np.array([*scene.place[:2], max(height, scene.place[2])]), yaw_of(scene.turn), _OPEN)


def steer(scene: Scene, target: Target, manner: Manner) -> NDArray[np.float32]:
    """The command (7,) in [-1, 1] towards `target`: position and rotation by the way that is left, and the fingers."""
    way = target.place - scene.place
    yaw = yaw_of(scene.turn) + _half_turn(target.yaw - yaw_of(scene.turn))
    twist = _rotation_vector(downward(yaw) @ scene.turn.T)
    asked = manner.briskness * np.concatenate([way / _POSITION_SCALE, twist / _ROTATION_SCALE])
    return np.append(np.clip(asked, -manner.limit, manner.limit), target.fingers).astype(np.float32)


def _rotation_vector(turn: Doubles) -> Doubles:
    """Axis times angle (3,) of a rotation matrix [rad]."""
    axis = np.array([turn[2, 1] - turn[1, 2], turn[0, 2] - turn[2, 0], turn[1, 0] - turn[0, 1]])
    sine, cosine = float(np.linalg.norm(axis)) / 2, float(np.trace(turn) - 1) / 2
    return axis * (float(np.arctan2(sine, cosine)) / (2 * max(sine, 1e-9)))


def command(env: Libero, variation: NDArray[np.float64]) -> NDArray[np.float32]:
    """The expert's next command (7,) in [-1, 1]. `variation` (VARIATION,) in (0, 1) is one demonstration's manner.

    ValueError for a task that there is no expert for.
    """
    if env.task not in TASKS[env.suite]:
        raise ValueError(f"{env.suite}: no expert for task {env.task}, {env.tasks[env.task]!r}; there is one for tasks {TASKS[env.suite]}")
    scene, manner = look(env.inner.env), Manner.of(variation)
    return steer(scene, next_target(scene, manner), manner)

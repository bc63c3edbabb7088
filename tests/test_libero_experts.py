"""LIBERO's experts: goals, grasps and skills on hand-made scenes that move by simple rules; and, with LIBERO's assets, one episode of each suite."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks import libero_experts
from worldenv.envs import libero
from worldenv.envs.experts import libero as expert
from worldenv.envs.experts.libero import Manner, best_grasp, beyond, clear_height, downward, grasps, next_target, steer, yaw_of
from worldenv.envs.experts.libero_scene import Body, Boxes, Goal, Region, Scene, parse_goals

MIDDLE = Manner.of(np.full(expert.VARIATION, 0.5))
CAN = np.array([0.031, 0.031, 0.034])  # half sizes [m]
PLATE = np.array([0.07, 0.07, 0.006])


def boxes(*parts: tuple[str, tuple[float, float, float], tuple[float, float, float]]) -> Boxes:
    """Upright boxes: owner, centre, half sizes."""
    owner, centre, half = zip(*parts, strict=True)
    return Boxes(np.array(centre), np.tile(np.eye(3), (len(parts), 1, 1)), np.array(half), np.array(owner))


class Toy:
    """A can, a plate, a basket and a wall on a table at z = 0; what is gripped moves with the gripper, what is let go falls straight down."""

    def __init__(self, *goals: Goal, wall: float = 0.0) -> None:
        self.goals, self.wall = goals, wall
        self.place, self.turn, self.opening = np.array([-0.2, 0.0, 0.25]), downward(0.0), 0.07
        self.can, self.plate = np.array([0.0, -0.15, CAN[2]]), np.array([0.05, 0.2, PLATE[2]])
        self.knob = 0.0
        self.held, self.lowest_over_wall = False, np.inf

    def scene(self) -> Scene:
        parts = [("can", tuple(self.can), tuple(CAN)), ("plate", tuple(self.plate), tuple(PLATE)), ("", (0.0, 0.0, -0.01), (0.5, 0.5, 0.01))]
        parts += [("basket", (0.05 + 0.08 * i, 0.2 + 0.08 * j, 0.05), (0.08 if j else 0.004, 0.08 if i else 0.004, 0.05)) for i, j in
                  ((1, 0), (-1, 0), (0, 1), (0, -1))] if self.goals[0].predicate == "in" else []  # fmt: skip
        parts += [("wall", (0.0, 0.03, self.wall / 2), (0.3, 0.005, self.wall / 2))] if self.wall else []
        bodies = {name: Body(name, at, np.eye(3)) for name, at in (("can", self.can.copy()), ("plate", self.plate.copy()))}
        bodies |= {"basket": Body("basket", np.array([0.05, 0.2, 0.0]), np.eye(3)), "stove": Body("flat_stove", np.array([0.1, 0.2, 0.0]), np.eye(3))}
        regions = {"basket_inside": Region(np.array([0.05, 0.2, 0.05]), np.eye(3), np.array([0.06, 0.06, 0.05]), "basket")}
        met = tuple(self.holds(goal) for goal in self.goals)
        return Scene(self.place.copy(), self.turn.copy(), self.opening, "can" if self.held else "", np.array([-0.66, 0.0, 0.0]),
                     bodies, regions, boxes(*parts), {"stove_button": self.knob}, self.goals, met)  # fmt: skip

    def holds(self, goal: Goal) -> bool:
        if goal.predicate == "turnon":
            return self.knob >= 0.5
        if goal.predicate == "in":
            return bool((np.abs(self.can - [0.05, 0.2, 0.05]) < [0.06, 0.06, 0.05]).all())
        return bool(np.linalg.norm(self.can[:2] - self.plate[:2]) < 0.03 and self.can[2] < CAN[2] + 2 * PLATE[2] + 0.002)

    def step(self, command: NDArray[np.float32]) -> None:
        """Move a quarter of what the command asks for."""
        assert (command.shape, command.dtype) == ((7,), np.float32)
        assert (np.abs(command) <= 1.0).all()
        before, yaw = self.place.copy(), yaw_of(self.turn)
        self.place = self.place + 0.25 * 0.05 * command[:3]
        self.turn = downward(yaw + 0.25 * 0.5 * float(command[5]))
        self.opening = float(np.clip(self.opening - 0.006 * np.sign(command[6]), 0.0, 0.08))
        if self.opening < 0.05 and np.linalg.norm(self.place - [0.096, 0.2, 0.032]) < 0.02 and self.goals[0].predicate == "turnon":
            self.opening, self.knob = max(self.opening, 0.024), self.knob + max(yaw_of(self.turn) - yaw, 0.0)
        between = (np.abs(self.place[:2] - self.can[:2]) < 0.015).all() and abs(self.place[2] - self.can[2]) < 0.02
        if between and self.opening <= 2 * CAN[1]:
            self.opening, self.held = 2 * CAN[1], True
        if self.opening > 2 * CAN[1]:
            self.held = False
        if self.held:
            self.can = self.can + self.place - before
        else:
            on = 2 * PLATE[2] if np.linalg.norm(self.can[:2] - self.plate[:2]) < 0.07 and self.goals[0].predicate == "on" else 0.0
            self.can[2] = CAN[2] + on
        if abs(self.place[1] - 0.03) < 0.02:
            bottom = self.can[2] - CAN[2] if self.held else self.place[2]
            self.lowest_over_wall = min(self.lowest_over_wall, bottom)

    def play(self, steps: int, manner: Manner = MIDDLE) -> int | None:
        """Steps until all goals hold and the gripper is open and away."""
        for step in range(steps):
            scene = self.scene()
            if all(scene.met) and not self.held and self.place[2] > self.can[2] + 0.05:
                return step
            self.step(steer(scene, next_target(scene, manner), manner))
        return None


ON, IN, TURN = Goal("on", "can", "plate"), Goal("in", "can", "basket_inside"), Goal("turnon", "stove")


def test_goals_are_read_as_liberos_parser_gives_them() -> None:
    state = [["on", "moka_pot_1", "flat_stove_1_cook_region"], ["Turnon", "flat_stove_1"]]
    assert parse_goals(state) == (Goal("on", "moka_pot_1", "flat_stove_1_cook_region"), Goal("turnon", "flat_stove_1"))


@pytest.mark.parametrize("state", [["up", "can"], ["on", "can"], ["turnon", "stove", "can"]], ids=" ".join)
def test_a_goal_that_no_expert_knows_is_refused(state: list[str]) -> None:
    with pytest.raises(ValueError, match=f"goal {' '.join(state)}: experts know on with 2"):
        parse_goals([state])


def test_knobs_come_first_and_low_things_before_tall_ones() -> None:
    toy = Toy(ON, TURN)
    assert next_target(toy.scene(), MIDDLE).place[1] > 0.0  # to the stove, although the can is named first
    scene = toy.scene()
    low = boxes(("box", (0.1, -0.3, 0.01), (0.03, 0.02, 0.01)))
    merged = Boxes(*(np.concatenate([getattr(scene.boxes, f.name), getattr(low, f.name)]) for f in dataclasses.fields(Boxes)))
    goals = (ON, Goal("on", "box", "plate"))
    bodies = {**scene.bodies, "box": Body("box", np.array([0.1, -0.3, 0.01]), np.eye(3))}
    scene = dataclasses.replace(scene, boxes=merged, bodies=bodies, goals=goals, met=(False, False))
    np.testing.assert_allclose(next_target(scene, MIDDLE).place[:2], best_grasp(scene, goals[1], MIDDLE).place[:2])


@pytest.mark.parametrize("goal", [ON, IN, TURN], ids=lambda goal: goal.predicate)
def test_a_skill_reaches_its_goal_and_lets_go(goal: Goal) -> None:
    assert Toy(goal).play(200) is not None


def test_every_manner_reaches_the_goal() -> None:
    random = np.random.default_rng(0)
    taken = [Toy(ON).play(200, Manner.of(random.random(expert.VARIATION))) for _ in range(12)]
    assert None not in taken
    assert len(set(taken)) > 3  # and they differ


@pytest.mark.parametrize("moment", [20, 60, 100])
def test_it_goes_on_from_any_moment(moment: int) -> None:
    """There is no memory to be wrong about: after a can that was knocked out of the gripper it goes back for it."""
    toy = Toy(ON)
    toy.play(moment)
    toy.held, toy.opening = False, 0.08
    toy.can = np.array([-0.05, 0.05, CAN[2]])
    assert toy.play(250) is not None


def test_what_stands_in_the_way_is_passed_over() -> None:
    toy = Toy(ON, wall=0.2)
    assert toy.play(250) is not None
    assert toy.lowest_over_wall > 0.2


def test_a_rim_is_gripped_on_its_wall_away_from_a_neighbour_and_from_the_handle() -> None:
    plate = Toy(ON).scene().bodies["plate"]
    for side in (-1.0, 1.0):
        parts = boxes(("bowl", (0.0, 0.0, 0.025), (0.05, 0.05, 0.025)), ("neighbour", (0.0, 0.09 * side, 0.06), (0.2, 0.03, 0.06)))
        bodies = {"bowl": Body("akita_black_bowl", np.zeros(3), np.eye(3)), "plate": plate}
        scene = dataclasses.replace(Toy(ON).scene(), boxes=parts, bodies=bodies)
        grasp = best_grasp(scene, Goal("on", "bowl", "plate"), MIDDLE)
        assert grasp.place[1] * side < 0.001
        np.testing.assert_allclose(np.linalg.norm(grasp.place[:2]), expert.RIMS["akita_black_bowl"].radius)
        along = np.array([-np.sin(grasp.yaw), np.cos(grasp.yaw)])
        assert abs(along @ grasp.place[:2]) > 0.99 * np.linalg.norm(grasp.place[:2])  # one finger inside, one outside
    mug = dataclasses.replace(scene, bodies={"bowl": Body("porcelain_mug", np.zeros(3), np.eye(3))})
    assert min(g.place[0] for g in grasps(mug, "bowl", MIDDLE)) > -0.015  # its handle is at -x


def test_a_finger_does_not_close_on_a_wall_behind_the_rim() -> None:
    """A bowl in a drawer: between the open fingers there would be room for the drawer's front as well."""
    bowl = ("bowl", (0.0, 0.0, 0.025), (0.05, 0.05, 0.025))
    parts = boxes(bowl, *(("drawer", (0.0, side * 0.0695, 0.025), (0.2, 0.003, 0.025)) for side in (-1.0, 1.0)))
    bodies = {"bowl": Body("akita_black_bowl", np.zeros(3), np.eye(3)), "plate": Toy(ON).scene().bodies["plate"]}
    grasp = best_grasp(dataclasses.replace(Toy(ON).scene(), boxes=parts, bodies=bodies), Goal("on", "bowl", "plate"), MIDDLE)
    assert abs(grasp.place[0]) > 2 * abs(grasp.place[1])


def carrying(region: Region, *more: tuple[str, tuple[float, float, float], tuple[float, float, float]]) -> Scene:
    """The can in the gripper, high over the table, on its way to `region`."""
    place = np.array([-0.1, 0.0, 0.6])
    return dataclasses.replace(
        Toy(ON).scene(), place=place, held="can", goals=(Goal("on", "can", "there"),), met=(False,), regions={"there": region},
        boxes=boxes(("can", tuple(place), tuple(CAN)), *more), bodies={"can": Body("can", place, np.eye(3))},
    )  # fmt: skip


def test_on_a_table_it_is_put_where_a_finger_has_room_to_open() -> None:
    middle = np.array([0.05, 0.2, 0.0])
    region = Region(middle, np.eye(3), np.array([0.05, 0.05, 0.007]), "")
    np.testing.assert_allclose(next_target(carrying(region), MIDDLE).place[:2], middle[:2], atol=1e-6)
    plate = ("plate", (0.05, 0.08, 0.01), (0.07, 0.07, 0.01))  # 19 mm from the can, had it the middle
    put = next_target(carrying(region, plate), MIDDLE).place
    assert 0.015 < put[1] - middle[1] < 0.05
    assert abs(put[0] - middle[0]) < 1e-6


def test_what_is_carried_far_out_and_high_stays_within_reach_on_the_way_down() -> None:
    shelf = Region(np.array([0.018, -0.249, 0.34]), np.eye(3), np.array([0.12, 0.09, 0.001]), "shelf")
    scene = carrying(shelf, ("shelf", (0.018, -0.249, 0.17), (0.12, 0.09, 0.17)))
    put = next_target(scene, MIDDLE).place
    assert beyond(scene, np.array([0.018, -0.249, 0.46])) > 0.0
    assert beyond(scene, np.array([*put[:2], 0.46])) < 0.0
    assert (np.abs(put[:2] - shelf.place[:2]) < shelf.half[:2]).all()


def test_a_box_is_gripped_across_its_narrow_side_and_not_below_the_table() -> None:
    for half, yaw in (((0.041, 0.021, 0.009), 0.0), ((0.021, 0.041, 0.009), np.pi / 2)):
        bodies = {"box": Body("box", np.array([0.0, 0.0, 0.009]), np.eye(3))}
        scene = dataclasses.replace(Toy(ON).scene(), boxes=boxes(("box", (0.0, 0.0, 0.009), half)), bodies=bodies)
        (grasp,) = grasps(scene, "box", MIDDLE)
        assert abs(abs(grasp.yaw) - yaw) < 1e-9
        assert grasp.place[2] > 0.01  # the fingers reach 1 cm lower
    wide = dataclasses.replace(scene, boxes=boxes(("box", (0.0, 0.0, 0.03), (0.05, 0.05, 0.03))), bodies={**scene.bodies, **Toy(ON).scene().bodies})
    with pytest.raises(ValueError, match="too wide"):
        best_grasp(wide, Goal("on", "box", "plate"), MIDDLE)


def test_the_arm_is_not_asked_beyond_its_reach() -> None:
    scene = Toy(ON).scene()
    assert beyond(scene, np.array([0.079, 0.232, 0.128])) > -0.005  # where a Panda was seen to stand stretched out
    assert beyond(scene, np.array([-0.21, 0.0, 0.26])) < -0.2


def test_distance_and_clear_height_against_the_definition() -> None:
    random = np.random.default_rng(1)
    turn = np.linalg.qr(random.normal(size=(5, 3, 3)))[0]
    some = Boxes(random.normal(size=(5, 3)), turn, random.uniform(0.1, 0.4, (5, 3)), np.array(["a"] * 5))
    inside = some.centre[2] + turn[2] @ (0.5 * some.half[2])
    surface = np.concatenate([some.centre[i] + (random.uniform(-1, 1, (20000, 3)) * some.half[i]) @ turn[i].T for i in range(5)])
    for point in random.normal(size=(10, 3)) * 2:
        distance = some.distance(point[None])[0]
        if distance > 0:
            np.testing.assert_allclose(distance, np.linalg.norm(surface - point, axis=1).min(), atol=0.03)
    assert some.distance(inside[None])[0] < 0.0
    wall = boxes(("wall", (0.0, 0.0, 0.1), (0.3, 0.01, 0.1)))
    assert clear_height(wall, np.array([0.0, -0.3, 0.0]), np.array([0.0, 0.3, 0.0])) > 0.2
    assert clear_height(wall, np.array([0.0, -0.3, 0.0]), np.array([0.0, -0.25, 0.0])) == -np.inf


def test_a_task_without_an_expert_is_refused_by_name() -> None:
    env: Any = SimpleNamespace(suite="libero_goal", task=0, tasks=("open the middle drawer of the cabinet",))
    with pytest.raises(ValueError, match="no expert for task 0, 'open the middle drawer"):
        expert.command(env, np.full(expert.VARIATION, 0.5))


def test_there_are_experts_for_enough_tasks() -> None:
    assert set(expert.TASKS) == set(libero.SUITES)
    assert min(len(tasks) for tasks in expert.TASKS.values()) >= 6
    assert sum(len(tasks) for tasks in expert.TASKS.values()) >= 24


def test_the_measured_version_is_that_of_the_code_and_not_of_its_comments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = libero_experts.version()
    text = Path(expert.__file__).read_text(encoding="utf-8")
    for changed, same in ((text + "\n# a comment\n", True), (text.replace('"""What the gripper is to do next."""', '"""Other."""'), True),
                          (text.replace("_TIP = 0.010", "_TIP = 0.011"), False)):  # fmt: skip
        assert changed != text
        (tmp_path / "libero.py").write_text(changed)
        monkeypatch.setattr(expert, "__file__", str(tmp_path / "libero.py"))
        assert (libero_experts.version() == before) is same


def test_the_table_shows_the_newest_row_of_each_episode_and_marks_what_is_of_an_earlier_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def row(task: int, index: int, steps: int | None, code: str) -> str:
        return json.dumps({"suite": "libero_goal", "task": task, "index": index, "steps": steps, "stays": steps is not None, "expert": code})

    results = tmp_path / "rows.jsonl"
    results.write_text("\n".join([row(1, 0, 60, "old"), row(1, 1, None, "old"), row(2, 0, 90, "old"), row(1, 1, 80, "new"), row(2, 0, None, "new")]))
    monkeypatch.setattr(libero, "instructions", lambda suite: [f"task {n}" for n in range(10)])
    lines = libero_experts.table(libero_experts.read(results), "new").splitlines()
    assert "| libero_goal | 1 task 1 | 2/2 (1) | 2 | 70 | 60-80 | 300 |" in lines
    assert "| libero_goal | 2 task 2 | 0/1 | 0 | | | 300 |" in lines
    assert "| **libero_goal** | 2 tasks | 2/3 | | | | |" in lines


@pytest.mark.slow  # of make check, which sets LIBERO up before
@pytest.mark.libero
@pytest.mark.parametrize(("suite", "task"), [("libero_spatial", 2), ("libero_object", 0), ("libero_goal", 7), ("libero_10", 5)])
def test_an_episode_of_each_suite(suite: libero.Suite, task: int) -> None:
    env = libero.Libero(suite, pictures=False)
    row = libero_experts.play(env, task, 0)
    env.close()
    assert row["steps"] is not None
    assert row["steps"] <= libero.STEPS[suite]
    assert row["stays"]

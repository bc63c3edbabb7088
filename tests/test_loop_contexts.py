"""Which start states stage loop rolls out from (worldenv.stages.loop)."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from worldenv import config, presets
from worldenv.run import Run
from worldenv.stages import loop as stage_loop
from worldenv.stages.desk import Desk
from worldenv.stages.loop import contexts_of

TASKS, CONTEXTS = 3, 8
FAILED = {(0, 4), (0, 7), (1, 2)}
"""Task 2 never failed with the noise of LOOP."""


def entries(explore: config.ExploreConfig) -> list[Any]:
    """As stage explore numbers them: tasks, factors, states; the widest noise fails everywhere."""
    made = []
    for number in range(explore.episodes):
        task, factor, state = number % TASKS, explore.factors[number // TASKS % len(explore.factors)], number // (TASKS * len(explore.factors))
        fails = factor == max(explore.factors) or (factor == 1.0 and (task, state) in FAILED)
        made.append(SimpleNamespace(number=number, task=task, state_index=state, first_success=None if fails else 9))
    return made


def chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float) -> list[list[tuple[int, int]]]:
    settings = dataclasses.replace(
        presets.TINY,
        env=config.EnvConfig(train_states=12),
        eval=config.EvalConfig(),
        explore=config.ExploreConfig(episodes=90, factors=(1.0, 4.0, 8.0)),
        loop=dataclasses.replace(presets.TINY.loop, contexts=CONTEXTS, batch=8, hard_share=share, scale_factor=4.0),
    )
    desk = Desk(Run(tmp_path / f"{share}", settings))
    monkeypatch.setattr(Desk, "episodes", lambda _, stage: SimpleNamespace(entries=entries(settings.explore) if stage == "explore" else []))
    return [[(one.task, one.state_index) for one in contexts_of(desk, iteration)] for iteration in range(12)]


def test_a_share_of_start_states_is_where_exploration_failed_with_no_more_noise_than_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = chosen(tmp_path, monkeypatch, 0.5)
    for iteration, states in enumerate(drawn):
        assert [task for task, _ in states] == [(iteration * CONTEXTS + n) % TASKS for n in range(CONTEXTS)]
        assert {state for state in states[: CONTEXTS // 2] if state[0] < 2} <= FAILED
    assert {state for states in drawn for state in states[: CONTEXTS // 2]} >= FAILED
    assert len({state for states in drawn for state in states if state[0] == 2}) > 6  # where nothing failed, all states
    assert len({state for states in drawn for state in states[CONTEXTS // 2 :]} - FAILED) > 12


def test_without_a_share_states_are_drawn_as_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    none, half = chosen(tmp_path, monkeypatch, 0.0), chosen(tmp_path, monkeypatch, 0.5)
    assert [states[CONTEXTS // 2 :] for states in none] == [states[CONTEXTS // 2 :] for states in half]
    assert {state for states in none for state in states[: CONTEXTS // 2] if state[0] == 0} - FAILED


def test_a_start_state_is_drawn_once(tmp_path: Path) -> None:
    """In LIBERO a scene takes up to a second to settle."""
    desk, begun = Desk(Run(tmp_path, presets.TINY)), []
    begin = desk.env.begin
    desk.env.begin = lambda *which: begun.append(which) or begin(*which)  # type: ignore[assignment,func-returns-value,method-assign]
    first = desk.context(1, 3)
    assert desk.context(1, 3) is first
    assert (desk.context(2, 3).task, desk.context(1, 4).state_index) == (2, 4)
    assert begun == [(1, "train", 3), (2, "train", 3), (1, "train", 4)]


def test_rollouts_of_an_iteration_that_was_learned_from_do_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the savepoint and the removal, a run would keep them for ever, as part of the stage's output."""
    run = Run(tmp_path / "run", dataclasses.replace(presets.TINY, loop=dataclasses.replace(presets.TINY.loop, iterations=1)))
    nothing = SimpleNamespace(policy=None, merged=lambda: None)
    for name in ("load_tree", "keep_up", "share", "export_adapter"):
        setattr(nothing, name, lambda _: None)
    monkeypatch.setattr(stage_loop, "Learner", lambda *_: nothing)
    monkeypatch.setattr(stage_loop, "practice_of", lambda *_: SimpleNamespace(fleet=SimpleNamespace(engines={}, policies=[None])))
    monkeypatch.setattr(stage_loop.policies, "save", lambda *_: None)
    monkeypatch.setattr(Desk, "policy", lambda *_: None)
    with run.at_work("loop", "f") as stage:
        kept = {"learner": {}, "history": [{"return": 0.5}], "groups": [{}], "seconds": [1.0], "collected": [[6, 0.5]]}
        stage.savepoint("iterations").save(kept)
        for machine in range(2):
            stage_loop.log_path(stage.folder, 0, machine).write_bytes(b"rollouts")
        stage_loop.loop(Desk(run), stage)
    assert list(run.record("loop")["files"]) == []
    assert run.record("loop")["timings"]["rollouts_per_second"] == 12.0  # the report wants it, also of a run that was killed after the last iteration


def test_rollouts_are_learned_from_group_by_group_in_whatever_order_they_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two groups of three, twice; their returns are counted by group, and a snapshot is named by the iterations that are behind it."""
    loop = dataclasses.replace(presets.TINY.loop, iterations=2, contexts=2, group=3, batch=3, snapshot_every=1)
    run = Run(tmp_path / "run", dataclasses.replace(presets.TINY, loop=loop))
    value = {0: 0.9, 1: 0.6, 2: 0.0, 3: 0.5, 4: 0.2, 5: 0.2}
    learned, kept, contexts, numbers = list[list[int]](), list[str](), list[list[str]](), set[int]()

    class Store:
        def __init__(self, path: Path) -> None:
            path.touch()
            self.rollouts: list[Any] = []

        def close(self) -> None: ...

    def make(desk: Desk, practice: Any, jobs: Any, asked: Any, store: Store) -> None:
        assert sorted(asked) == [job.number for job in jobs]
        contexts.append([f"{job.context} in {job.group}" for job in jobs])
        numbers.update(asked)
        store.rollouts += [SimpleNamespace(number=job.number, value=value[n], stopped=False) for n, job in reversed(list(enumerate(jobs)))]

    learner = SimpleNamespace(
        policy=None, merged=lambda: None, tree=dict, load_tree=None, keep_up=lambda _: None, share=lambda _: None, export_adapter=lambda _: None,
        save_change=lambda path, base: kept.append(f"{path.name} of {base.parent.name}"),
        update=lambda rollouts, _: learned.append([one.number for one in rollouts]) or {"clip_fraction": 0.0},
    )  # fmt: skip
    fleet = SimpleNamespace(engines={}, policies=[None], follow=dict)
    monkeypatch.setattr(stage_loop, "Learner", lambda *_: learner)
    monkeypatch.setattr(stage_loop, "practice_of", lambda *_: SimpleNamespace(fleet=fleet, success=0.5, threshold=0.5))
    monkeypatch.setattr(stage_loop.policies, "save", lambda path, *_: kept.append(path.name))
    monkeypatch.setattr(stage_loop, "RolloutStore", Store)
    monkeypatch.setattr(stage_loop, "_make", make)
    monkeypatch.setattr(stage_loop, "contexts_of", lambda _, iteration: [f"{iteration}a", f"{iteration}b"])
    monkeypatch.setattr(Desk, "policy", lambda *_: None)
    with run.at_work("loop", "f") as stage:
        stage_loop.loop(Desk(run), stage)
    assert contexts == [[f"{i}{'ab'[n // 3]} in {2 * i + n // 3}" for n in range(6)] for i in range(2)]
    assert learned == [[stage_loop.LOOP_NUMBERS + 6 * i + n for n in range(6)] for i in range(2)]
    assert len(numbers) == 12
    first = run.record("loop")["metrics"]["history"][0]
    assert first["return"] == pytest.approx(2.4 / 6)
    assert first["imagined_success"] == pytest.approx(2 / 6)  # a return of exactly eta is none
    assert first["spread"] == pytest.approx((np.std([0.9, 0.6, 0.0]) + np.std([0.5, 0.2, 0.2])) / 2)
    assert run.record("loop")["metrics"]["groups"][0] == {"mean": pytest.approx([0.5, 0.3]), "low": [0.0, 0.2], "high": [0.9, 0.5]}
    assert kept == ["policy-0001.safetensors of scale", "policy-0002.safetensors of scale", "policy.safetensors"]


def test_without_termination_nothing_ends_a_rollout_and_success_is_what_it_was() -> None:
    fleet: Any = None
    assert (stage_loop.Practice(fleet, 0.6, True).threshold, stage_loop.Practice(fleet, 0.6, False).threshold) == (0.6, math.inf)
    assert stage_loop.Practice(fleet, 0.6, False).success == 0.6

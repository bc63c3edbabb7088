"""Which start states stage loop rolls out from (worldenv.stages.loop)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from worldenv import config
from worldenv.run import Run
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
        config.TINY,
        env=config.EnvConfig(train_states=12),
        eval=config.EvalConfig(),
        explore=config.ExploreConfig(episodes=90, factors=(1.0, 4.0, 8.0)),
        loop=dataclasses.replace(config.TINY.loop, contexts=CONTEXTS, batch=8, hard_share=share, scale_factor=4.0),
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

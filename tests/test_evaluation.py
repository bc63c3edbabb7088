"""Evaluation: statistics against published values, and one pass that answers three protocols as three stopped runs would.

Tried against wrong versions of the code, each found here: a reflector's stop one frame late; the predicate read at the end instead of at the
stop; a one-sided McNemar; Wald instead of Wilson; wins and losses exchanged; Newcombe without his correction.
"""

from __future__ import annotations

import math
import os
import threading
from collections import Counter
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pusher import THRESHOLD, Onlooker, Pusher

from worldenv import checkpoint, evaluation
from worldenv.checkpoint import Savepoint
from worldenv.config import EnvConfig
from worldenv.data.collect import act_out
from worldenv.data.scenes import OneScene, ScenesApart
from worldenv.envs.tabletop import Tabletop
from worldenv.evaluation import Outcomes, evaluate, mcnemar, paired, wilson
from worldenv.nouns import Observation

CPU = torch.device("cpu")
STEPS = 32


# Statistics


@pytest.mark.parametrize(
    ("successes", "episodes", "interval"),
    [(81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0.0, 0.1611)), (1, 29, (0.0061, 0.1718))],
)
def test_wilson_as_published(successes, episodes, interval):
    """Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3."""
    assert wilson(successes, episodes) == pytest.approx(interval, abs=5e-5)


def test_wilson_of_none_and_of_all_ends_exactly():
    for episodes in range(1, 60):
        assert wilson(0, episodes)[0] == 0.0
        assert wilson(episodes, episodes)[1] == 1.0


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_where_the_score_test_turns(case):
    successes, episodes = case
    for end, edge in zip(wilson(*case), (0.0, 1.0), strict=True):
        assert 0 <= end <= 1
        if abs(end - edge) > 1e-12:
            assert abs(successes / episodes - end) / math.sqrt(end * (1 - end) / episodes) == pytest.approx(1.959963984540054, rel=1e-6)


@pytest.mark.parametrize(("wins", "losses", "p"), [(1, 7, 18 / 256), (6, 16, 0.0524788), (0, 5, 2 / 32), (4, 4, 1.0), (0, 0, 1.0), (0, 1, 1.0)])
def test_mcnemar_as_published(wins, losses, p):
    """The first two: exact conditional p = 0.070 and 0.052 in the chapter that the intervals below are from."""
    assert mcnemar(wins, losses) == mcnemar(losses, wins) == pytest.approx(p, rel=1e-6)


def test_mcnemar_of_thousands_does_not_overflow():
    assert mcnemar(3000, 3000) == 1.0
    assert 0 < mcnemar(1700, 1300) < 1e-10


def outcomes(both, wins, losses, neither):
    """Before and after, of a table of pairs."""
    before = [True] * both + [False] * wins + [True] * losses + [False] * neither
    after = [True] * both + [True] * wins + [False] * losses + [False] * neither
    return np.array(before), np.array(after)


@pytest.mark.parametrize(
    ("table", "difference", "interval"),
    [
        ((1, 1, 7, 12), -0.2857, (-0.5069, -0.0256)),  # airway hyper-responsiveness (Bentur et al. 2009)
        ((59, 6, 16, 80), -0.0621, (-0.1186, -0.0046)),  # complete response (Cavo et al. 2012)
    ],
)
def test_the_paired_difference_as_published(table, difference, interval):
    """Newcombe's interval of two tables in Fagerland, Lydersen and Laake 2017, "Statistical Analysis of Contingency Tables", chapter 8."""
    found = paired(*outcomes(*table))
    assert (found["wins"], found["losses"]) == table[1:3]
    assert found["difference"] == pytest.approx(difference, abs=5e-5)
    assert found["interval"] == pytest.approx(interval, abs=5e-5)
    turned = paired(*outcomes(*table)[::-1])
    assert turned["interval"] == pytest.approx([-found["interval"][1], -found["interval"][0]])
    assert (turned["wins"], turned["p_value"]) == (found["losses"], found["p_value"])


def test_the_paired_interval_covers():
    """Of 2000 experiments of 200 pairs, 95 % of the intervals hold the true difference (0.05); 1.5 points for chance and approximation."""
    rng, inside = np.random.default_rng(0), 0
    for _ in range(2000):
        cell = rng.choice(4, size=200, p=[0.4, 0.15, 0.1, 0.35])
        low, high = paired((cell == 0) | (cell == 2), (cell == 0) | (cell == 1))["interval"]
        inside += low <= 0.05 <= high
    assert abs(inside / 2000 - 0.95) < 0.015


def test_statistics_refuse_nonsense():
    for wrong in (lambda: wilson(3, 2), lambda: wilson(0, 0), lambda: wilson(-1, 5), lambda: mcnemar(-1, 2)):
        with pytest.raises(ValueError):
            wrong()
    with pytest.raises(ValueError, match="want"):
        paired(np.zeros(3, bool), np.zeros(4, bool))


# Episodes


@pytest.fixture(scope="module")
def env():
    desk = Tabletop()
    yield desk
    desk.close()


def really_stopped(env, start, protocol):
    """One episode, ended as the protocol says; whether it was a success, and at which step it ended."""
    policy, reflector = Pusher(), Onlooker()
    now = env.begin(start.task, start.split, start.index)
    watch = reflector.begin([env.tasks[start.task]], torch.from_numpy(now.frame)[None])
    for step in range(STEPS):
        if step % policy.chunk == 0:
            proprio = env.robot.proprio(now.pose, np.float64(now.gripper))
            seen = Observation(torch.from_numpy(now.frame)[None], torch.from_numpy(proprio)[None], (env.tasks[start.task],))
            command = policy.act(seen).command[0].numpy()
        now = env.advance(command[step % policy.chunk])
        if protocol == "oracle" and now.success:
            return True, step + 1
        if protocol == "reflector":
            score, watch = reflector.judge(watch, torch.from_numpy(now.frame)[None, None])
            if float(score) > THRESHOLD:
                return now.success, step + 1
    return now.success, STEPS


def test_one_pass_answers_what_three_stopped_runs_do(env):
    chosen = evaluation.starts(env, 45)
    found = evaluate(Pusher(), OneScene(env), chosen, STEPS, [Onlooker()], THRESHOLD, CPU, batch=7)
    for protocol in ("oracle", "limit", "reflector"):
        stopped = [really_stopped(env, start, protocol) for start in chosen]
        assert found.by(protocol).tolist() == [success for success, _ in stopped]
        if protocol == "reflector":
            assert found.ends().tolist() == [end for _, end in stopped]
    # and the case is one that can tell them apart
    assert 5 < found.by("oracle").sum() < 40
    assert (found.by("oracle") != found.by("reflector")).any()
    assert len(set(found.ends().tolist())) > 4


def test_without_a_reflector_the_outcomes_are_the_same(env):
    chosen = evaluation.starts(env, 12)
    seen = evaluate(Pusher(), OneScene(env), chosen, STEPS, [Onlooker()], THRESHOLD, CPU)
    blind = evaluate(Pusher(), OneScene(env), chosen, STEPS, (), THRESHOLD, CPU, batch=5)
    assert np.array_equal(seen.success, blind.success)
    assert list(blind.tally(env.tasks)) == ["oracle", "limit"]
    with pytest.raises(ValueError, match="no reflector"):
        blind.by("reflector")


class Barrier(Onlooker):
    """Judges only when another does, too."""

    def __init__(self, both):
        self.both = both

    def begin(self, instruction, frame):
        self.both.wait(timeout=60)
        return super().begin(instruction, frame)


def test_several_reflectors_judge_side_by_side_until_each_episode_ends(env):
    chosen = evaluation.starts(env, 42)
    one = evaluate(Pusher(), OneScene(env), chosen, STEPS, [Onlooker()], THRESHOLD, CPU, batch=7)
    both = threading.Barrier(2)
    two = evaluate(Pusher(), OneScene(env), chosen, STEPS, [Barrier(both), Barrier(both)], THRESHOLD, CPU, batch=7)
    assert np.array_equal(one.score, two.score, equal_nan=True)
    assert np.array_equal(one.success, two.success)
    last = -(-one.ends() // Pusher.chunk) * Pusher.chunk  # the chunk of the end is judged whole
    assert np.array_equal(np.isnan(one.score), np.arange(STEPS)[None] >= last[:, None])
    assert np.isnan(one.score).any()
    few = one.first(10)
    assert few.by("reflector").tolist() == one.by("reflector")[:10].tolist()
    assert (len(few.start), len(few.success), len(few.score)) == (10, 10, 10)


@pytest.mark.parametrize("judges", [0, 1, 2])
def test_a_killed_evaluation_goes_on(judges, env, tmp_path):
    chosen = evaluation.starts(env, 20)
    asked = {"policy": Pusher(), "scenes": OneScene(env), "chosen": chosen, "steps": STEPS, "threshold": THRESHOLD, "device": CPU, "batch": 6}
    want = evaluate(**asked, reflectors=[Onlooker()] * judges)

    class Killed(Savepoint):
        def save(self, tree):
            super().save(tree)
            if len(tree["success"]) == 12:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(**asked, reflectors=[Onlooker()] * judges, savepoint=Killed(tmp_path / "s", every_s=0.0))
    policy = Pusher()
    for batches in ([6, 2], []):  # a second time there is nothing left to do
        policy.batches.clear()
        again = evaluate(**{**asked, "policy": policy}, reflectors=[Onlooker()] * judges, savepoint=Savepoint(tmp_path / "s"))
        assert np.array_equal(again.success, want.success)
        assert again.score is None if not judges else np.array_equal(again.score, want.score, equal_nan=True)
        assert policy.batches[:: STEPS // Pusher.chunk] == batches


def _small():
    return Tabletop(EnvConfig(image=16))


class _Fails(Tabletop):
    def advance(self, command, render=True):
        raise ValueError(f"process {os.getpid()} does not move")


def _failing():
    return _Fails(EnvConfig(image=16))


def _pid():
    return os.getpid()


def _end(code):
    os._exit(code)


def test_scenes_in_processes_play_what_one_scene_plays():
    """Three processes and seven episodes: some have more than others; then fewer episodes than processes."""
    env = _small()
    apart = ScenesApart(env, _small, 3)
    try:
        for count, render in ((7, True), (2, False)):
            starts = evaluation.starts(env, count)
            made = [act_out(scenes, Pusher(), starts, 16, None, render, CPU) for scenes in (OneScene(env), apart)]
            for one, other in zip(*made, strict=True):
                assert (one.task, one.index) == (other.task, other.index)
                assert np.array_equal(one.commands, other.commands)
                for mine, theirs in zip(one.moments, other.moments, strict=True):
                    assert all(np.array_equal(getattr(mine, name), getattr(theirs, name)) for name in ("frame", "pose", "gripper", "success"))
        pids = [pool.submit(_pid).result() for pool in apart._pools]
        assert len({*pids, os.getpid()}) == 4
    finally:
        apart.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_what_fails_in_a_scenes_process_is_said():
    env = _small()
    apart = ScenesApart(env, _failing, 2)
    try:
        with pytest.raises(ValueError, match="does not move"):
            act_out(apart, Pusher(), evaluation.starts(env, 4), 16, None, False, CPU)
        apart._pools[1].submit(_end, 3)
        with pytest.raises(BrokenProcessPool):
            apart.begin(evaluation.starts(env, 4))
    finally:
        apart.close()


def test_outcomes_of_known_tables():
    success = np.array([[0, 0, 1, 0, 0], [0, 0, 1, 1, 1], [0, 0, 0, 0, 0], [0, 0, 0, 1, 1]], bool)
    score = np.array([[0.1, 0.9, 0.1, 0.1], [0.9, 0.9, 0.9, 0.9], [0.1, 0.1, 0.5, 0.6], [0.1, 0.1, 0.1, 0.5]], np.float32)
    start = tuple(evaluation.Start(n, n % 2, "test", n) for n in range(4))
    found = Outcomes(start, success, score, 0.5)
    assert found.by("oracle").tolist() == [True, True, False, True]
    assert found.by("limit").tolist() == [False, True, False, True]
    assert found.ends().tolist() == [2, 1, 4, 4]  # a score of exactly eta does not end an episode
    assert found.by("reflector").tolist() == [True, False, False, True]
    tally = found.tally(("left", "right"))
    assert (tally["oracle"]["successes"], tally["oracle"]["episodes"]) == (3, 4)
    assert tally["oracle"]["interval"] == list(wilson(3, 4))
    assert tally["reflector"]["by_task"]["left"]["successes"] == 1
    assert [(one["successes"], one["episodes"]) for one in tally["oracle"]["by_task"].values()] == [(1, 2), (2, 2)]
    again = Outcomes.from_tree(checkpoint.from_bytes(checkpoint.to_bytes(found.tree()), "x"))
    assert again.start == found.start
    assert np.array_equal(again.success, found.success)
    assert np.array_equal(again.score, found.score)
    assert again.tally(("left", "right")) == tally


def test_starts_are_test_states_spread_evenly():
    env = Tabletop(EnvConfig(test_states=10))
    chosen = evaluation.starts(env, 25)
    assert {start.split for start in chosen} == {"test"}
    assert Counter(start.task for start in chosen) == {0: 9, 1: 8, 2: 8}
    assert len({(start.task, start.index) for start in chosen}) == 25
    assert evaluation.starts(env, 6) == chosen[:6]
    for wrong in (0, 31):
        with pytest.raises(ValueError, match=r"episodes=.*30"):
            evaluation.starts(env, wrong)

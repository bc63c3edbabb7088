"""The reaching tasks: scenes of their own, an expert that gets there, and a policy that begins from them.

Tried against wrong versions of the code, each found here: states numbered like the tabletop's; a predicate that takes the middle puck; the tower's
positions at 0.02; statistics of the prior kept for the demonstrations.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from worldenv import presets
from worldenv.checkpoint import Savepoint
from worldenv.config import DemosConfig, EnvConfig
from worldenv.data.collect import demonstrate
from worldenv.data.episode import EpisodeSet
from worldenv.envs import reaching
from worldenv.envs.experts import reaching as expert
from worldenv.envs.experts import tabletop as pusher
from worldenv.envs.reaching import Reaching
from worldenv.envs.tabletop import MOST_JITTER_M, NOMINAL, PUCK_HALF, initial_state
from worldenv.learning import sft
from worldenv.policy.vision import VisionTower
from worldenv.run import Run
from worldenv.stages import policy as policy_stages
from worldenv.stages.desk import Desk


@pytest.fixture(scope="module")
def env():
    desk = Reaching(EnvConfig(), 60)
    yield desk
    desk.close()


def test_states_are_its_own_and_within_reach(env):
    mine = [env._start(0, "train", i) for i in range(60)]
    theirs = {initial_state(EnvConfig(jitter_m=MOST_JITTER_M), split, i).pucks.tobytes() for split in ("train", "test") for i in range(50)}
    assert len({state.pucks.tobytes() for state in mine}) == 60
    assert not theirs & {state.pucks.tobytes() for state in mine}
    assert max(np.abs(state.pucks - NOMINAL).max() for state in mine) <= MOST_JITTER_M
    assert env.states("test") == 0
    with pytest.raises(ValueError, match="reaching has 0"):
        env.begin(0, "test", 0)
    with pytest.raises(ValueError, match="task=3"):
        env.begin(3, "train", 0)


def test_the_expert_goes_to_the_puck_that_is_named_and_touches_none(env):
    arrived, there = [], []
    for index in range(60):
        assert not env.begin(index % 3, "train", index).success
        pucks, variation = env.pucks, np.array([0.5, 0.5])
        arrived.append([env.advance(expert.command(env, variation), render=False).success for _ in range(reaching.STEPS)][-1])
        for _ in range(24):
            now = env.advance(expert.command(env, variation), render=False)
        assert np.abs(env.pucks - pucks).max() < 0.002
        assert now.pose[2] - 0.052 > 2 * PUCK_HALF - 0.012  # finger tips: just over the pucks
        there.append(np.hypot(*(env.pucks[:, :2] - now.pose[:2]).T)[index % 3])
    assert np.mean(arrived) >= 0.9
    assert max(there) < 0.005


def test_on_its_way_is_half_of_the_distance_to_its_own_puck(env):
    for task in range(3):
        env.begin(task, "train", 0)
        goals = [env._aside()]
        while not env._success():
            env.advance(expert.command(env, np.array([0.5, 0.5])), render=False)
            goals.append(env._aside())
        assert goals[-1] < goals[0] / 2 <= goals[-2]
        assert goals[0] == pytest.approx(np.hypot(*(env._start(task, "train", 0).pose[:2] - env._start(task, "train", 0).pucks[task])), abs=1e-4)


def test_a_tower_begins_with_positions_as_strong_as_what_it_sees():
    tower = VisionTower(presets.TINY.policy.dino, presets.TINY.policy.image)
    tower.begin()
    place = tower.pos_embed[0]
    assert float(place.pow(2).mean()) == pytest.approx(0.5, abs=0.01)
    gap = torch.cdist(place, place) + 100 * torch.eye(len(place))
    assert float(gap.min()) > 0.5  # no two places are alike
    assert int(gap[9].argmin()) in (1, 8, 10, 17)  # and neighbours are the most alike


def test_a_policy_that_begins_from_reaching_is_told_of_the_demonstrations(tmp_path):
    fast = presets.fast(presets.TINY)
    settings = dataclasses.replace(fast, sft=dataclasses.replace(fast.sft, batch=4, prior_per_task=2, prior_steps=3))
    desk = Desk(Run(tmp_path / "run", settings))
    demonstrate(desk.env.whole, pusher, pusher.VARIATION, 32, DemosConfig(per_task=1), 0, tmp_path / "demos")
    shown = list(EpisodeSet(tmp_path / "demos"))
    policy, metrics = policy_stages.begun_policy(desk, shown, lambda part: Savepoint(tmp_path / part))
    assert (metrics["prior"]["steps"], metrics["prior"]["chunks"]) == (3, 6 * (reaching.STEPS - policy.chunk + 1))
    fresh = sft.untrained(settings.policy, shown, desk.env.tasks, desk.env.robot, 0, desk.device)
    assert str(policy.statistics) == str(fresh.statistics)
    assert not torch.equal(policy.network.action_head.model.fc1.weight, fresh.network.action_head.model.fc1.weight)
    for tower in (fresh.network.vision_backbone.featurizer, fresh.network.vision_backbone.fused_featurizer):
        assert float(tower.pos_embed.pow(2).mean()) == pytest.approx(0.5, abs=0.01)
    for instruction in (*desk.env.tasks, "move the gripper over the red puck"):
        assert policy.tokenizer.ids(instruction)
    without = dataclasses.replace(settings, sft=dataclasses.replace(settings.sft, prior_steps=0))
    untouched, nothing = policy_stages.begun_policy(Desk(Run(tmp_path / "other", without)), shown, lambda part: Savepoint(tmp_path / part))
    assert nothing == {}
    assert torch.equal(untouched.network.action_head.model.fc1.weight, fresh.network.action_head.model.fc1.weight)

"""The reaching tasks: scenes of their own, an expert that gets there, and a policy that begins from them.

Tried against wrong versions of the code, each found here: states numbered like the tabletop's; a predicate that takes the middle puck; the tower's
positions at 0.02; statistics of the prior kept for the demonstrations.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from worldenv import config
from worldenv.config import EnvConfig
from worldenv.envs import reaching
from worldenv.envs.experts import reaching as expert
from worldenv.envs.reaching import Reaching
from worldenv.envs.tabletop import MOST_JITTER_M, NOMINAL, PUCK_HALF, initial_state
from worldenv.policy.vision import VisionTower


@pytest.fixture(scope="module")
def env():
    desk = Reaching(EnvConfig(), 60)
    yield desk
    desk.close()


def test_states_are_its_own_and_within_reach(env):
    mine = [env._start(0, "train", i) for i in range(60)]
    theirs = {initial_state(EnvConfig(jitter_m=MOST_JITTER_M), split, i).name() for split in ("train", "test") for i in range(50)}
    assert len({state.name() for state in mine}) == 60
    assert not theirs & {state.name() for state in mine}
    assert max(np.abs(state.pucks - NOMINAL).max() for state in mine) <= MOST_JITTER_M
    assert env.states("test") == 0
    with pytest.raises(ValueError, match="reaching has 0"):
        env.begin(0, "test", 0)
    with pytest.raises(ValueError, match="task=3"):
        env.begin(3, "train", 0)


def test_the_expert_gets_over_the_puck_that_is_named_and_touches_none(env):
    arrived = []
    for index in range(60):
        env.begin(index % 3, "train", index)
        pucks = env.pucks
        for _ in range(reaching.STEPS):
            now = env.advance(expert.command(env, np.array([0.5, 0.5])), render=False)
        arrived.append(now.success)
        assert np.abs(env.pucks - pucks).max() < 0.002
        assert now.pose[2] - 0.052 > 2 * PUCK_HALF - 0.012  # finger tips: just over the pucks
        nearest = int(np.hypot(*(env.pucks[:, :2] - now.pose[:2]).T).argmin())
        assert nearest == index % 3
    assert np.mean(arrived) >= 0.9


def test_a_tower_begins_with_positions_as_strong_as_what_it_sees():
    tower = VisionTower(config.TINY.policy.dino, config.TINY.policy.image)
    tower.begin()
    place = tower.pos_embed[0]
    assert float(place.pow(2).mean()) == pytest.approx(0.5, abs=0.01)
    gap = torch.cdist(place, place) + 100 * torch.eye(len(place))
    assert float(gap.min()) > 0.5  # no two places are alike
    assert int(gap[9].argmin()) in (1, 8, 10, 17)  # and neighbours are the most alike

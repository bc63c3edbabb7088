"""Rollouts in slots, on a world and a policy small enough to know every answer."""

import dataclasses

import numpy as np
import pytest
import torch

from worldenv.checkpoint import CheckpointError
from worldenv.nouns import ActionChunk, Context
from worldenv.rollout.collect import Assignment, Schedule, collect
from worldenv.rollout.store import RolloutStore, stored
from worldenv.world import Made, Scene, WorldStage, ended_at

K = 8


class UniformPolicy:
    """Acts with its uniform numbers, so that an action shows which numbers drew it."""

    chunk = K

    def act(self, observation, uniform=None):
        batch = len(observation.instruction)
        action = torch.zeros(batch, K, 7) if uniform is None else uniform.float()
        return ActionChunk(torch.zeros(batch, K, 7), torch.zeros(batch, K, 7), action, action.sum(-1), action.clamp(-1, 1))


class CountingWorld:
    """Rollout n scores 0.9 at its step `ends[n]` (counted from 0), else 0.1; it notes every chunk asked of it."""

    at_home = False

    def __init__(self, ends):
        self.ends, self.stepped, self.alive, self.largest = ends, [], set(), 0
        self.stages = (WorldStage("make", self.make, batched=False),)

    def begin(self, contexts, numbers):
        return [Scene(c, n, 0, torch.full((2, 2, 3), n, dtype=torch.uint8), torch.zeros(8), None) for c, n in zip(contexts, numbers, strict=True)]

    def make(self, work):
        made = []
        for scene, _ in work:
            self.stepped.append((scene.number, scene.chunk))
            self.alive.add(scene.number)
            self.largest = max(self.largest, len(self.alive))
            score = torch.full((K,), 0.1)
            at = self.ends.get(scene.number, 10**9) - scene.chunk * K
            if 0 <= at < K:
                score[at] = 0.9
            after = dataclasses.replace(scene, chunk=scene.chunk + 1)
            made.append(Made(torch.zeros(K, 2, 2, 3, dtype=torch.uint8), after, score))
        return made

    def enter(self, scenes):
        return [None] * len(scenes)

    def watch(self, scenes):
        return [0] * len(scenes)

    def judge(self, watches, made):
        assert watches == [one.after.chunk - 1 for one in made], "chunks are judged in order, each once"
        for one in made:
            if bool((one.score > 0.5).any()) or one.after.chunk == 4:
                self.alive.discard(one.after.number)
        return torch.stack([one.score for one in made]), [watch + 1 for watch in watches]


def context():
    return Context("push", 0, 0, np.zeros((2, 2, 3), np.uint8), np.array([0, 0, 0, 0, 0, 0, 1.0]), 1.0)


def roll(ends, count=5, slots=2, overlap="off", **more):
    world = CountingWorld(ends)
    jobs = [Assignment(n, n // 2, context()) for n in range(count)]
    schedule = Schedule(slots, 4, 1, overlap)
    return {r.number: r for r in collect(UniformPolicy(), world, jobs, seed=1, steps=32, threshold=0.5, schedule=schedule, **more)}, world


def test_ended_at_is_the_first_step_above_the_threshold():
    score = torch.tensor([[0.1, 0.6, 0.9], [0.5, 0.5, 0.5], [0.7, 0.1, 0.1]])
    assert ended_at(score, 0.5).tolist() == [1, 3, 0]


def test_a_rollout_ends_at_its_first_score_above_and_holds_that_step():
    rollouts, _ = roll({0: 0, 1: 7, 2: 8, 3: 31})
    assert [rollouts[n].steps for n in range(5)] == [1, 8, 9, 32, 32]
    assert [rollouts[n].stopped for n in range(5)] == [True, True, True, True, False]
    assert [round(rollouts[n].value, 3) for n in range(5)] == [0.9, 0.9, 0.9, 0.9, 0.1]
    assert rollouts[2].live.shape == (2, K)
    assert rollouts[2].score[1, 1:].eq(0).all()


def test_no_chunk_is_asked_of_a_world_after_an_end_and_slots_are_refilled():
    _, world = roll({0: 0, 1: 7, 2: 8, 3: 31})
    assert sorted(world.stepped) == [(0, 0), (1, 0), (2, 0), (2, 1)] + [(n, c) for n in (3, 4) for c in range(4)]
    assert world.largest == 2


@pytest.mark.parametrize("slots", [1, 2, 3, 7])
def test_rollouts_do_not_depend_on_slots(slots):
    ends = {0: 3, 2: 17, 4: 9}
    want, _ = roll(ends, slots=16)
    got, _ = roll(ends, slots=slots)
    assert got.keys() == want.keys()
    for n in want:
        assert torch.equal(got[n].action, want[n].action)
        assert torch.equal(got[n].live, want[n].live)


def test_each_rollout_and_chunk_draws_its_own_numbers():
    rollouts, _ = roll({})
    drawn = torch.cat([r.action.reshape(-1, K * 7) for r in rollouts.values()])
    assert len({tuple(row.tolist()) for row in drawn}) == len(drawn)


def test_greedy_draws_nothing():
    rollouts, _ = roll({}, greedy=True)
    assert all(r.action.eq(0).all() for r in rollouts.values())


def test_store_keeps_what_was_added_and_drops_a_record_cut_short(tmp_path):
    rollouts, _ = roll({0: 3})
    path = tmp_path / "rollouts.log"
    store = RolloutStore(path)
    for rollout in rollouts.values():
        store.add(rollout)
    store.close()
    whole = path.read_bytes()
    again = RolloutStore(path)
    again.close()
    assert [r.number for r in again.rollouts] == list(rollouts)
    for a, b in zip(again.rollouts, rollouts.values(), strict=True):
        assert torch.equal(a.action, b.action)
        assert torch.equal(a.live, b.live)
        assert a.context.instruction == b.context.instruction
    path.write_bytes(whole[:-5])
    cut = RolloutStore(path)
    assert len(cut.rollouts) == len(rollouts) - 1
    cut.add(list(rollouts.values())[-1])
    assert [r.number for r in stored(path)] == list(rollouts)


def test_store_names_damage_in_the_middle(tmp_path):
    rollouts, _ = roll({})
    path = tmp_path / "rollouts.log"
    store = RolloutStore(path)
    for rollout in rollouts.values():
        store.add(rollout)
    store.close()
    blob = bytearray(path.read_bytes())
    blob[len(blob) // 2] ^= 1
    path.write_bytes(bytes(blob))
    with pytest.raises(CheckpointError, match=r"rollouts\.log: damaged"):
        RolloutStore(path)

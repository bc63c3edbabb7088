"""The true environment as a world: rollouts in it are what the environment itself does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pusher import Pusher

from worldenv import audit
from worldenv.config import EnvConfig
from worldenv.data.collect import Recorder
from worldenv.envs.tabletop import Tabletop
from worldenv.envs.true_world import TrueWorld
from worldenv.nouns import Context
from worldenv.rollout.collect import Assignment, Schedule, collect
from worldenv.world import advance, started

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def env():
    desk = Tabletop()
    yield desk
    desk.close()


def contexts(env, count):
    found = []
    for n in range(count):
        now = env.begin(n % 3, "train", n)
        found.append(Context(env.tasks[n % 3], n % 3, n, now.frame, now.pose, now.gripper))
    return found


@pytest.mark.parametrize("every_frame", [False, True])
def test_a_chunk_is_what_the_environment_does(env, every_frame):
    world, some = TrueWorld(env, CPU, every_frame=every_frame), contexts(env, 3)
    scenes = started(world, some, [5, 6, 7])
    assert all(np.array_equal(scene.frame.numpy(), context.frame) for scene, context in zip(scenes, some, strict=True))
    command = torch.linspace(-1, 1, 3 * 16 * 7).view(3, 16, 7)
    first = advance(world, scenes, command[:, :8])
    second = advance(world, [first[i].after for i in (2, 0, 1)], command[[2, 0, 1], 8:])  # in another order
    again = advance(world, scenes, command[:, :8])  # scenes are not used up
    assert all(torch.equal(one.frames, other.frames) for one, other in zip(first, again, strict=True))
    scores, _ = world.judge(world.watch(scenes), first)
    for row, i in enumerate([2, 0, 1]):
        env.begin(i, "train", i)
        moments = [env.advance(one.numpy()) for one in command[i]]
        frames = np.concatenate([first[i].frames.numpy(), second[row].frames.numpy()])
        seen = range(16) if every_frame else (7, 15)
        assert all(np.array_equal(frames[t], moments[t].frame) for t in seen)
        assert torch.cat([scores[i], second[row].score]).tolist() == [float(m.success) for m in moments]
        scene = second[row].after
        assert (scene.number, scene.chunk, scene.context.state_index) == (5 + i, 2, i)
        assert np.array_equal(scene.frame.numpy(), moments[-1].frame)
        assert np.array_equal(scene.proprio.numpy(), env.robot.proprio(moments[-1].pose, np.float64(moments[-1].gripper)))


def test_rows_and_scenes_must_be_as_many(env):
    world = TrueWorld(env, CPU)
    with pytest.raises(ValueError, match="one row each"):
        advance(world, started(world, contexts(env, 2), [0, 1]), torch.zeros(3, 8, 7))


def test_rollouts_end_at_true_success_whatever_the_slots(env):
    world, some = TrueWorld(env, CPU), contexts(env, 12)
    jobs = [Assignment(n, n, context) for n, context in enumerate(some)]

    def rollouts(slots):
        made = collect(Pusher(), world, jobs, seed=3, steps=32, threshold=0.5, schedule=Schedule(slots))
        return sorted(made, key=lambda rollout: rollout.number)

    one, many = rollouts(1), rollouts(5)
    for a, b in zip(one, many, strict=True):
        assert torch.equal(a.action, b.action)
        assert (a.steps, a.value, a.stopped) == (b.steps, b.value, b.stopped)
    for rollout, context in zip(one, some, strict=True):
        env.begin(context.task, "train", context.state_index)
        done = [env.advance(command.numpy()).success for command in rollout.action.clip(-1, 1).flatten(0, 1)[: rollout.steps]]
        assert not any(done[:-1])
        assert (done[-1], rollout.value) == (rollout.stopped, float(rollout.stopped))
    assert 0 < sum(rollout.stopped for rollout in one) < 12


def test_episodes_of_unequal_length_are_imagined_in_one_batch():
    """In the true environment, what is imagined is what was: of 13 and of 8 steps, neither of them a multiple of 5."""
    env = Tabletop(EnvConfig(image=16, train_states=3))
    recorders = []
    for index, steps in ((0, 13), (2, 8)):
        recorder = Recorder(1, "train", index, [env.begin(1, "train", index)])
        for t in range(steps):
            recorder.commands.append(np.full(7, 0.3 - 0.05 * t, np.float32))
            recorder.moments.append(env.advance(recorder.commands[-1]))
        recorders.append(recorder)
    episodes = [recorder.episode(env, "test") for recorder in recorders]
    world = TrueWorld(env, CPU, every_frame=True)
    for batch in (1, 2):
        imagined = audit.imagine_episodes([world], episodes, batch, 5, "imagine")
        assert [len(frames) for frames in imagined] == [14, 9]
        assert all(np.array_equal(frames, episode.frame) for frames, episode in zip(imagined, episodes, strict=True))

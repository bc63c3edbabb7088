"""The learned world as a Gymnasium vector environment (worldenv/gym.py)."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from small_policy import INSTRUCTIONS, SMALL, small_policy
from test_reflector import SMALL as SMALL_REFLECTOR
from test_rollout_bits import CHUNKS, SEED, SMALL_SIMULATOR, contexts, networks
from test_simulator import trained

from tests.untrained import untrained_run
from worldenv import checkpoint, presets
from worldenv.gym import WorldVectorEnv
from worldenv.rollout.collect import Assignment, Flight, Flights, Replica, Schedule
from worldenv.run import RunError
from worldenv.stages import vector_env as opened
from worldenv.stages.desk import open_env
from worldenv.world import ImaginedWorld

K = SMALL_SIMULATOR.chunk
STATES = contexts(SMALL_SIMULATOR, 6)
"""Start state i of task t is number 3 i + t, which it takes for its state index."""
ETA = 0.5


@pytest.fixture(scope="module")
def replica() -> Replica:
    return networks(dataclasses.replace(SMALL, chunk=K), trained(SMALL_SIMULATOR), SMALL_REFLECTOR, small_policy)


def env_of(replica: Replica, num_envs: int, threshold: float = ETA, **more: Any) -> WorldVectorEnv:
    drawn = replica.world

    def world_of(seed: int) -> ImaginedWorld:
        return ImaginedWorld(
            drawn._simulator, drawn._reflector, drawn._robot, drawn._controller, drawn._camera, drawn._latent, seed, drawn._device
        )  # fmt: skip

    return WorldVectorEnv(num_envs, world_of, lambda task, index: STATES[3 * index + task], INSTRUCTIONS, 2, K, CHUNKS * K, threshold, **more)


def flown(replica: Replica, env: WorldVectorEnv, threshold: float) -> dict[int, Flight]:
    """What LOOP's scheduler makes of the same start states and numbers, one at a time."""
    jobs = [Assignment(n, n, STATES[n]) for n in range(4)]
    apart = Replica(replica.policy, env._world_of(SEED), replica.device)
    with Flights([apart], seed=SEED, steps=CHUNKS * K, threshold=threshold, schedule=Schedule(1, 1), keep_frames=True) as flights:
        return {flight.job.number: flight for flight in flights.fly(jobs)}


def middle(replica: Replica) -> float:
    """A threshold that some of these rollouts pass, and some in their first chunk."""
    env = env_of(replica, 4, 2.0)
    best = [float(flight.rollout().score.max()) for flight in flown(replica, env, 2.0).values()]
    return sorted(best)[1]


def test_it_is_what_loop_rolls_out_in(replica: Replica) -> None:
    """The same commands under the same numbers: frames, scores, ends and returns of LOOP's own rollouts."""
    eta = middle(replica)
    env = env_of(replica, 4, eta)
    want = flown(replica, env, eta)
    assert {flight.stopped for flight in want.values()} == {True, False}
    seen, told = env.reset(seed=SEED, options={"task": [0, 1, 2, 0], "index": [0, 0, 0, 1]})
    assert np.array_equal(seen["frame"], np.stack([one.frame for one in STATES[:4]]))
    assert told["instruction"].tolist() == [one.instruction for one in STATES[:4]]
    returned, over = dict[int, float](), set[int]()
    for chunk in range(CHUNKS):
        commands = np.zeros((4, K, 7), np.float32)
        for n, flight in want.items():
            if chunk < len(flight.queries):
                commands[n] = flight.queries[chunk].command.numpy()
        seen, reward, terminated, truncated, told = env.step(commands)
        for n, flight in want.items():
            if n in over:
                continue
            query = flight.queries[chunk]
            assert query.score is not None
            assert query.made is not None
            np.testing.assert_allclose(told["score"][n], query.score.numpy(), atol=1e-5)
            last = min(query.end, K - 1)
            assert np.abs(seen["frame"][n].astype(int) - query.made.frames[last].numpy().astype(int)).max() <= 1
            assert terminated[n] == (flight.stopped and chunk == len(flight.queries) - 1)
            assert truncated[n] == (not flight.stopped and chunk == CHUNKS - 1)
            assert told["steps"][n] == last + 1
            if terminated[n] or truncated[n]:
                over.add(n)
                returned[n] = float(reward[n])
            else:
                assert reward[n] == 0.0
    assert returned.keys() == want.keys()
    for n, flight in want.items():
        assert returned[n] == pytest.approx(flight.rollout().value, abs=1e-5)


def test_an_episode_that_ended_begins_anew_and_the_others_go_on(replica: Replica) -> None:
    env = env_of(replica, 3, -1.0)  # every first frame ends it
    env.reset(seed=1)
    still = np.zeros((3, K, 7), np.float32)
    _, reward, terminated, _, told = env.step(still)
    assert terminated.all()
    assert told["steps"].tolist() == [1, 1, 1]
    assert reward == pytest.approx(told["score"][:, 0])
    seen, reward, terminated, truncated, told = env.step(np.full_like(still, np.nan))  # these do not count
    for nothing in (terminated, truncated, reward, told["_score"]):
        assert not nothing.any()
    assert told["_task"].all()
    for n in range(3):
        assert np.array_equal(seen["frame"][n], STATES[told["index"][n]].frame)
    env._threshold = 2.0
    env._ended[1] = True
    _, _, _, _, told = env.step(still)
    assert told["_score"].tolist() == [True, False, True]
    assert told["_instruction"].tolist() == [False, True, False]
    for _ in range(CHUNKS - 1):
        _, reward, terminated, truncated, told = env.step(still)
    assert truncated.tolist() == [True, False, True]
    assert not terminated.any()
    assert reward == pytest.approx(np.where(truncated, told["score"][:, -1], 0.0))


def test_a_seed_decides_start_states_and_noise(replica: Replica) -> None:
    def history(seed: int) -> list[Any]:
        env = env_of(replica, 3, 2.0)
        seen, told = env.reset(seed=seed)
        after = env.step(np.full((3, K, 7), 0.3, np.float32))[0]
        return [told["task"].tolist(), told["index"].tolist(), seen["frame"].tolist(), after["frame"].tolist()]

    first = history(3)
    assert first == history(3)
    assert first != history(4)
    env = env_of(replica, 1, 2.0)
    frames = []
    for seed in (7, 8):  # the same start state under other noise
        env.reset(seed=seed, options={"task": 1, "index": 0})
        frames.append(env.step(np.zeros((1, K, 7), np.float32))[0]["frame"])
    assert not np.array_equal(*frames)


def test_what_is_seen_and_done_lies_in_the_spaces(replica: Replica) -> None:
    env = env_of(replica, 2, 2.0, render_mode="rgb_array")
    seen, _ = env.reset(seed=0)
    assert env.observation_space.contains(seen)
    action = env.action_space.sample()
    assert env.single_action_space.shape == (K, 7)
    seen, *_ = env.step(action)
    assert env.observation_space.contains(seen)
    pictures = env.render()
    assert pictures is not None
    assert np.array_equal(np.stack(pictures), seen["frame"])
    answer = replica.policy.act(env.query())
    assert answer.command.shape == (2, K, 7)


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (lambda env: env.step(np.zeros((2, K, 7), np.float32)), "call reset first"),
        (lambda env: env.reset(options={"tusk": 1}), r"unknown options \['tusk'\]"),
        (lambda env: env.reset(options={"task": 3}), r"task=3: want 0 \.\. 2"),
        (lambda env: env.reset(options={"index": [0, 2]}), r"index=\[0, 2\]: want 0 \.\. 1"),
        (lambda env: env.reset(options={"index": 0.5}), r"index=0\.5: want 0 \.\. 1"),
        (lambda env: (env.reset(), env.step(np.zeros((2, 7)))), r"actions: \(2, 7\), want"),
        (lambda env: (env.reset(), env.step(np.full((2, K, 7), 1.5))), "environment 0 are not all finite and in -1"),
        (lambda env: (env.reset(), env.step(np.full((2, K, 7), np.nan))), "environment 0 are not all finite and in -1"),
    ],
)
def test_mistakes_are_named(act: Any, says: str, replica: Replica) -> None:
    with pytest.raises((ValueError, RuntimeError), match=says):
        act(env_of(replica, 2))


@pytest.mark.parametrize(
    ("changed", "says"), [({"num_envs": 0}, "num_envs=0"), ({"steps": K + 1}, "multiple of the chunk"), ({"render_mode": "human"}, "rgb_array")]
)
def test_what_does_not_fit_is_refused(changed: dict[str, Any], says: str, replica: Replica) -> None:
    given = {"num_envs": 1, "steps": K, "render_mode": None, **changed}
    fixed: dict[str, Any] = {"tasks": INSTRUCTIONS, "states": 1, "chunk": K, "threshold": ETA}
    with pytest.raises(ValueError, match=says):
        WorldVectorEnv(world_of=lambda _: replica.world, context_of=lambda *_: STATES[0], **given, **fixed)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return untrained_run(tmp_path / "run", presets.TINY)


def test_a_runs_world_is_made_by_name(run: Path) -> None:
    opened.register()
    opened.register()
    env = gymnasium.make_vec(opened.ID, num_envs=2, run=run, device="cpu", steps=16, threshold=1.0)
    seen, told = env.reset(seed=0)
    assert seen["frame"].shape == (2, 64, 64, 3)
    assert all(words in open_env(presets.TINY.env).tasks for words in told["instruction"])
    for chunk in range(2):
        _, _, _, truncated, _ = env.step(env.action_space.sample())
        assert truncated.tolist() == [chunk == 1] * 2
    env.close()
    before = sorted(path.name for path in run.iterdir())
    assert before == [".lock", "run.json", "stages"], "nothing is written"
    shutil.rmtree(run / "stages" / "reward")
    with pytest.raises(checkpoint.CheckpointError, match=r"reflector\.safetensors: no such file"):
        opened.vector_env(run, 2, device="cpu")
    with pytest.raises(RunError, match="no run there"):
        opened.vector_env(run / "stages", 2)


def test_no_gradient_is_kept(replica: Replica) -> None:
    env = env_of(replica, 1, 2.0)
    env.reset(seed=0)
    with torch.enable_grad():
        env.step(np.zeros((1, K, 7), np.float32))
    assert not env._scenes[0].frame.requires_grad
    assert not any(tensor.requires_grad for tensor in vars(env._scenes[0].inside.memory).values() if isinstance(tensor, torch.Tensor))

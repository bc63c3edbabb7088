"""The same rollouts bit for bit, on a CPU, whatever the schedule: real networks, small and of the tiny preset, against a loop without a scheduler."""

from __future__ import annotations

import dataclasses
import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from small_policy import INSTRUCTIONS, SMALL, small_policy, statistics
from test_reflector import SMALL as SMALL_REFLECTOR
from test_simulator import SMALL as SIMULATOR
from test_simulator import trained

from worldenv import kinematics, noise
from worldenv.benchmarks.bench_rollout import THRESHOLD, DrawnEnds
from worldenv.benchmarks.networks import randomised
from worldenv.config import LoopConfig, PolicyConfig, ReflectorConfig, SimulatorConfig
from worldenv.learning.loop.update import Learner
from worldenv.nouns import Camera, Context, Rollout
from worldenv.policy.openvla_oft import OpenVLAOFT
from worldenv.policy.processing import PromptTokenizer
from worldenv.presets import TINY
from worldenv.reflector import weights
from worldenv.robots.tabletop import TABLETOP
from worldenv.rollout.collect import Assignment, Flight, Flights, Query, Replica, RolloutError, Schedule, draw_uniform
from worldenv.simulator.evac import Evac
from worldenv.world import WorldStage, advance, ended_at, observe, started

CPU = torch.device("cpu")
SMALL_SIMULATOR = dataclasses.replace(SIMULATOR, height=8, width=16, denoise_steps=2)
SEED, CHUNKS, GROUP = 5, 3, 4
ENDS = {100 + n: end for n, end in enumerate((3, 12, 99, 6, 5, 99, 1, 8, 99, 4, 99, 9))}
"""Last step of each rollout, for chunks of four: in every chunk, at its borders, and none."""
TO_WORLD = np.array([[1.0, 0, 0, 0], [0, -1, 0, 0], [0, 0, -1, 0.8], [0, 0, 0, 1]])


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As workers have it: the loop that they are compared with must not cut its batches into parts either."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def contexts(config: SimulatorConfig, count: int) -> list[Context]:
    dice = np.random.default_rng(3)
    found = []
    for n in range(count):
        frame = dice.integers(0, 256, (config.height, config.width, 3), dtype=np.uint8)
        pose = np.array([*dice.uniform(-0.05, 0.05, 2), 0.1, 1.0, 0, 0, 0])
        found.append(Context(INSTRUCTIONS[n % 3], n % 3, n, frame, pose, 1.0))
    return found


def networks(
    policy: PolicyConfig, simulator: Evac, reflector: ReflectorConfig, lively: Callable[[PolicyConfig], OpenVLAOFT], device: torch.device = CPU
) -> Replica:
    """A policy in an imagined world."""
    judge = weights.initialise(reflector, INSTRUCTIONS, 0)
    judge.head = weights.fresh_head(reflector, 0)
    config = simulator.config
    camera = Camera(np.array([[25.0, 0, config.width / 2], [0, 25.0, config.height / 2], [0, 0, 1]]), TO_WORLD, config.height, config.width)
    controller = kinematics.ControllerModel.of(TABLETOP)
    ends = {number: end * config.chunk // 4 for number, end in ENDS.items()}
    judge.freeze().to(device)
    world = DrawnEnds(ends, simulator.to(device), judge, TABLETOP, controller, camera, config.latent, SEED, device)
    acts = lively(policy)
    acts.network.to(device)
    return Replica(acts, world, device)


def tiny_policy(config: PolicyConfig) -> OpenVLAOFT:
    policy = OpenVLAOFT.create(config, PromptTokenizer.build(INSTRUCTIONS), statistics(), noise.torch_seed(0, 9), CPU)
    randomised(policy.network)
    return policy


def plain_loop(replica: Replica, job: Assignment, bucket: int) -> Flight:
    """What a loop makes of one rollout without a scheduler, alone in batches of one shape."""
    policy, world, flight = replica.policy, replica.world, Flight(job)
    (scene,) = started(world, [job.context], [job.number])
    watches = world.watch([scene])
    with torch.no_grad():
        while not flight.stopped and scene.chunk < CHUNKS:
            scenes = [scene] * bucket
            answer = policy.act(observe(scenes), draw_uniform(policy, scenes, SEED))
            made = advance(world, scenes, answer.command)[0]
            score, watches = world.judge(watches, [made])
            end = int(ended_at(score, THRESHOLD))
            flight.queries.append(
                Query(scene.frame, scene.proprio, answer.action[0], answer.log_prob[0], answer.command[0], made, score[0], end)
            )
            flight.stopped, scene = end < score.shape[1], made.after
    return flight


@dataclasses.dataclass(frozen=True)
class Plant:
    """Networks, and what rollouts they make in batches of `bucket`."""

    replica: Replica
    bucket: int
    jobs: list[Assignment]
    want: dict[int, Flight]
    steps: int


def plant(replica: Replica, config: SimulatorConfig, groups: int, bucket: int) -> Plant:
    jobs = [Assignment(100 + n, n // GROUP, context) for n, context in enumerate(np.repeat(np.array(contexts(config, groups), object), GROUP))]
    want = {job.number: plain_loop(replica, job, bucket) for job in jobs}
    assert {(flight.stopped, len(flight.queries)) for flight in want.values()} == {(True, 1), (True, 2), (True, 3), (False, 3)}
    return Plant(replica, bucket, jobs, want, CHUNKS * config.chunk)


@pytest.fixture(scope="module")
def small() -> Plant:
    """Two denoising steps with noise, chunks of four."""
    policy = dataclasses.replace(SMALL, chunk=SMALL_SIMULATOR.chunk)
    return plant(networks(policy, trained(SMALL_SIMULATOR), SMALL_REFLECTOR, small_policy), SMALL_SIMULATOR, 3, 2)


@pytest.fixture(scope="module")
def tiny() -> Plant:
    """The networks of the tiny preset, of more steps."""
    config = dataclasses.replace(TINY.simulator, denoise_steps=2)
    simulator = Evac.initialised(config, 0).eval()
    randomised(simulator)
    policy = dataclasses.replace(TINY.policy, llama=dataclasses.replace(TINY.policy.llama, vocab=SMALL.llama.vocab))
    return plant(networks(policy, simulator, TINY.reflector, tiny_policy), config, 2, 4)


def assert_same(got: Flight, want: Flight, frames: bool = True) -> None:
    ours, theirs = got.rollout(), want.rollout()
    assert (ours.number, ours.group, ours.stopped, ours.steps) == (theirs.number, theirs.group, theirs.stopped, theirs.steps)
    for name in ("frame", "proprio", "action", "log_prob", "score", "live"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), f"rollout {ours.number}: {name}"
    if frames:
        assert torch.equal(got.frames(), want.frames()), f"rollout {ours.number}: frames"


def fly(plant: Plant, schedule: Schedule, replicas: Sequence[Replica], **more: Any) -> tuple[dict[int, Flight], dict[str, Any]]:
    with Flights(replicas, seed=SEED, steps=plant.steps, threshold=THRESHOLD, schedule=schedule, keep_frames=True, **more) as flights:
        made = {flight.job.number: flight for flight in flights.fly(plant.jobs)}
        return made, flights.statistics()


def check(plant: Plant, schedule: Schedule, replicas: Sequence[Replica]) -> dict[str, Any]:
    made, statistics = fly(plant, schedule, replicas)
    assert made.keys() == plant.want.keys()
    for number, flight in made.items():
        assert_same(flight, plant.want[number])
    return statistics


SCHEDULES = [(1, "off", 1), (2, "always", 1), (3, "auto", 1), (7, "always", 2), (16, "always", 4), (16, "off", 2), (7, "auto", 4)]


@pytest.mark.parametrize(("slots", "overlap", "workers"), SCHEDULES)
def test_rollouts_do_not_depend_on_the_schedule(small: Plant, slots: int, overlap: Any, workers: int) -> None:
    """The judge takes its time, so that there is something to overlap with."""
    late = Troubled(small.replica, lambda stage, numbers: time.sleep(0.02 * (stage == "reflector")))
    statistics = check(small, Schedule(slots, small.bucket, 1, overlap, streams=2), [Replica(late, late)] * workers)
    if overlap == "off":
        assert statistics["confirmed"] == statistics["dropped"] == 0


def test_what_was_begun_before_a_verdict_is_taken_over_or_forgotten(small: Plant) -> None:
    """The judge waits until the next chunk has begun: every verdict before the limit then confirms or drops it."""
    begun: Counter[int] = Counter()
    judged: Counter[int] = Counter()
    changed = threading.Condition()

    def trouble(stage: str, numbers: Sequence[int]) -> None:
        with changed:
            if stage == "encode":
                begun.update(set(numbers))
                changed.notify_all()
            elif stage == "reflector":
                (number,) = numbers
                judged[number] += 1
                assert judged[number] == CHUNKS or changed.wait_for(lambda: begun[number] > judged[number], timeout=60.0)

    eager = Troubled(small.replica, trouble)
    statistics = check(small, Schedule(1, small.bucket, 1, "always", streams=2), [Replica(eager, eager)])
    ends = [(flight.stopped, len(flight.queries)) for flight in small.want.values()]
    assert statistics["dropped"] == sum(chunks < CHUNKS for _, chunks in ends)
    assert statistics["confirmed"] == sum(chunks - 1 for _, chunks in ends)


@pytest.mark.slow
@pytest.mark.parametrize(("slots", "overlap", "workers"), list(itertools.product((1, 2, 3, 7, 16), ("off", "always"), (1, 2, 4))))
def test_rollouts_of_the_tiny_preset_do_not_depend_on_the_schedule(tiny: Plant, slots: int, overlap: Any, workers: int) -> None:
    check(tiny, Schedule(slots, tiny.bucket, 1, overlap, streams=2), [tiny.replica] * workers)


class Troubled:
    """A policy in a world whose every call may first sleep, or fail."""

    def __init__(self, of: Replica, trouble: Callable[[str, Sequence[int]], None]) -> None:
        self._of, self._trouble = of, trouble
        self.chunk, self.at_home = of.policy.chunk, False
        self.begin, self.enter, self.watch = of.world.begin, of.world.enter, of.world.watch

    def act(self, observation: Any, uniform: Any = None) -> Any:
        self._trouble("policy", ())
        return self._of.policy.act(observation, uniform)

    @property
    def stages(self) -> tuple[WorldStage, ...]:
        return tuple(dataclasses.replace(stage, run=self._after_trouble(stage)) for stage in self._of.world.stages)

    def _after_trouble(self, stage: WorldStage) -> Callable[[Sequence[Any]], list[Any]]:
        def run(work: Sequence[Any]) -> list[Any]:
            scenes = [one[0] if isinstance(one, tuple) else one.before for one in work]
            self._trouble(stage.name, [scene.number for scene in scenes])
            return stage.run(work)

        return run

    def judge(self, watches: Sequence[Any], made: Sequence[Any]) -> Any:
        self._trouble("reflector", [one.after.number for one in made])
        return self._of.world.judge(watches, made)


@pytest.mark.parametrize("seed", range(3))
def test_delays_and_failures_change_nothing(small: Plant, seed: int) -> None:
    dice, lock = random.Random(seed), threading.Lock()

    def trouble(stage: str, numbers: Sequence[int]) -> None:
        with lock:
            pause, fails = dice.random() * 0.004, dice.random() < 0.05
        time.sleep(pause)
        if fails:
            raise MemoryError("the device is full")

    troubled = Troubled(small.replica, trouble)
    made, statistics = fly(small, Schedule(7, small.bucket, 1, "always", attempts=50, streams=2), [Replica(troubled, troubled)] * 2)
    assert sum(row["failures"] for row in statistics["stages"]) > 0
    assert made.keys() == small.want.keys()
    for number, flight in made.items():
        assert_same(flight, small.want[number])


def test_a_rollout_that_keeps_failing_is_reported_with_its_key_after_all_others(small: Plant) -> None:
    bad = small.jobs[5].number

    def trouble(stage: str, numbers: Sequence[int]) -> None:
        if stage == "decode" and bad in numbers:
            raise MemoryError("the device is full")

    troubled = Troubled(small.replica, trouble)
    given: dict[int, Flight] = {}

    def take(flights: Flights) -> None:
        for flight in flights.fly(small.jobs):
            given[flight.job.number] = flight

    schedule = Schedule(16, small.bucket)
    with Flights([Replica(troubled, troubled)], seed=SEED, steps=small.steps, threshold=THRESHOLD, schedule=schedule) as flights:
        key = rf"rollout {bad} of group 1 \(seed {SEED}\): .*decode.*MemoryError: the device is full"
        with pytest.raises(RolloutError, match=key) as error:
            take(flights)
    assert isinstance(error.value.__cause__, MemoryError)
    assert given.keys() == small.want.keys() - {bad}
    for number, flight in given.items():
        assert_same(flight, small.want[number], frames=False)


def test_a_rollout_whose_latents_are_not_finite_is_reported_and_takes_no_other_with_it(small: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its frames would be black, and the judge would score them."""
    bad, world, given = small.jobs[2].number, small.replica.world, dict[int, Flight]()
    drawn = world._noise  # type: ignore[attr-defined]

    def noises(scenes: Sequence[Any]) -> torch.Tensor:
        made: torch.Tensor = drawn(scenes)
        made[[i for i, scene in enumerate(scenes) if (scene.number, scene.chunk) == (bad, 1)]] = float("nan")
        return made

    monkeypatch.setattr(world, "_noise", noises)

    def take(flights: Flights) -> None:
        for flight in flights.fly(small.jobs):
            given[flight.job.number] = flight

    said = rf"rollout {bad} of group 0 .*decode.*FloatingPointError: latents of chunk 1 are not finite"
    flown = Flights([small.replica], seed=SEED, steps=small.steps, threshold=THRESHOLD, schedule=Schedule(16, small.bucket))
    with flown as flights, pytest.raises(RolloutError, match=said):
        take(flights)
    assert given.keys() == small.want.keys() - {bad}
    for number, flight in given.items():
        assert_same(flight, small.want[number], frames=False)


def test_cancelled_rollouts_are_not_given_out_and_change_no_others(small: Plant) -> None:
    gone = {small.jobs[i].number for i in (2, 7, 11)}
    given: dict[int, Flight] = {}
    with Flights([small.replica], seed=SEED, steps=small.steps, threshold=THRESHOLD, schedule=Schedule(3, small.bucket)) as flights:
        for i, flight in enumerate(flights.fly(small.jobs)):
            given[flight.job.number] = flight
            if i == 0:
                for number in gone:
                    flights.cancel(number)
        cancelled = flights.statistics()["cancelled"]
    assert cancelled == len(small.want) - len(given) > 0
    assert small.want.keys() - given.keys() <= gone
    for number, flight in given.items():
        assert_same(flight, small.want[number], frames=False)


@pytest.mark.parametrize("which", ["small", pytest.param("tiny", marks=pytest.mark.slow)])
def test_rows_of_a_batch_keep_apart(which: str, request: pytest.FixtureRequest) -> None:
    """At one shape, a row's result depends neither on its place in the batch nor on the other rows."""
    now: Plant = request.getfixturevalue(which)
    policy, world, bucket, dice = now.replica.policy, now.replica.world, now.bucket, random.Random(0)
    with torch.no_grad():
        scenes = [scene for job in now.jobs[:8] for scene in started(world, [job.context], [job.number])]
        later = [one.after for one in advance(world, scenes[:bucket], policy.act(observe(scenes[:bucket])).command)]
        everyone = [*later, *scenes[bucket:]]
        results: dict[int, list[torch.Tensor]] = {}
        for _ in range(8):
            chosen = dice.sample(range(8), bucket)
            some = [everyone[i] for i in chosen]
            answer = policy.act(observe(some), draw_uniform(policy, some, SEED))
            made = advance(world, some, answer.command)
            for row, i in enumerate(chosen):
                got = [answer.action[row], answer.log_prob[row], made[row].frames, made[row].after.inside.memory.history]
                for one, other in zip(got, results.setdefault(i, got), strict=True):
                    assert torch.equal(one, other)


def test_loop_learns_the_same_from_scheduled_rollouts_as_from_the_plain_loop(small: Plant) -> None:
    """One iteration of LOOP: equal metrics and equal weights, bit for bit."""

    def learned(collect: Callable[[Replica], list[Rollout]]) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
        policy = small_policy(dataclasses.replace(SMALL, chunk=SMALL_SIMULATOR.chunk))
        learner = Learner(policy, LoopConfig(group=GROUP, contexts=3, batch=4), SEED)
        metrics = learner.update(collect(Replica(learner.policy, small.replica.world)), 0)
        return metrics, learner.tree()["trained"]

    def scheduled(replica: Replica) -> list[Rollout]:
        made, _ = fly(small, Schedule(7, small.bucket, 1, "always"), [replica] * 2)
        return [flight.rollout() for flight in made.values()]

    def plain(replica: Replica) -> list[Rollout]:
        return [plain_loop(replica, job, small.bucket).rollout() for job in small.jobs]

    (ours, ours_weights), (theirs, theirs_weights) = learned(scheduled), learned(plain)
    assert ours == theirs
    assert ours_weights.keys() == theirs_weights.keys()
    assert all(torch.equal(tensor, theirs_weights[name]) for name, tensor in ours_weights.items())

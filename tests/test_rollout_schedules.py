"""Hundreds of schedules of a world so small that every value is a hash of all values before it: each gives the rollouts of a plain loop.

A chunk that is made twice from other memory, a verdict that leaks into the front, a stage that runs early, or another rollout's row shows at once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from worldenv.nouns import ActionChunk, Context, Observation
from worldenv.rollout.collect import ALL_PARTS, Assignment, Flight, Flights, Query, Replica, RolloutError, Schedule, draw_uniform
from worldenv.world import Made, Scene, WorldStage, advance, ended_at, observe, started

K, CHUNKS, COUNT, GROUP, SEED = 2, 5, 18, 3, 9
THRESHOLD = 0.85


def mix(*parts: Any) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=6).digest(), "big")


class ToyPolicy:
    """Acts by its uniform numbers and what it sees and feels."""

    chunk = K

    def act(self, observation: Observation, uniform: torch.Tensor | None = None) -> ActionChunk:
        assert uniform is not None
        seen = observation.frame.double().mean((1, 2, 3)) / 255 + observation.proprio[:, 0].double()
        action = (uniform + seen[:, None, None]).float()
        return ActionChunk(action, action, action, action.sum(-1), action.clamp(-1, 1))


class ToyWorld:
    """Three stages, two of them in two steps; may wait or fail before it does anything."""

    def __init__(self, dice: random.Random | None = None, at_home: bool = False, faults: float = 0.0) -> None:
        self.at_home, self._dice, self._faults, self._lock = at_home, dice, faults, threading.Lock()
        self._thread, self.strangers = threading.get_ident(), 0
        self.stages = (
            WorldStage("encode", self._stage(self._encode)), WorldStage("denoise", self._stage(self._denoise), steps=2),
            WorldStage("decode", self._stage(self._decode), steps=2, batched=False),
        )  # fmt: skip

    def trouble(self) -> None:
        if self._dice is None:
            return
        with self._lock:
            pause, fails = self._dice.random() ** 8 * 0.002, self._dice.random() < self._faults
        time.sleep(pause)
        if fails:
            raise OSError("a fault")

    def _stage(self, part: Any) -> Any:
        def run(work: Sequence[Any]) -> list[Any]:
            self.strangers += threading.get_ident() != self._thread
            self.trouble()
            return [part(one) for one in work]

        return run

    def begin(self, contexts: Sequence[Context], numbers: Sequence[int]) -> list[Scene]:
        self.strangers += threading.get_ident() != self._thread
        seen = [self._scene(context, number, 0, mix(context.state_index)) for context, number in zip(contexts, numbers, strict=True)]
        return [dataclasses.replace(scene, inside=None) for scene in seen]

    def enter(self, scenes: Sequence[Scene]) -> list[Any]:
        self.strangers += threading.get_ident() != self._thread
        return [mix(scene.context.state_index) for scene in scenes]

    def _scene(self, context: Context, number: int, chunk: int, memory: int) -> Scene:
        frame = torch.tensor([memory >> 8 * i & 255 for i in range(3)], dtype=torch.uint8).expand(2, 2, 3).clone()
        return Scene(context, number, chunk, frame, torch.tensor([memory % 997 / 997]), memory)

    def watch(self, scenes: Sequence[Scene]) -> list[Any]:
        return [mix("watch", mix(scene.context.state_index)) for scene in scenes]

    def _encode(self, one: Any) -> Any:
        scene, command = one
        return scene, mix(scene.inside, scene.number, scene.chunk, command.tolist()), 0

    def _denoise(self, one: Any) -> Any:
        scene, state, step = one
        return scene, mix(state, step), step + 1

    def _decode(self, one: Any) -> Any:
        scene, state, step = one
        if step == 2:
            return scene, mix(state, "half"), step + 1
        assert step == 3
        after = self._scene(scene.context, scene.number, scene.chunk + 1, state)
        return Made(torch.stack([after.frame] * K), after)

    def judge(self, watches: Sequence[Any], made: Sequence[Made]) -> tuple[torch.Tensor, list[Any]]:
        self.trouble()
        after = [mix(watch, one.frames.tolist()) for watch, one in zip(watches, made, strict=True)]
        return torch.tensor([[mix(watch, k) / 2**48 for k in range(K)] for watch in after]), after


def jobs() -> list[Assignment]:
    some = [Context("push", 0, g, np.zeros((2, 2, 3), np.uint8), np.array([0, 0, 0, 0, 0, 0, 1.0]), 1.0) for g in range(COUNT // GROUP)]
    return [Assignment(40 + n, n // GROUP, some[n // GROUP]) for n in range(COUNT)]


def plain_loop(job: Assignment) -> Flight:
    policy, world, flight = ToyPolicy(), ToyWorld(), Flight(job)
    (scene,) = started(world, [job.context], [job.number])
    watches = world.watch([scene])
    while not flight.stopped and scene.chunk < CHUNKS:
        answer = policy.act(observe([scene]), draw_uniform(policy, [scene], SEED))
        (made,) = advance(world, [scene], answer.command)
        score, watches = world.judge(watches, [made])
        end = int(ended_at(score, THRESHOLD))
        flight.queries.append(Query(scene.frame, scene.proprio, answer.action[0], answer.log_prob[0], answer.command[0], made, score[0], end))
        flight.stopped, scene = end < K, made.after
    return flight


@pytest.fixture(scope="module")
def want() -> dict[int, Flight]:
    made = {job.number: plain_loop(job) for job in jobs()}
    assert len({(flight.stopped, len(flight.queries)) for flight in made.values()}) > 4
    return made


def same(one: Flight, other: Flight) -> bool:
    ours, theirs = one.rollout(), other.rollout()
    tensors = all(torch.equal(getattr(ours, name), getattr(theirs, name)) for name in ("frame", "proprio", "action", "log_prob", "score", "live"))
    return tensors and torch.equal(one.frames(), other.frames()) and ours.stopped == theirs.stopped and ours.group == theirs.group


@pytest.mark.parametrize("block", range(6))
def test_any_schedule_gives_the_rollouts_of_a_plain_loop(block: int, want: dict[int, Flight]) -> None:
    """50 schedules a block: slots, batches, workers and their parts, streams, overlap, delays, faults, cancellations, all drawn."""
    dropped = confirmed = failures = gone = strangers = apart = 0
    for number in range(50):
        dice = random.Random(50 * block + number)
        at_home = dice.random() < 0.2
        world = ToyWorld(dice, at_home, dice.choice([0.0, 0.0, 0.03]))
        workers = 1 if at_home else dice.choice([1, 2, 4])
        schedule = Schedule(
            dice.choice([1, 2, 3, 7, 16]), dice.choice([1, 2, 4]), dice.choice([1, 3]), dice.choice(["off", "auto", "always"]), attempts=40,
            streams=dice.choice([1, 2]),
        )  # fmt: skip
        cancelled = set(dice.sample(range(40, 40 + COUNT), 3)) if dice.random() < 0.3 else set()
        given: dict[int, Flight] = {}
        parts = [ALL_PARTS] * workers
        if dice.random() < 0.5:
            parts = [frozenset(part for part in sorted(ALL_PARTS) if dice.random() < 0.5) for _ in range(workers)]
        parts[0] |= ALL_PARTS - frozenset().union(*parts)
        replicas = [Replica(ToyPolicy(), world, parts=some) for some in parts]
        apart += sum(some != ALL_PARTS for some in parts)
        with Flights(replicas, seed=SEED, steps=K * CHUNKS, threshold=THRESHOLD, schedule=schedule, keep_frames=True) as flights:
            for flight in flights.fly(jobs()):
                if not given:
                    for one in cancelled:
                        flights.cancel(one)
                given[flight.job.number] = flight
            statistics = flights.statistics()
        assert want.keys() - given.keys() <= cancelled, schedule
        assert all(same(flight, want[key]) for key, flight in given.items()), schedule
        dropped, confirmed = dropped + statistics["dropped"], confirmed + statistics["confirmed"]
        failures += sum(row["failures"] for row in statistics["stages"])
        gone += len(want) - len(given)
        strangers += world.strangers if at_home else 0
    assert min(dropped, confirmed, failures, gone, apart) > 0, "all of these were tried"
    assert strangers == 0, "a world with a home is called there"


def test_other_rollouts_are_given_out_before_a_failure_is_told(want: dict[int, Flight]) -> None:
    class Broken(ToyWorld):
        def _decode(self, one: Any) -> Any:
            if one[0].number == 47 and one[0].chunk == 1:
                raise ValueError("no such frame")
            return super()._decode(one)

    given: dict[int, Flight] = {}

    def take(flights: Flights) -> None:
        for flight in flights.fly(jobs()):
            given[flight.job.number] = flight

    told = pytest.raises(RolloutError, match=r"^rollout 47 of group 2 \(seed 9\): .*ValueError: no such frame")
    toy = {"seed": SEED, "steps": K * CHUNKS, "threshold": THRESHOLD, "keep_frames": True}
    with Flights([Replica(ToyPolicy(), Broken())], schedule=Schedule(3, 2, 1, "always", streams=2), **toy) as flights, told:
        take(flights)
    assert len(want[47].queries) > 1, "it comes to its second chunk"
    assert given.keys() == want.keys() - {47}
    assert all(same(flight, want[key]) for key, flight in given.items())


def test_threads_are_joined_where_a_consumer_stops_early() -> None:
    before = threading.active_count()
    for at_home in (False, True):
        world = ToyWorld(random.Random(0), at_home)
        with Flights([Replica(ToyPolicy(), world)], seed=SEED, steps=K * CHUNKS, threshold=THRESHOLD, schedule=Schedule(4, 2)) as flights:
            next(iter(flights.fly(jobs())))
    deadline = time.monotonic() + 30
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_workers_of_one_device_share_its_slots() -> None:
    def replicas(*devices: str) -> list[Replica]:
        return [Replica(ToyPolicy(), ToyWorld(), torch.device(device)) for device in devices]

    alone = dataclasses.replace(replicas("cuda:2")[0], parts=frozenset({"reflector"}))
    assert [Schedule(16).each(replicas(*["cpu"] * count)) for count in (1, 2, 3)] == [16, 8, 6]
    assert [Schedule(16).each(some) for some in (replicas("cuda:0", "cuda:1"), [*replicas("cuda:0", "cuda:1"), alone])] == [16, 16]


def test_threads_of_the_caller_are_as_they_were() -> None:
    own = torch.get_num_threads()
    before = own + 1  # of one thread nothing could be seen
    torch.set_num_threads(before)
    with Flights([Replica(ToyPolicy(), ToyWorld())], seed=SEED, steps=K * CHUNKS, threshold=THRESHOLD, schedule=Schedule(4, 2)) as flights:
        list(flights.fly(jobs()))
    started: list[int] = []
    thread = threading.Thread(target=lambda: started.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    found = [torch.get_num_threads(), *started]
    torch.set_num_threads(own)
    assert found == [before] * 2


def test_what_cannot_be_rolled_out_is_refused() -> None:
    replica, given = Replica(ToyPolicy(), ToyWorld()), jobs()
    with pytest.raises(ValueError, match="multiple of the policy's chunk of 2"):
        Flights([replica], seed=SEED, steps=3, threshold=0.5, schedule=Schedule())
    with pytest.raises(ValueError, match="must be called on one thread"):
        Flights([Replica(ToyPolicy(), ToyWorld(at_home=True))] * 2, seed=SEED, steps=4, threshold=0.5, schedule=Schedule())
    with pytest.raises(ValueError, match="2 replicas without a reflector: want at least one"):
        Flights([dataclasses.replace(replica, parts=ALL_PARTS - {"reflector"})] * 2, seed=SEED, steps=4, threshold=0.5, schedule=Schedule())
    with pytest.raises(ValueError, match="want at least 1 of slots"):
        Schedule(bucket=0)
    mixed = [given[0], dataclasses.replace(given[3], group=given[0].group)]
    with (
        Flights([replica], seed=SEED, steps=4, threshold=0.5, schedule=Schedule()) as flights,
        pytest.raises(ValueError, match="group 0 has rollouts of several contexts"),
    ):
        list(flights.fly(mixed))

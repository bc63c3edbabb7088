"""The scheduler on worker threads, called from Python: any schedule gives the rollouts of a plain loop.

The toy world's every value is a hash of the value before it: a stage that runs early, twice, or on another rollout's data shows.
"""

from __future__ import annotations

import gc
import hashlib
import random
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from worldenv._core import Batch, Ending, GroupEnding, Runner, SchedulerConfig, Stage, measure_overhead

STEPS = (1, 3, 1, 1)  # policy, denoise, decode, reflector
LIMIT = 5
Key = tuple[int, int, int, int]  # rollout, chunk, stage, step


def mix(*parts: int) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=6).digest(), "big")


def length(seed: int, rollout: int) -> int:
    """Chunks until the toy reflector stops the rollout; some do not stop before LIMIT."""
    return 1 + mix(seed, rollout) % 7


def plain_loop(seed: int, rollout: int) -> tuple[int, float, str]:
    """Chunks, value and why: what a loop without any scheduler gives."""
    frames, watch = rollout, 0
    for chunk in range(LIMIT):
        for stage, steps in enumerate(STEPS[:-1]):
            for step in range(steps):
                frames = mix(frames, stage, step)
        watch = mix(watch, frames)
        if chunk + 1 >= length(seed, rollout):
            return chunk + 1, watch / 2**48, "stopped"
    return LIMIT, watch / 2**48, "limit"


class Toy:
    """Executors over a shared memory; `trouble(batch)` is called first, and may sleep or raise."""

    def __init__(self, seed: int, trouble: Callable[[Batch], None] = lambda batch: None) -> None:
        self.seed, self.trouble = seed, trouble
        self.memory: dict[Key, int] = {}
        self.inside: Counter[tuple[int, int]] = Counter()
        self.lock = threading.Lock()
        self.wrong: list[str] = []

    def _check(self, says: bool, what: str) -> None:
        if not says:
            self.wrong.append(what)

    def run(self, batch: Batch) -> list[tuple[bool, float]] | None:
        with self.lock:
            self.inside[batch.stage, batch.device] += 1
            self._check(self.inside[batch.stage, batch.device] == 1, "two batches at once on one device and stage")
        try:
            self.trouble(batch)
            items = list(zip(batch.rollout.tolist(), batch.chunk.tolist(), batch.step.tolist(), strict=True))
            self._check(0 < len(items) <= batch.shape and len(set(items)) == len(items), "shape or doubles")
            if batch.stage == len(STEPS) - 1:
                return [self.judge(rollout, chunk) for rollout, chunk, _ in items]
            for rollout, chunk, step in items:
                self.draw(rollout, chunk, batch.stage, step)
            return None
        finally:
            with self.lock:
                self.inside[batch.stage, batch.device] -= 1

    def draw(self, rollout: int, chunk: int, stage: int, step: int) -> None:
        last = len(STEPS) - 2
        if step:
            before = self.memory[rollout, chunk, stage, step - 1]
        elif stage:
            before = self.memory[rollout, chunk, stage - 1, STEPS[stage - 1] - 1]
        else:
            before = self.memory[rollout, chunk - 1, last, STEPS[last] - 1] if chunk else rollout
        self._check((rollout, chunk, stage, step) not in self.memory, "run twice")
        self.memory[rollout, chunk, stage, step] = mix(before, stage, step)

    def judge(self, rollout: int, chunk: int) -> tuple[bool, float]:
        last, judge = len(STEPS) - 2, len(STEPS) - 1
        before = self.memory[rollout, chunk - 1, judge, 0] if chunk else 0
        now = self.memory[rollout, chunk, judge, 0] = mix(before, self.memory[rollout, chunk, last, STEPS[last] - 1])
        return chunk + 1 >= length(self.seed, rollout), now / 2**48


def any_config(dice: random.Random) -> SchedulerConfig:
    devices = dice.choice([1, 2, 4])
    everywhere = list(range(devices))
    split = devices > 1 and dice.random() < 0.4
    front, back = (everywhere[:-1], everywhere[-1:]) if split else (everywhere, everywhere)
    buckets = dice.choice([[4], [1, 2, 4], [1, 2, 3, 4, 5, 6, 7, 8]])
    names = ("policy", "denoise", "decode", "reflector")
    stages = [Stage(name, buckets, steps, back if name == "reflector" else front) for name, steps in zip(names, STEPS, strict=True)]
    return SchedulerConfig(
        stages, devices=devices, slots=dice.choice([1, 2, 3, 7, 16]), streams=dice.choice([1, 2, 4]),
        overlap=dice.choice(["off", "auto", "always"]), lock_step=dice.random() < 0.1, linger=dice.choice([0.0, 1e-4]),
        max_wait=dice.choice([1e-4, 1.0]), unread=dice.choice([0, 0, 3]),
    )  # fmt: skip


def drain(runner: Runner) -> tuple[dict[int, Ending], dict[int, GroupEnding]]:
    """Everything that is under way, to its end; a group never before its last rollout."""
    endings: dict[int, Ending] = {}
    groups: dict[int, GroupEnding] = {}
    while (report := runner.next(60.0)) is not None:
        if isinstance(report, Ending):
            assert report.rollout not in endings
            endings[report.rollout] = report
        else:
            groups[report.group] = report
            assert sum(one.group == report.group for one in endings.values()) == report.rollouts
    assert runner.idle
    return endings, groups


def sleepy(dice: random.Random) -> Callable[[Batch], None]:
    """Delays of 0 to 0.3 ms, each device and stage slow by its own measure."""
    slow = {(stage, device): dice.choice([0.0, 0.0, 1e-4, 3e-4]) for stage in range(4) for device in range(4)}

    def trouble(batch: Batch) -> None:
        if slow[batch.stage, batch.device]:
            time.sleep(random.random() * slow[batch.stage, batch.device])

    return trouble


def outcome(ending: Ending) -> tuple[int, float, str]:
    return ending.chunks, ending.value, ending.why


def jobs(count: int) -> list[tuple[int, int, int]]:
    return [(100 + i, i // 4, LIMIT) for i in range(count)]


@pytest.mark.parametrize("block", range(10))
def test_any_schedule_gives_the_same_rollouts(block: int) -> None:
    """300 schedules of slots, devices, streams, overlap, placement and delays, and lock step among them."""
    for seed in range(30 * block, 30 * block + 30):
        dice = random.Random(seed)
        toy = Toy(seed, sleepy(dice))
        with Runner(any_config(dice), [toy.run] * 4) as runner:
            runner.submit(jobs(12))
            endings, groups = drain(runner)
            statistics = runner.statistics()
        assert toy.wrong == []
        assert {number: outcome(one) for number, one in endings.items()} == {100 + i: plain_loop(seed, 100 + i) for i in range(12)}
        assert set(groups) == {0, 1, 2}
        for number, group in groups.items():
            values = [one.value for one in endings.values() if one.group == number]
            assert (group.low, group.high) == (min(values), max(values))
            assert group.mean == pytest.approx(np.mean(values))
        run = sum(row["items"] for row in statistics["stages"])
        wasted = sum(row["wasted"] for row in statistics["stages"])
        needed = sum(sum(STEPS) * one.chunks for one in endings.values()) + sum(STEPS) * statistics["dead_chunks"]
        assert run == needed + wasted


def test_a_raising_executor_costs_its_own_rollout_and_is_named() -> None:
    for seed in range(60):
        dice = random.Random(seed)
        bad, stage, chunk = 100 + dice.randrange(12), dice.randrange(4), 0
        once: set[Key] = set()
        alone: Counter[int] = Counter()
        sleep, lock, chance = sleepy(dice), threading.Lock(), random.Random(seed + 1)

        def trouble(
            batch: Batch, bad: int = bad, stage: int = stage, once: set[Key] = once, alone: Counter[int] = alone,
            sleep: Callable[[Batch], None] = sleep, lock: threading.Lock = lock, chance: random.Random = chance,
        ) -> None:  # fmt: skip
            sleep(batch)
            with lock:
                if batch.stage == stage and bad in batch.rollout:
                    alone[bad] += len(batch.rollout) == 1
                    raise RuntimeError("out of memory")
                key = (int(batch.rollout[0]), int(batch.chunk[0]), batch.stage, int(batch.step[0]))
                if key not in once and chance.random() < 0.1:
                    once.add(key)
                    raise ValueError("for once")

        toy = Toy(seed, trouble)
        with Runner(any_config(dice), [toy.run] * 4) as runner:
            runner.submit(jobs(12))
            endings, groups = drain(runner)
        assert toy.wrong == []
        failed = endings.pop(bad)
        assert failed.why == "failed"
        assert alone[bad] == 3
        assert failed.message.startswith(f"stage {('policy', 'denoise', 'decode', 'reflector')[stage]}, chunk {chunk}")
        assert failed.message.endswith("RuntimeError: out of memory")
        assert {number: outcome(one) for number, one in endings.items()} == {number: plain_loop(seed, number) for number in endings}
        assert {number: one.failed for number, one in groups.items()} == {n: int(n == (bad - 100) // 4) for n in range(3)}


def test_the_cancelled_go_and_the_others_do_not_notice() -> None:
    cancelled = 0
    for seed in range(60):
        dice = random.Random(seed)
        toy = Toy(seed, sleepy(dice))
        with Runner(any_config(dice), [toy.run] * 4) as runner:
            runner.submit(jobs(12))
            unwanted = dice.sample(range(100, 112), 3)
            for number in unwanted:
                time.sleep(dice.random() * 2e-3)
                runner.cancel(number)
            endings, groups = drain(runner)
        assert toy.wrong == []
        assert len(endings) == 12
        for number, one in endings.items():
            if one.why == "cancelled":
                assert number in unwanted
                cancelled += 1
            else:
                assert outcome(one) == plain_loop(seed, number)
        assert sum(one.cancelled for one in groups.values()) == sum(one.why == "cancelled" for one in endings.values())
    assert cancelled > 30


@pytest.mark.parametrize(
    ("executor", "message"),
    [
        (lambda batch: None, "TypeError|something else"),
        (lambda batch: [(True, 1.0)] * 9, "9 verdicts for"),
        (lambda batch: [(True, float("nan"))] * len(batch.rollout), "not finite"),
        (lambda batch: "yes", "something else"),
    ],
)
def test_a_judge_that_does_not_judge_is_told(executor: Callable[[Batch], object], message: str) -> None:
    config = SchedulerConfig([Stage("policy", [4]), Stage("reflector", [4])], slots=3)
    with Runner(config, [lambda batch: None, executor]) as runner:  # type: ignore[list-item]
        runner.submit([(1, 1, 2), (2, 1, 2)])
        endings, _ = drain(runner)
    for one in endings.values():
        assert one.why == "failed"
        assert any(part in one.message for part in message.split("|")), one.message
    with Runner(config, [executor, lambda batch: None]) as runner:  # type: ignore[list-item]
        runner.submit([(1, 1, 2)])
        endings, _ = drain(runner)
    assert endings[1].why == "failed"


def test_results_that_nobody_takes_hold_back_new_rollouts() -> None:
    toy = Toy(3)
    config = SchedulerConfig([Stage(name, [4], steps) for name, steps in zip("abcd", STEPS, strict=True)], slots=2, unread=3)
    with Runner(config, [toy.run] * 4) as runner:
        runner.submit(jobs(40))
        deadline = time.monotonic() + 30
        while runner.statistics()["endings"] < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert 3 <= runner.statistics()["endings"] <= 5
        endings, _ = drain(runner)
    assert len(endings) == 40


def test_what_is_wrong_is_said_in_one_line() -> None:
    stages = [Stage("policy", [1]), Stage("reflector", [1])]
    for refused in (
        lambda: SchedulerConfig([]),
        lambda: SchedulerConfig(stages, slots=0),
        lambda: SchedulerConfig(stages, overlap="sometimes"),  # type: ignore[arg-type]
        lambda: SchedulerConfig(stages, linger=-1.0),
        lambda: SchedulerConfig([Stage("policy", [2, 1]), stages[1]]),
        lambda: SchedulerConfig([Stage("policy", [1], devices=[3]), stages[1]]),
        lambda: Runner(SchedulerConfig(stages), [lambda batch: None]),
        lambda: measure_overhead(SchedulerConfig(stages), [(0, 0, 1)], []),
    ):
        with pytest.raises(ValueError, match="want"):
            refused()
    with Runner(SchedulerConfig(stages), [lambda batch: time.sleep(0.2), lambda batch: [(True, 1.0)]]) as runner:
        runner.submit([(7, 0, 1)])
        with pytest.raises(ValueError, match="rollout 7 is in flight"):
            runner.submit([(7, 1, 1)])
        with pytest.raises(ValueError, match="group 0 is in flight"):
            runner.submit([(8, 0, 1)])


def test_it_stops_in_the_middle_and_waits_no_longer_than_asked() -> None:
    toy = Toy(5, lambda batch: time.sleep(1e-3))
    config = SchedulerConfig([Stage(name, [4], steps) for name, steps in zip("abcd", STEPS, strict=True)], slots=2)
    runner = Runner(config, [toy.run] * 4)
    runner.submit(jobs(400))
    before = time.monotonic()
    while runner.next(0.0) is not None:
        pass
    assert time.monotonic() - before < 5
    runner.stop()
    while runner.next(0.0) is not None:
        pass
    assert runner.next() is None  # stopped: nothing will come any more
    with pytest.raises(ValueError, match="stopped"):
        runner.submit([(900, 900, 1)])


def test_what_a_stopped_runner_called_is_let_go() -> None:
    class Holder:
        def __init__(self) -> None:
            stages = [Stage("policy", [1]), Stage("reflector", [1])]
            self.runner = Runner(SchedulerConfig(stages), [self.act, lambda batch: [(True, 1.0)]])

        def act(self, batch: Batch) -> None:
            pass

    holder = Holder()
    holder.runner.submit([(1, 1, 1)])
    drain(holder.runner)
    holder.runner.stop()
    gone = weakref.ref(holder)
    del holder
    gc.collect()
    assert gone() is None


def test_waiting_executors_do_not_hold_the_interpreter() -> None:
    """Four devices that wait 20 ms per batch take about as long as one."""
    config = SchedulerConfig([Stage("policy", [1], devices=range(4)), Stage("reflector", [1], devices=range(4))], devices=4)

    def wait(batch: Batch) -> None:
        time.sleep(0.02)

    seconds = {}
    for count in (1, 4):
        before = time.monotonic()
        with Runner(config, [wait, lambda batch: [(False, 0.0)] * len(batch.rollout)]) as runner:
            runner.submit([(i, i, 10) for i in range(count)])
            drain(runner)
        seconds[count] = time.monotonic() - before
    assert seconds[4] < 2.5 * seconds[1]

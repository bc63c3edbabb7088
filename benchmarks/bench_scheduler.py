"""What does scheduling cost? Ceiling: nothing; an event is a batch that has ended, with all that follows from it until the next batches go out.

Measured with executors that do nothing: the C++ core on one thread, then Python callables on worker threads, through the GIL and back. Simulated
with the measured costs: 1 to 1024 GPUs under one scheduler, which does one event at a time, each as long as a Python round trip.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from worldenv import _core
from worldenv.benchmarks.bench_plan import PlanArgs, Plant, ends, placements, plant_of
from worldenv.benchmarks.plan_costs import GPUS


@dataclass(frozen=True)
class SchedulerArgs:
    """Measure what an event costs the scheduler, and simulate how far one scheduler reaches: a table, then one line of JSON."""

    slots: int = 64
    """Rollouts in flight per GPU."""
    most_gpus: int = 1024
    """Powers of two up to this are simulated."""
    gpu: str = "b200"
    """Of the simulated GPUs; a faster one asks more of the scheduler."""
    repeats: int = 5
    """Runs; medians over all of them."""


_MEAN = 0.55


def _config(plant: Plant, gpus: int, slots: int) -> _core.SchedulerConfig:
    return plant.config(next(placements(plant.networks, gpus)), slots, gpus)


def overhead_ns(plant: Plant, slots: int, rollouts: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Nanoseconds of every event of a run with the no-op executor, on this thread."""
    lengths = [-(-frames // plant.workload.chunk) for frames in ends(rollouts, plant.workload.limit, _MEAN, 0)]
    return _core.measure_overhead(_config(plant, 1, slots), [(i, i // 8, plant.chunks) for i in range(rollouts)], lengths)


def python_round_trip_us(plant: Plant, rollouts: int) -> tuple[float, float]:
    """From batch to batch of one rollout at a time: thread to thread, into a Python callable that does nothing, and back; and the CPU's share."""
    stages = len(plant.workload.stages)

    def nothing(batch: _core.Batch) -> None:
        return None

    def judge(batch: _core.Batch) -> list[tuple[bool, float]]:
        return [(False, 0.0)] * len(batch.rollout)

    with _core.Runner(_config(plant, 1, 1), [nothing] * (stages - 1) + [judge]) as runner:
        began, cpu = time.perf_counter(), time.process_time()
        runner.submit([(i, i, 4) for i in range(rollouts)])
        while runner.next() is not None:
            pass
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        batches = sum(row["batches"] for row in runner.statistics()["stages"])
    return seconds / batches * 1e6, cpu / batches * 1e6


def scaling(plant: Plant, gpus: Sequence[int], slots: int, event_us: float) -> Iterator[dict[str, Any]]:
    """Per number of GPUs, once each slot has ended a rollout: the share of the devices' time in frames that count, of the scheduler's in events."""
    for count in gpus:
        began, cpu = time.perf_counter(), time.process_time()
        at_once = slots * count
        placement = next(placements(plant.networks, count))
        lengths = ends(5 * at_once // 2, plant.workload.limit, _MEAN, 0)
        made = plant.simulate(placement, slots, count, lengths, warm_up=at_once, event_time=event_us * 1e-6)
        yield {
            "gpus": count,
            "efficiency": sum(made["work_s"]) / count / made["window_s"],
            "scheduler_busy": made["statistics"]["events"] * event_us * 1e-6 / made["seconds"],
            "simulated_in_s": time.perf_counter() - began,
            "simulated_in_cpu_s": time.process_time() - cpu,
        }


def measure(args: SchedulerArgs) -> tuple[list[str], dict[str, Any]]:
    """Lines for people, and the row for programs. ValueError: a GPU that there is not, or counts below 1."""
    if args.gpu not in GPUS:
        raise ValueError(f"--gpu {args.gpu}: want {', '.join(GPUS)}")
    if min(args.slots, args.most_gpus, args.repeats) < 1:
        raise ValueError("--slots, --most-gpus, --repeats: want at least 1 of each")
    plant = plant_of(PlanArgs(gpu=args.gpu))
    runs = [overhead_ns(plant, args.slots, 4 * args.slots) for _ in range(args.repeats)]
    medians = [float(np.median(run)) / 1e3 for run in runs]
    every = np.concatenate(runs)
    trips = [python_round_trip_us(plant, 8) for _ in range(args.repeats)]
    trip = statistics.median(wall for wall, _ in trips)
    counts = [2**k for k in range(args.most_gpus.bit_length()) if 2**k <= args.most_gpus]
    rows = list(scaling(plant, counts, args.slots, trip))
    row = {
        "case": "scheduler",
        "slots": args.slots,
        "gpu": args.gpu,
        "overhead_us_median": statistics.median(medians),
        "overhead_us_p99": float(np.percentile(every, 99)) / 1e3,
        "events": len(every),
        "events_per_s": 1e9 / float(np.mean(every)),
        "python_round_trip_us": trip,
        "python_round_trip_cpu_us": statistics.median(cpu for _, cpu in trips),
        "scaling": rows,
        "scaling_s": sum(one["simulated_in_s"] for one in rows),
        "scaling_cpu_s": sum(one["simulated_in_cpu_s"] for one in rows),
    }
    return list(_lines(args, row)), row


def _lines(args: SchedulerArgs, row: dict[str, Any]) -> Iterator[str]:
    yield f"core, no-op executor, {args.slots} slots: an event takes {row['overhead_us_median']:.2f} us (median), " + (
        f"{row['overhead_us_p99']:.2f} us (p99); {row['events_per_s']:.3g} events/s"
    )
    trip = f"{row['python_round_trip_us']:.1f} us, of them on the CPU {row['python_round_trip_cpu_us']:.1f} us"
    yield f"Python callable on its own thread and back: {trip}"
    yield f"one scheduler, simulated: {args.slots} slots per {args.gpu}, paper preset, {row['python_round_trip_us']:.1f} us per event"
    yield f"{'GPUs':>6}{'efficiency':>12}{'scheduler busy':>16}{'simulated in':>14}{'of the CPU':>12}"
    for one in row["scaling"]:
        seconds = f"{one['simulated_in_s']:12.1f} s{one['simulated_in_cpu_s']:10.1f} s"
        yield f"{one['gpus']:6d}{one['efficiency']:12.1%}{one['scheduler_busy']:16.1%}{seconds}"

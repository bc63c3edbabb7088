"""How many frames and rollouts will so many GPUs make, how long will each stage take, and does it fit? The scheduler itself, on a virtual clock.

Ceiling: the bound that the busiest resource sets, were it always busy with full batches of frames that count. Baseline: lock step (all slots
stage by stage to the limit, whatever the verdicts), in the same run by the same code. Beside them one synchronous LOOP iteration, whose bound
is the longer of the work's share and the longest rollout alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from worldenv import _core
from worldenv.benchmarks.plan_costs import GPUS, Affine, Gpu, Workload, counts, on_gpu, read_profile, workload
from worldenv.benchmarks.plan_stages import disk_gb, environment_steps, gpu_memory_gb, host_memory_gb, stage_costs
from worldenv.config import RunConfig
from worldenv.presets import PAPER, PRESETS
from worldenv.reflector.frames import Sampler
from worldenv.rollout.collect import Schedule, config_of, stages_of
from worldenv.world import WorldStage

_SLOTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_SWEEP = 1024
_SAMPLE = 4096
"""Ends that means are taken of."""
_SHARE_ENOUGH = 0.995
_SPREAD = 4.0


@dataclass(frozen=True)
class PlanArgs:
    """Predict rollouts per hour, hours and memory for a number of GPUs: a table, then one line of JSON."""

    preset: str = "paper"
    """paper (published sizes), or any name together with --profile."""
    gpus: int = 8
    """In one process or many; each takes part in every placement that is tried."""
    gpu: str = "h20"
    """h20, a100, h100, h200, b200 or rtx4090."""
    mean_end: float = 0.55
    """Mean end of a rollout, as a share of the limit."""
    limit: int | None = None
    """Step limit of a rollout [frames], a multiple of the chunk. This and the next seven are the preset's where not given."""
    denoise_steps: int | None = None
    """DDIM steps per chunk."""
    sampler: Sampler | None = None
    """Frames that the reflector is shown: uniform (the paper's, read anew), or stable_dyadic (its past is kept)."""
    bucket: int | None = None
    """Rows of every batch of policy and simulator (`--loop.bucket`)."""
    judge_bucket: int | None = None
    """Chunks that the reflector judges at once (`--loop.judge-bucket`)."""
    iterations: int | None = None
    """Synchronous LOOP iterations of --contexts x --group rollouts and one update each."""
    contexts: int | None = None
    """Contexts per iteration."""
    group: int | None = None
    """Rollouts per context."""
    slots: int | None = None
    """Rollouts in flight per GPU with a policy; where not given, the steady state has the best of 1 to 64 that fit."""
    efficiency: float = 0.5
    """Share of the peak FLOP rate that the networks reach: an assumption; 1 is the ceiling."""
    profile: Path | None = None
    """Seconds per stage and batch size measured on one device, instead of FLOPs, bytes and the GPU's data sheet."""
    rollouts: int = 4096
    """Rollouts in the steady state that is reported."""
    seed: int = 0
    """Of the ends."""

    @property
    def settings(self) -> RunConfig:
        """The run that is planned: the preset, where flags do not say otherwise. ValueError: there is no such run."""
        base = PRESETS.get(self.preset, PAPER)
        names = ("bucket", "judge_bucket", "iterations", "contexts", "group")
        loop = replace(base.loop, **{name: getattr(self, name) for name in names if getattr(self, name) is not None})
        limit, steps, sampler = self.limit, self.denoise_steps, self.sampler
        return replace(
            base, loop=loop,
            env=base.env if limit is None else replace(base.env, steps=limit),
            simulator=base.simulator if steps is None else replace(base.simulator, denoise_steps=steps),
            reflector=base.reflector if sampler is None else replace(base.reflector, sampler=sampler),
        )  # fmt: skip


def refuse(args: PlanArgs) -> None:
    """ValueError: what cannot be planned."""
    if args.gpu not in GPUS:
        raise ValueError(f"--gpu {args.gpu}: want {', '.join(GPUS)}")
    if args.preset != "paper" and args.profile is None:
        raise ValueError(f"--preset {args.preset}: FLOPs are known of paper alone; measure a profile and give --profile FILE")
    if not 0.0 < args.mean_end < 1.0 or not 0.0 < args.efficiency <= 1.0:
        raise ValueError(f"--mean-end {args.mean_end}, --efficiency {args.efficiency}: want shares between 0 and 1")
    for name in ("gpus", "rollouts", "limit", "denoise_steps", "bucket", "judge_bucket", "iterations", "contexts", "slots"):
        if (given := getattr(args, name)) is not None and given < 1:
            raise ValueError(f"--{name.replace('_', '-')} {given}: want at least 1")
    chunk = PAPER.policy.chunk
    if args.limit is not None and args.limit % chunk and args.profile is None:
        raise ValueError(f"--limit {args.limit}: want a multiple of the chunk of {chunk} frames, as runs do")
    _ = args.settings


def ends(count: int, limit: int, mean: float, seed: int) -> list[int]:
    """Ends [frames] of rollouts: limit x Beta(4 mean, 4 (1 - mean)), rounded up; at mean 0.55 half of them lie between 0.38 and 0.73 of the limit."""
    share = np.random.Generator(np.random.Philox(seed)).beta(_SPREAD * mean, _SPREAD * (1 - mean), count)
    return [int(one) for one in np.clip(np.ceil(limit * share), 1, limit)]


@dataclass(frozen=True)
class Placement:
    """Which networks are where: groups of GPUs, each with its networks."""

    name: str
    groups: tuple[tuple[frozenset[str], tuple[int, ...]], ...]
    apart: str = "none"
    """The network that has GPUs of its own: `worldenv-train --loop.apart`."""
    apart_gpus: int = 0
    """How many: `--loop.apart-gpus`."""

    def devices(self, network: str) -> tuple[int, ...]:
        """GPUs that have `network`."""
        return next(devices for networks, devices in self.groups if network in networks)


def placements(networks: tuple[str, ...], gpus: int) -> Iterator[Placement]:
    """All networks on every GPU; then each way of giving one network some GPUs of its own, and the others the rest."""
    everything = tuple(range(gpus))
    yield Placement("all on each", ((frozenset(networks), everything),))
    for alone in networks[1:]:
        others = frozenset(networks) - {alone}
        for count in range(1, gpus):
            front, back = everything[: gpus - count], everything[gpus - count :]
            name = f"{alone} on {count}, {' and '.join(n for n in networks if n in others)} on {gpus - count}"
            yield Placement(name, ((others, front), (frozenset({alone}), back)), alone, count)


@dataclass(frozen=True)
class Plant:
    """Stages with their costs on one kind of device."""

    workload: Workload
    costs: tuple[Affine, ...]
    buckets: tuple[tuple[int, ...], ...]
    memory: float
    """Of one device [byte]."""
    schedule: Schedule = field(default_factory=Schedule)
    """As in runs, but for the slots."""

    @property
    def networks(self) -> tuple[str, ...]:
        """In the order of a chunk."""
        return tuple(dict.fromkeys(stage.network for stage in self.workload.stages))

    @property
    def chunks(self) -> int:
        """A rollout's limit."""
        return math.ceil(self.workload.limit / self.workload.chunk)

    def seconds_per_chunk(self, networks: frozenset[str] | None = None) -> float:
        """What a chunk takes one device in full batches of the largest shape, for some networks or all."""
        total = 0.0
        for stage, (fixed, per_item), buckets in zip(self.workload.stages, self.costs, self.buckets, strict=True):
            if networks is None or stage.network in networks:
                total += stage.steps * (fixed / buckets[-1] + per_item)
        return total

    def seconds_alone(self) -> float:
        """What a chunk takes a rollout that is alone, in batches of the smallest shape, most of which is then padding."""
        each = zip(self.workload.stages, self.costs, self.buckets, strict=True)
        return sum(stage.steps * (fixed + per_item * buckets[0]) for stage, (fixed, per_item), buckets in each)

    def bound(self, placement: Placement) -> float:
        """Chunks per second that the busiest group of devices allows."""
        return min(len(devices) / self.seconds_per_chunk(networks) for networks, devices in placement.groups)

    def largest(self, stage: int, slots: int, placement: Placement) -> int:
        """Items that can ever be ready for a stage on one device."""
        network = self.workload.stages[stage].network
        return math.ceil(slots * len(placement.devices(self.networks[0])) / len(placement.devices(network)))

    def peak_memory(self, placement: Placement, slots: int) -> float:
        """Of the fullest device [byte]: weights, what is remembered of the rollouts there, and the largest batch's activations."""
        return max(self.memories(placement, slots).values())

    def memories(self, placement: Placement, slots: int) -> dict[frozenset[str], float]:
        """As much of a device of each group, by its networks [byte]."""
        return {networks: self._memory(networks, placement, slots) for networks, _ in placement.groups}

    def _memory(self, networks: frozenset[str], placement: Placement, slots: int) -> float:
        work = self.workload
        needed = sum(work.weights[network] for network in networks)
        batches = []
        for s, stage in enumerate(work.stages):
            if stage.network in networks:
                ready = min(self.buckets[s][-1], self.largest(s, slots, placement))
                batches.append(stage.workspace * next(shape for shape in self.buckets[s] if shape >= ready))
        for network in networks:
            s = next(i for i, stage in enumerate(work.stages) if stage.network == network)
            needed += work.state[network] * self.largest(s, slots, placement)
        return needed + max(batches)

    def config(self, placement: Placement, slots: int, gpus: int, lock_step: bool = False) -> _core.SchedulerConfig:
        """The scheduler's."""
        each = zip(self.workload.stages, self.buckets, strict=True)
        stages = [_core.Stage(stage.name, buckets, stage.steps, placement.devices(stage.network)) for stage, buckets in each]
        return config_of(self.schedule, stages, gpus, slots, lock_step)

    def simulate(self, placement: Placement, slots: int, gpus: int, lengths: list[int], **more: Any) -> dict[str, Any]:
        """See `_core.simulate`."""
        config = self.config(placement, slots, gpus, more.pop("lock_step", False))
        cost = [[one] * len(placement.devices(stage.network)) for stage, one in zip(self.workload.stages, self.costs, strict=True)]
        return _core.simulate(config, cost, lengths, chunk=self.workload.chunk, limit=self.chunks, **more)


@dataclass(frozen=True)
class Steady:
    """A steady state."""

    placement: Placement
    slots: int
    frames_per_s: float
    """That count: up to the ends."""
    rollouts_per_h: float
    share_of_bound: float
    """Of the busiest group of devices."""
    rollouts: int
    """That ended while it was looked at."""
    waste: float
    """Share of the devices' time that went into dropped speculation."""


def steady(plant: Plant, placement: Placement, slots: int, args: PlanArgs, rollouts: int, lock_step: bool = False) -> Steady:
    """After every slot has ended a rollout twice over, until the last rollout starts; in lock step whole waves."""
    at_once = slots * len(placement.devices(plant.networks[0]))
    count = 3 * at_once + rollouts
    if lock_step:
        count = at_once * (math.ceil(rollouts / at_once) + 2)
    lengths = ends(count, plant.workload.limit, args.mean_end, args.seed)
    warm_up, group = at_once if lock_step else 2 * at_once, args.settings.loop.group
    made = plant.simulate(placement, slots, args.gpus, lengths, lock_step=lock_step, warm_up=warm_up, group=group)
    _, busiest = max(placement.groups, key=lambda group: plant.seconds_per_chunk(group[0]) / len(group[1]))
    share = sum(made["work_s"][d] for d in busiest) / len(busiest) / made["window_s"]
    chunks = share * plant.bound(placement)
    chunks_per_rollout = made["all_chunks"] / count
    frames = chunks * made["all_frames"] / made["all_chunks"]
    busy = sum(row["busy_s"] for row in made["statistics"]["stages"])
    wasted = sum(row["wasted_s"] for row in made["statistics"]["stages"])
    return Steady(placement, slots, frames, 3600 * chunks / chunks_per_rollout, share, made["rollouts"], wasted / busy)


@dataclass(frozen=True)
class Iteration:
    """One synchronous iteration: as many rollouts as LOOP asks for, then nothing until the last has ended."""

    slots: int
    seconds: float
    bound_s: float
    """The longer of all work shared out evenly, and the longest rollout alone."""


def iteration(plant: Plant, placement: Placement, slots: int, args: PlanArgs) -> Iteration:
    """One of LOOP's."""
    loop = args.settings.loop
    lengths = ends(loop.contexts * loop.group, plant.workload.limit, args.mean_end, args.seed + 1)
    made = plant.simulate(placement, slots, args.gpus, lengths, group=loop.group)
    longest = math.ceil(max(lengths) / plant.workload.chunk) * plant.seconds_alone()
    return Iteration(slots, made["seconds"], max(made["all_chunks"] / plant.bound(placement), longest))


def plant_of(args: PlanArgs, to_the_limit: bool = False) -> Plant:
    """From the profile, or from FLOPs, bytes and the GPU's data sheet, with the batches that runs make; rollouts end, or go on `to_the_limit`."""
    gpu, settings = GPUS[args.gpu], args.settings
    loop, limit = settings.loop, settings.env.steps
    schedule = Schedule(loop.slots, loop.bucket, loop.judge_bucket, loop.overlap)
    if args.profile is not None:
        profile = read_profile(args.profile)
        return Plant(profile.workload, profile.costs, profile.buckets, math.inf, schedule)
    work = workload(settings, [limit] if to_the_limit else ends(_SAMPLE, limit, args.mean_end, args.seed))
    passed = [WorldStage(stage.name, list, stage.steps) for stage in work.stages if stage.network == "simulator"]
    made = stages_of(schedule, passed, {"policy": [0], "simulator": [0], "reflector": [0]})
    costs = tuple(on_gpu(stage, gpu, args.efficiency) for stage in work.stages)
    return Plant(work, costs, tuple(tuple(stage.buckets) for stage in made), gpu.memory, schedule)


def best(plant: Plant, args: PlanArgs) -> Steady:
    """The placement and slots that make the most frames; of those that make as many to 0.5 %, the fewest slots. ValueError: nothing fits."""
    tried: list[Steady] = []
    for placement in sorted(placements(plant.networks, args.gpus), key=lambda one: -plant.bound(one)):
        if tried and plant.bound(placement) * _frames_per_chunk(args, plant) < max(one.frames_per_s for one in tried):
            break
        for slots in (args.slots,) if args.slots else _SLOTS:
            if plant.peak_memory(placement, slots) <= plant.memory:
                tried.append(steady(plant, placement, slots, args, min(_SWEEP, args.rollouts)))
    if not tried:
        need = min(plant.peak_memory(placement, args.slots or 1) for placement in placements(plant.networks, args.gpus))
        has = f"needs {need / 1e9:.1f} GB on one GPU, which has {plant.memory / 1e9:.0f}"
        raise ValueError(f"--gpus {args.gpus} --gpu {args.gpu}: {has}; take more GPUs, larger ones, or fewer --slots")
    most = max(one.frames_per_s for one in tried)
    return min((one for one in tried if one.frames_per_s >= _SHARE_ENOUGH * most), key=lambda one: (one.slots, one.placement.name))


def _frames_per_chunk(args: PlanArgs, plant: Plant) -> float:
    lengths = np.array(ends(_SAMPLE, plant.workload.limit, args.mean_end, args.seed))
    return float(lengths.sum() / np.ceil(lengths / plant.workload.chunk).sum())


def plan(args: PlanArgs) -> tuple[list[str], dict[str, Any]]:
    """Lines for people, and the row for programs. ValueError: what cannot be planned, or does not fit."""
    refuse(args)
    plant = plant_of(args)
    chosen = best(plant, args)
    placement, slots = chosen.placement, chosen.slots
    ours = steady(plant, placement, slots, args, args.rollouts)
    # The baseline has all networks on each GPU, where that fits: split, its stages in series would leave most of them idle
    everywhere = next(placements(plant.networks, args.gpus))
    fits = [n for n in _SLOTS if plant.peak_memory(everywhere, n) <= plant.memory]
    base = everywhere if fits else placement
    unending = plant_of(args, to_the_limit=True)
    locked = max(
        (steady(unending, base, n, args, args.rollouts, lock_step=True) for n in (fits[-3:] if fits else [slots])), key=lambda one: one.frames_per_s
    )
    settings, gpu = args.settings, GPUS[args.gpu]
    loop = settings.loop
    in_flight = args.slots or loop.slots
    once = iteration(plant, placement, in_flight if plant.peak_memory(placement, in_flight) <= plant.memory else slots, args)
    lengths = ends(loop.contexts * loop.group, plant.workload.limit, args.mean_end, args.seed + 1)
    queries = sum(math.ceil(one / plant.workload.chunk) for one in lengths)
    microbatches = math.ceil(queries / len(lengths) * loop.batch / loop.microbatch)  # of an optimiser step: they are what GPUs share
    learning = min(len(placement.devices(plant.networks[0])), microbatches)
    update = queries * plant.workload.update_flops / (learning * gpu.flops * args.efficiency)
    hours = loop.iterations * (once.seconds + update) / 3600
    row = {
        "case": "plan",
        "preset": args.preset,
        "gpu": None if args.profile else args.gpu,
        "gpus": args.gpus,
        "assumed_efficiency": None if args.profile else args.efficiency,
        "profile": str(args.profile) if args.profile else None,
        "sampler": None if args.profile else settings.reflector.sampler,
        "picture": None if args.profile else [settings.simulator.height, settings.simulator.width],
        "chunk": plant.workload.chunk,
        "denoise_steps": None if args.profile else settings.simulator.denoise_steps,
        "batches": {stage.name: list(shapes) for stage, shapes in zip(plant.workload.stages, plant.buckets, strict=True)},
        "ends": f"limit x Beta({_SPREAD * args.mean_end:.4g}, {_SPREAD * (1 - args.mean_end):.4g}), limit {plant.workload.limit} frames",
        "placement": placement.name,
        "apart": placement.apart,
        "apart_gpus": placement.apart_gpus,
        "slots": slots,
        "frames_per_s": ours.frames_per_s,
        "rollouts_per_h": ours.rollouts_per_h,
        "steady_rollouts": ours.rollouts,
        "share_of_bound": ours.share_of_bound,
        "bound_frames_per_s": ours.frames_per_s / ours.share_of_bound,
        "speculation_waste": ours.waste,
        "lockstep_frames_per_s": locked.frames_per_s,
        "lockstep_slots": locked.slots,
        "speedup_over_lockstep": ours.frames_per_s / locked.frames_per_s,
        "iteration_s": once.seconds,
        "iteration_bound_s": once.bound_s,
        "iteration_share_of_bound": once.bound_s / once.seconds,
        "iteration_slots": once.slots,
        "update_gpus": learning if plant.workload.update_flops else None,
        "update_s": update if plant.workload.update_flops else None,
        "contexts": loop.contexts,
        "group": loop.group,
        "iterations": loop.iterations,
        "hours": hours,
        "peak_memory_gb": plant.peak_memory(placement, slots) / 1e9 if plant.memory < math.inf else None,
    }
    lines = list(_lines(args, plant, row))
    if args.profile is None:
        row |= _whole_run(args, settings, hours, plant.memories(placement, once.slots))
        lines += _run_lines(row, gpu)
    return lines, row


def _whole_run(args: PlanArgs, settings: RunConfig, loop_hours: float, rollouts: dict[frozenset[str], float]) -> dict[str, Any]:
    """All stages of a run, of which LOOP takes `loop_hours`; disk and memory, `rollouts` of which GPUs have for theirs [byte]."""
    found, gpu = counts(settings), GPUS[args.gpu]
    stages = [
        {"stage": one.stage, "what": one.what, "gpus": args.gpus if one.shared else 1, "hours": one.hours(gpu, args.gpus, args.efficiency)}
        for one in stage_costs(settings, found)
    ]
    before = next(i for i, one in enumerate(stages) if one["stage"] == "eval")
    stages.insert(before, {"stage": "loop", "what": f"{settings.loop.iterations} iterations", "gpus": args.gpus, "hours": loop_hours})
    disk, host = disk_gb(settings, found), host_memory_gb(settings, found, args.gpus)
    return {
        "stages": stages,
        "environment_steps": environment_steps(settings),
        "disk_gb": disk,
        "host_memory_gb": host,
        "gpu_memory_gb": gpu_memory_gb(settings, found, args.gpus, rollouts),
    }


def _run_lines(row: dict[str, Any], gpu: Gpu) -> Iterator[str]:
    yield f"{'stage':8}{'GPUs':>5}{'hours':>9}"
    for one in row["stages"]:
        yield f"{one['stage']:8}{one['gpus']:5d}{one['hours']:9.2f}  {one['what']}"
    made = ", ".join(f"{count} in {stage}" for stage, count in row["environment_steps"].items())
    yield f"control steps of the true environment, whose time is the host's: {made}"
    disk = ", ".join(f"{name} {size:.0f}" for name, size in row["disk_gb"].items())
    yield f"disk: {sum(row['disk_gb'].values()):.0f} GB: {disk}"
    needed = {stage: sum(parts.values()) for stage, parts in row["gpu_memory_gb"].items()}
    for stage, parts in row["gpu_memory_gb"].items():
        yield f"memory of a GPU, stage {stage}: {needed[stage]:.1f} GB: {', '.join(f'{what} {size:.1f}' for what, size in parts.items())}"
    most = max(needed, key=needed.__getitem__)
    cure = "--engines.back-end eager, or --loop.apart" if most == "loop" else f"--{most}.microbatch"
    fits = "" if needed[most] <= gpu.memory / 1e9 else f", more than there is: {cure}"
    yield f"memory of a GPU, most: stage {most}, {needed[most]:.1f} of {gpu.memory / 1e9:.0f} GB{fits}"
    host = ", ".join(f"{stage} {size:.0f}" for stage, size in row["host_memory_gb"].items())
    yield f"memory of the host [GB], by stage, {row['gpus']} processes in sft and world: {host}"


def _lines(args: PlanArgs, plant: Plant, row: dict[str, Any]) -> Iterator[str]:
    sheet = f"{args.gpu} ({GPUS[args.gpu].source}), at {args.efficiency:.0%} of that rate"
    yield f"{args.preset}: {args.gpus} x {f'what {args.profile} was measured on' if args.profile else sheet}"
    if row["picture"]:
        shapes = ", ".join(f"{name} {'/'.join(map(str, sizes))}" for name, sizes in row["batches"].items())
        height, width = row["picture"]
        yield f"{height} x {width}, {row['denoise_steps']} steps, sampler {row['sampler']}; batches of {shapes}"
    yield f"ends: {row['ends']}; {plant.seconds_per_chunk():.4g} device seconds per chunk of {plant.workload.chunk} frames"
    flags = f" (--loop.apart {row['apart']} --loop.apart-gpus {row['apart_gpus']})" if row["apart_gpus"] else ""
    yield f"placement: {row['placement']}{flags}; {row['slots']} slots per GPU" + (
        f"; {row['peak_memory_gb']:.1f} of {plant.memory / 1e9:.0f} GB" if row["peak_memory_gb"] else ""
    )
    yield f"{'':24}{'frames/s':>10}{'rollouts/h':>12}{'of bound':>10}"
    yield f"{'scheduler, steady':24}{row['frames_per_s']:10.2f}{row['rollouts_per_h']:12.1f}{row['share_of_bound']:10.1%}"
    rollouts_locked = row["rollouts_per_h"] / row["speedup_over_lockstep"]
    yield f"{'lock step, steady':24}{row['lockstep_frames_per_s']:10.2f}{rollouts_locked:12.1f}{'':10}  {row['speedup_over_lockstep']:.2f}x slower"
    count = row["contexts"] * row["group"]
    yield (
        f"{'one iteration':24}{'':10}{3600 * count / row['iteration_s']:12.1f}{row['iteration_share_of_bound']:10.1%}"
        f"  {count} rollouts in {row['iteration_s']:.0f} s, bound {row['iteration_bound_s']:.0f} s, {row['iteration_slots']} slots"
    )
    updates = "rollouts alone" if row["update_s"] is None else f"an update takes {row['update_s']:.0f} s more, on {row['update_gpus']}"
    yield f"{row['iterations']} iterations: {row['hours']:.1f} h ({updates})"

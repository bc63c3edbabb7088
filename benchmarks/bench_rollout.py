"""How many rollouts a second does the scheduler make, against a plain loop and against lock step, and does the planner foresee it?

On a CPU, or on GPUs, of which the loop and lock step take the first. There rollouts end at the same steps; equal bits are the CPU's promise.

Baselines in the same run, with the same networks, threads and noise: one rollout after the other in batches of 1; all slots in lock step to the
limit. Ceiling: the stages in full batches, nothing padded or dropped; what that leaves is said as `padding` and `speculation_waste`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from worldenv import _core, compiled, config, kinematics, noise, presets, run
from worldenv.benchmarks.bench_plan import ends
from worldenv.benchmarks.networks import randomised
from worldenv.benchmarks.plan_costs import fitted
from worldenv.devices import device_of, gpus_of
from worldenv.engines.onnxruntime import OnnxRuntime
from worldenv.engines.store import DEFAULT_STORE, Store
from worldenv.envs.tabletop import Tabletop
from worldenv.nouns import Context, Rollout
from worldenv.policy.openvla_oft import OpenVLAOFT
from worldenv.policy.processing import PromptTokenizer, Statistics
from worldenv.reflector import weights as reflectors
from worldenv.reflector.judge import Watching
from worldenv.rollout.collect import (
    ALL_PARTS,
    Assignment,
    Flight,
    Flights,
    Query,
    Replica,
    Schedule,
    config_of,
    draw_uniform,
    placement,
    stages_of,
)  # fmt: skip
from worldenv.rollout.store import differing
from worldenv.simulator.evac import Evac
from worldenv.stages.desk import Desk
from worldenv.world import ImaginedWorld, Made, advance, ended_at, observe, started

THRESHOLD = 0.5
_CPU = torch.device("cpu")
_SCORES_AGREE = 1e-4
_ON_GPU_AGREE = 1e-2
"""There convolutions and products take other algorithms, which round otherwise, by the shape of a batch."""
BackEnd = Literal["eager", "onnxruntime", "inductor", "auto"]


@dataclass(frozen=True)
class RolloutArgs:
    """Measure rollouts per second of the tiny preset: a table, then one line of JSON. Exit code 1 where rollouts are not identical (on a GPU: end
    elsewhere, or differ in scores)."""

    rollouts: int = 48
    """To make, in groups."""
    group: int = 8
    """Rollouts of one context."""
    slots: int = 16
    """Rollouts in flight at once, for the scheduler and in lock step."""
    bucket: int = 4
    """Rows of every batch of policy and simulator under the scheduler."""
    overlap: Literal["off", "auto", "always"] = "auto"
    """Whether policy and simulator go on while the reflector judges."""
    threads: int = 1
    """Threads of the loop, of lock step, and workers of the scheduler."""
    device: str = "cpu"
    """cpu, cuda, or one GPU (cuda:1)."""
    gpus: int = 1
    """With --device cuda: how many GPUs the scheduler has, each with `slots`, and with all networks but for --apart."""
    streams: int = 1
    """Batches at once on one GPU, of different stages."""
    apart: config.Apart = "none"
    """This network is asked on the last --apart-gpus alone, the others on the rest."""
    apart_gpus: int = 0
    """GPUs of the network of --apart."""
    back_end: BackEnd = "eager"
    """What runs the networks, for the scheduler, the loop and lock step alike."""
    store: Path = DEFAULT_STORE
    """Folder of the plans of engines."""
    limit: int = 32
    """Step limit of a rollout [frames]."""
    mean_end: float = 0.55
    """Mean end of a rollout, as a share of the limit (drawn as in worldenv-bench plan); not with --run."""
    run: Path | None = None
    """Take the networks of this run (stages scale, world, reward), whose reflector ends the rollouts; random weights without."""
    checked: int = 8
    """Rollouts that are made again with one slot and compared bit for bit."""
    seed: int = 0
    """Of all noise and of the ends."""


class DrawnEnds(ImaginedWorld):
    """An imagined world whose rollouts end at steps that were drawn, whatever random weights say; its networks are asked all the same."""

    def __init__(self, ends: Mapping[int, int], *imagined: Any) -> None:
        """`ends`: last step of each rollout, from 1 on, by its number; beyond the limit, it is not stopped."""
        super().__init__(*imagined)
        self._ends = ends

    def judge(self, watches: Sequence[Any], made: Sequence[Made]) -> tuple[torch.Tensor, list[Any]]:
        """See `World.judge`: scores up to THRESHOLD, which still tell the network's apart; above it at the end."""
        score, after = super().judge(watches, made)
        shown = THRESHOLD * score
        for i, one in enumerate(made):
            at = self._ends[one.after.number] - 1 - (one.after.chunk - 1) * score.shape[1]
            if 0 <= at < score.shape[1]:
                shown[i, at] = (1 + THRESHOLD) / 2 + shown[i, at] / 4
        return shown, after


def inside(world: Any) -> tuple[Evac, Any]:
    """Simulator and judge of an imagined world."""
    return world._simulator, world._reflector


@dataclass(frozen=True)
class Bench:
    """What is rolled out, and until when."""

    args: RolloutArgs
    replicas: list[Replica]
    """By device."""
    threshold: float
    jobs: list[Assignment]

    @property
    def replica(self) -> Replica:
        """The first."""
        return self.replicas[0]

    @property
    def chunk(self) -> int:
        """Frames per chunk."""
        return self.replica.policy.chunk

    @property
    def chunks(self) -> int:
        """A rollout's limit."""
        return self.args.limit // self.chunk

    @property
    def watching(self) -> Watching:
        """What the judge is asked."""
        return Watching(sorted({job.context.instruction for job in self.jobs}), self.args.limit, self.chunk)

    def schedule(self, bucket: int | None = None, slots: int | None = None) -> Schedule:
        """The one that is measured, or one with another bucket or slots."""
        return Schedule(slots or self.args.slots, bucket or self.args.bucket, overlap=self.args.overlap, streams=self.args.streams)


def _random(args: RolloutArgs, tiny: config.RunConfig, env: Tabletop, device: torch.device) -> tuple[Replica, float, list[Context]]:
    draw = np.random.default_rng(args.seed)
    proprio, command = draw.normal(size=(64, tiny.policy.proprio)).astype(np.float32), draw.uniform(-1, 1, (64, 7)).astype(np.float32)
    statistics = Statistics.of([command], [proprio], "random numbers")
    policy = OpenVLAOFT.create(tiny.policy, PromptTokenizer.build(env.tasks), statistics, noise.torch_seed(args.seed, noise.Stream.WEIGHTS), _CPU)
    simulator, judge = Evac.initialised(tiny.simulator, args.seed), reflectors.initialise(tiny.reflector, env.tasks, args.seed)
    judge.head = reflectors.fresh_head(tiny.reflector, args.seed)
    for network in (policy.network, simulator):
        randomised(network)
        network.eval().requires_grad_(False).to(device)
    judge.freeze().to(device)
    lengths = dict(enumerate(ends(args.rollouts, args.limit, args.mean_end, args.seed)))
    controller, latent = kinematics.ControllerModel.of(env.robot), tiny.simulator.latent
    world = DrawnEnds(lengths, simulator, judge, env.robot, controller, env.camera, latent, args.seed, device)
    contexts = []
    for n in range(-(-args.rollouts // args.group)):
        frame = draw.integers(0, 256, (tiny.simulator.height, tiny.simulator.width, 3), dtype=np.uint8)
        pose = np.array([*draw.uniform(-0.1, 0.1, 2), 0.1, 1.0, 0.0, 0.0, 0.0])
        contexts.append(Context(env.tasks[n % len(env.tasks)], n % len(env.tasks), n, frame, pose, 1.0))
    return Replica(policy, world, device), THRESHOLD, contexts


def _of_run(args: RolloutArgs, folder: Path, device: torch.device) -> tuple[Replica, float, list[Context]]:
    desk = Desk(run.Run(folder, run.settings_of(folder), leads=False))
    reflector, policy, tasks = desk.reflector(device), desk.policy("scale"), len(desk.env.tasks)
    policy.network.to(device)
    policy.scale_factor = desk.settings.loop.scale_factor
    contexts = [desk.context(n % tasks, n // tasks) for n in range(-(-args.rollouts // args.group))]
    return Replica(policy, desk.world(reflector, desk.simulator(device), device), device), reflector.config.threshold, contexts


def prepared(args: RolloutArgs) -> Bench:
    """Networks and jobs. ValueError: what cannot be measured."""
    counts = (args.rollouts, args.group, args.slots, args.bucket, args.threads, args.checked, args.gpus, args.streams)
    if min(counts) < 1 or not 0.0 < args.mean_end < 1.0:
        names = "--rollouts, --group, --slots, --bucket, --threads, --checked, --gpus, --streams"
        raise ValueError(f"{names}: want at least 1 of each; --mean-end between 0 and 1")
    if args.streams > 1 and device_of(args.device).type != "cuda":
        raise ValueError(f"--streams {args.streams} on {args.device}: a CPU's workers have one; take more --threads")
    tiny = presets.PRESETS["tiny"]
    devices = gpus_of(device_of(args.device), args.gpus)
    if args.limit < 1 or args.limit % tiny.policy.chunk:
        raise ValueError(f"--limit {args.limit}: want a multiple of the chunk of {tiny.policy.chunk} frames")
    made = [_of_run(args, args.run, device) if args.run else _random(args, tiny, Tabletop(tiny.env), device) for device in devices]
    _, threshold, contexts = made[0]
    jobs = [Assignment(n, n // args.group, contexts[n // args.group]) for n in range(args.rollouts)]
    parts = placement(len(made), args.apart, args.apart_gpus)
    return Bench(args, [dataclasses.replace(replica, parts=some) for (replica, _, _), some in zip(made, parts, strict=True)], threshold, jobs)


@dataclass(frozen=True)
class Outcome:
    """What one way of rolling out made, and what it took."""

    rollouts: dict[int, Rollout]
    seconds: float
    cpu_seconds: float
    dead_frames: int
    """Frames of whole chunks after an end."""
    statistics: dict[str, Any] | None = None


def engines(bench: Bench, back_end: BackEnd, store: Store) -> tuple[list[compiled.Choice], list[compiled.Choice]]:
    """What `back_end` makes of each network of `bench`, compared on the first of its rollouts; and the same networks by eager. Of all its GPUs."""
    simulator, networks = _networks(bench, bench.replica)
    others = [_networks(bench, replica)[1] for replica in bench.replicas[1:]]
    eager = [compiled.Choice.eager(one) for one in (*networks, *(one for some in others for one in some))]
    if back_end == "eager":
        return eager, eager
    with compiled.recording(networks) as recorders:
        whole = dataclasses.replace(bench.replica, parts=ALL_PARTS)
        scheduled(dataclasses.replace(bench, replicas=[whole]), bench.schedule(), bench.jobs[:4])
    settings = config.EnginesConfig(back_end=back_end)
    recorded = {name: one.recorded for name, one in recorders.items()}
    frame = torch.from_numpy(bench.jobs[0].context.frame).to(bench.replica.device)
    choices = compiled.chosen(networks, settings, store, recorded, (simulator, frame))
    first = compiled.Fitted(choices, recorded)
    copies = [compiled.alike(first, some, store, replica.device) for some, replica in zip(others, bench.replicas[1:], strict=True)]
    return [*choices, *(one for copy in copies for one in copy.choices)], eager


def _on_threads(choices: Sequence[compiled.Choice], threads: int) -> list[compiled.Choice]:
    """As the loop and lock step call them: one call at a time, so that only an operator can use more than one thread."""
    return [
        dataclasses.replace(one, engine=one.engine.on_threads(threads)) if isinstance(one.engine, OnnxRuntime) and threads > 1 else one
        for one in choices
    ]


def _networks(bench: Bench, replica: Replica) -> tuple[Evac, list[compiled.Network]]:
    assert isinstance(replica.policy, OpenVLAOFT)
    simulator, judge = inside(replica.world)
    precision, slots = compiled.precision_of(config.EnginesConfig(), replica.device), bench.args.slots  # lock step has all slots in one batch
    return simulator, compiled.of_rollout(replica.policy, simulator, judge, bench.watching, precision, slots)


def scheduled(bench: Bench, schedule: Schedule, jobs: Sequence[Assignment]) -> Outcome:
    """On the scheduler."""
    began, cpu = time.perf_counter(), time.process_time()
    first = bench.replica
    replicas = bench.replicas if len(bench.replicas) > 1 else [first] * schedule.workers(first.device, first.world)
    with Flights(replicas, seed=bench.args.seed, steps=bench.args.limit, threshold=bench.threshold, schedule=schedule) as flights:
        made = {flight.job.number: flight.rollout() for flight in flights.fly(jobs)}
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        statistics = flights.statistics()
    dropped = sum(row["wasted"] for row in statistics["stages"] if row["stage"] == "decode")
    return Outcome(made, seconds, cpu, dropped * bench.chunk, statistics)


@torch.no_grad()
def in_step(bench: Bench, jobs: Sequence[Assignment], count: int, to_the_limit: bool) -> Outcome:
    """`count` rollouts at a time, all at one chunk, unpadded: 1, each to its end, is the plain loop; all slots to the limit are lock step."""
    policy, world, seed = bench.replica.policy, bench.replica.world, bench.args.seed
    made: dict[int, Rollout] = {}
    began, cpu, dead = time.perf_counter(), time.process_time(), 0
    for start in range(0, len(jobs), count):
        some = [Flight(job) for job in jobs[start : start + count]]
        scenes = started(world, [one.job.context for one in some], [one.job.number for one in some])
        watches = world.watch(scenes)
        for _ in range(bench.chunks):
            answer = policy.act(observe(scenes), draw_uniform(policy, scenes, seed))
            steps = advance(world, scenes, answer.command)
            score, watches = world.judge(watches, steps)
            for i, (one, end) in enumerate(zip(some, ended_at(score, bench.threshold).tolist(), strict=True)):
                if one.stopped:
                    dead += bench.chunk
                    continue
                scene = scenes[i]
                one.queries.append(Query(scene.frame, scene.proprio, answer.action[i], answer.log_prob[i], answer.command[i], None, score[i], end))
                one.stopped = end < bench.chunk
            scenes = [step.after for step in steps]
            if not to_the_limit and all(one.stopped for one in some):
                break
        made |= {one.job.number: one.rollout() for one in some}
    return Outcome(made, time.perf_counter() - began, time.process_time() - cpu, dead)


def score_error(made: Mapping[int, Rollout], want: Mapping[int, Rollout]) -> float | None:
    """Largest difference of a score; None where a rollout ends elsewhere."""
    if any(not torch.equal(one.live, want[number].live) for number, one in made.items()):
        return None
    return max(float((one.score - want[number].score).abs().max()) for number, one in made.items())


def profile(bench: Bench, sizes: Sequence[int]) -> list[dict[int, float]]:
    """CPU seconds of a batch by stage and batch size, from short runs of the scheduler in which every batch is full."""
    found: list[dict[int, float]] = []
    for size in sizes:
        jobs = bench.jobs[: max(2 * bench.args.group, 2 * size)]
        made = scheduled(bench, bench.schedule(size, max(bench.args.slots, size)), jobs)
        assert made.statistics is not None
        rows = made.statistics["stages"]
        share = made.cpu_seconds / made.seconds  # of the time, that this process had the core
        for i, row in enumerate(rows):
            if i == len(found):
                found.append({})
            width = 1 if row["stage"] == "reflector" else size
            found[i][width] = share * row["busy_s"] / row["batches"]
    return found


def predicted(bench: Bench, seconds: Sequence[dict[int, float]], rollouts: Mapping[int, Rollout]) -> float:
    """Seconds of the measured run on the virtual clock, from a profile and the rollouts' lengths."""
    schedule, costs = bench.schedule(), [[fitted(by_size)] for by_size in seconds]
    stages = stages_of(schedule, bench.replica.world.stages, {"policy": [0], "simulator": [0], "reflector": [0]})
    lengths = [rollouts[job.number].steps for job in bench.jobs]
    made = _core.simulate(
        config_of(schedule, stages, 1, schedule.slots), costs, lengths, chunk=bench.chunk, limit=bench.chunks, group=bench.args.group
    )  # fmt: skip
    return float(made["seconds"])


def measure(args: RolloutArgs) -> tuple[list[str], dict[str, Any]]:
    """Lines for people, and the row for programs. ValueError: what cannot be measured."""
    bench, threads = prepared(args), torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        choices, _ = engines(bench, args.back_end, Store(args.store))
        workers = max(len(bench.replicas), bench.schedule().workers(bench.replica.device, bench.replica.world))
        with compiled.placed(choices):
            scheduled(bench, bench.schedule(), bench.jobs[: args.group])  # warms up
            half = [size for size in (2**k for k in range(args.bucket.bit_length())) if 2 * size <= args.bucket] or [1]
            seconds = profile(bench, half) if args.threads == 1 and bench.replica.device.type == "cpu" else []
            made = scheduled(bench, bench.schedule(), bench.jobs)
            again = scheduled(bench, bench.schedule(slots=1), bench.jobs[: args.checked])
        with compiled.placed(_on_threads(choices, args.threads)):
            for count in (1, args.slots):  # warms up
                in_step(bench, bench.jobs[:count], count, to_the_limit=True)
            loop = in_step(bench, bench.jobs, 1, to_the_limit=False)
            locked = in_step(bench, bench.jobs, args.slots, to_the_limit=True)
    finally:
        torch.set_num_threads(threads)
    assert made.statistics is not None
    ways = {"scheduler": made, "sequential": loop, "lockstep": locked}
    stages = made.statistics["stages"]
    busy = sum(row["busy_s"] for row in stages)
    chunks = sum(len(rollout.live) for rollout in made.rollouts.values())
    foreseen = predicted(bench, seconds, made.rollouts) if seconds else None
    error, off = (score_error(other.rollouts, made.rollouts) for other in (loop, again))
    on_gpu, precision = bench.replica.device.type == "cuda", compiled.precision_of(config.EnginesConfig(), bench.replica.device)
    agree = _ON_GPU_AGREE if on_gpu else _SCORES_AGREE
    identical = not any(differing(one, made.rollouts[number]) for number, one in again.rollouts.items())
    row = {
        "case": "rollout",
        "weights": str(args.run) if args.run else "random",
        "rollouts": args.rollouts,
        "chunks": chunks,
        "rollouts_per_s": {name: args.rollouts / way.seconds for name, way in ways.items()},
        "cpu_s": {name: way.cpu_seconds for name, way in ways.items()},
        "speedup_over_sequential": loop.seconds / made.seconds,
        "speedup_over_lockstep": locked.seconds / made.seconds,
        "cpu_speedup_over_sequential": loop.cpu_seconds / made.cpu_seconds,
        "identical": identical,
        "same_rollouts": identical or (on_gpu and off is not None and off <= agree),
        "identical_rollouts": len(again.rollouts),
        "sequential_agrees": error is not None and error <= agree,
        "sequential_score_error": error,
        "dead_frames": {name: way.dead_frames for name, way in ways.items()},
        "speculation_waste": sum(one["wasted_s"] for one in stages) / busy,
        "padding": sum(one["padding"] * one["busy_s"] / max(1, one["items"] + one["padding"]) for one in stages) / busy,
        "stage_share": {
            name: sum(one["busy_s"] for one in stages if one["stage"] == name) / busy for name in dict.fromkeys(one["stage"] for one in stages)
        },
        "profile_s": [{str(size): one for size, one in by_size.items()} for by_size in seconds],
        "predicted_s": foreseen,
        "prediction_error": None if foreseen is None else foreseen / made.cpu_seconds - 1,
        "back_end": f"{args.back_end} {'fp32' if args.back_end == 'eager' else precision}",
        "device": str(bench.replica.device),
        "gpus": args.gpus,
        "streams": args.streams,
        "apart": args.apart,
        "apart_gpus": args.apart_gpus,
        "engines": {one.network.name: one.plain for one in choices},
        "threads": args.threads,
        "workers": workers,
        "slots": args.slots,
        "bucket": args.bucket,
        "overlap": args.overlap,
    }
    return list(_lines(row)), row


def _lines(row: dict[str, Any]) -> Iterator[str]:
    yield f"{row['rollouts']} rollouts of {row['chunks']} chunks, {row['weights']} weights, {row['back_end']}, {row['threads']} thread(s)"
    yield f"{'':12}{'rollouts/s':>12}{'CPU s':>10}{'dead frames':>14}"
    for name, rate in row["rollouts_per_s"].items():
        yield f"{name:12}{rate:12.3f}{row['cpu_s'][name]:10.1f}{row['dead_frames'][name]:14d}"
    spent = ", ".join(f"{name} {share:.0%}" for name, share in row["stage_share"].items())
    yield f"scheduler: {spent}; padding {row['padding']:.1%}, dropped speculation {row['speculation_waste']:.1%}"
    faster = f"{row['speedup_over_sequential']:.2f}x sequential ({row['cpu_speedup_over_sequential']:.2f}x by CPU seconds)"
    yield f"{faster}, {row['speedup_over_lockstep']:.2f}x lock step"
    same = "identical" if row["identical"] else "same ends, other bits" if row["same_rollouts"] else "DIFFERENT"
    yield f"one slot, same bucket: {same} ({row['identical_rollouts']} rollouts)"
    if row["predicted_s"] is not None:
        yield f"virtual clock: {row['predicted_s']:.1f} CPU s foreseen, {row['cpu_s']['scheduler']:.1f} measured ({row['prediction_error']:+.1%})"

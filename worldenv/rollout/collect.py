"""Rollouts of a policy in a world, on the scheduler: continuous batches, no chunk after an end but what is begun while a verdict is awaited.

The scheduler (`csrc/core`) says which rollouts make which step together; here are the Python callables that it calls, one per stage, and what
is remembered of each rollout between them. Every random number is a function of (seed, rollout number, chunk, stream, element), every value one
of the rollout alone, and nothing is changed in place: so a rollout does not depend on its slot, and speculative work is dropped by forgetting it.

Bits are equal too where a row's result does not depend on the other rows of its batch or on its place there. Batches have one shape whatever
they hold (`Schedule.bucket`, padded with repetitions), and workers compute on one CPU thread each; that torch's kernels then keep rows apart is
measured by tests/test_rollout_bits.py. docs/scheduler.md says what it costs.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import torch

from worldenv import _core, noise
from worldenv.config import Apart
from worldenv.nouns import Context, Failed, Rollout
from worldenv.policy.contract import Policy
from worldenv.world import Made, Scene, World, WorldStage, ended_at, observe

T = TypeVar("T")
Part = Literal["policy", "simulator", "reflector"]
"""Of a rollout: a network, or what stands in its place."""
ALL_PARTS: frozenset[Part] = frozenset(get_args(Part))
_CPU = torch.device("cpu")
_NO_HURRY_S = 3600.0
"""Work that waits longer goes before fuller batches. It cannot wait for ever: who waits holds a slot, and slots run out."""


class RolloutError(Failed):
    """Rollouts that could not be made, whatever was tried. The message names their keys."""


@dataclass(frozen=True)
class Assignment:
    """A rollout that is to be made."""

    number: int
    """Its own number, unique in the run: the second half of its noise key."""
    group: int
    """Rollouts of one group share a context."""
    context: Context


def placement(devices: int, apart: Apart, alone: int) -> list[frozenset[Part]]:
    """Parts by device: all on each, or `apart` on the last `alone` of them and the others on the rest. ValueError: none is left for the others."""
    if apart == "none":
        return [ALL_PARTS] * devices
    if not 0 < alone < devices:
        raise ValueError(f"{apart} on {alone} of {devices} devices of its own: want 1 at least, and 1 less than there are at most; or apart=none")
    return [ALL_PARTS - {apart}] * (devices - alone) + [frozenset[Part]({apart})] * alone


@dataclass(frozen=True)
class Replica:
    """The networks of one device; a CPU may have several workers with the same ones. Not every one must have all of them."""

    policy: Policy
    world: World
    device: torch.device = _CPU
    """Where they compute; a GPU with its number."""
    parts: frozenset[Part] = ALL_PARTS
    """What is done here: `policy` acts, `world` makes chunks (simulator), `world` judges them (reflector). What is not is never asked for."""


@dataclass(frozen=True)
class Schedule:
    """How rollouts are scheduled. Which rollouts come out does not depend on it, on a CPU bit for bit while the buckets are the same."""

    slots: int = 16
    """Rollouts in flight at once on each device with a policy, over all its workers."""
    bucket: int = 4
    """Rows of every batch of policy and simulator; fewer are padded."""
    judge_bucket: int = 1
    """Chunks judged at once. Above 1, rows of different length are packed together, and scores may differ in their last bits."""
    overlap: Literal["off", "auto", "always"] = "auto"
    """Policy and simulator go on to the next chunk while the reflector judges: never, where it pays, wherever nothing certain waits."""
    attempts: int = 3
    """Runs of a step that fails alone, before its rollout is given up."""
    streams: int = 1
    """Batches at once on one worker, of different stages, on a GPU each on a CUDA stream of its own; nothing is gained where one takes the whole."""

    def __post_init__(self) -> None:
        if min(self.slots, self.bucket, self.judge_bucket, self.attempts, self.streams) < 1:
            raise ValueError(f"{self}: want at least 1 of slots, bucket, judge_bucket, attempts and streams")

    def workers(self, device: torch.device, world: World) -> int:
        """Workers on `device`: on a CPU as many as torch may use threads and as have a full batch each; one on a GPU, or in a world with a home."""
        if device.type != "cpu" or world.at_home:
            return 1
        return max(1, min(torch.get_num_threads(), self.slots // self.bucket))

    def each(self, replicas: Sequence[Replica]) -> int:
        """Slots of each of `replicas` that has a policy: workers of one device share its own."""
        acting = [replica.device for replica in replicas if "policy" in replica.parts]
        return -(-self.slots * len(set(acting)) // len(acting))


def stages_of(schedule: Schedule, world: Sequence[WorldStage], where: Mapping[Part, Sequence[int]]) -> list[_core.Stage]:
    """What a chunk passes, in order, in batches of which shapes, and on which devices: of every run, and of what the planner foresees."""
    making = [_core.Stage(one.name, [schedule.bucket if one.batched else 1], one.steps, where["simulator"]) for one in world]
    return [
        _core.Stage("policy", [schedule.bucket], 1, where["policy"]), *making,
        _core.Stage("reflector", [schedule.judge_bucket], 1, where["reflector"]),
    ]  # fmt: skip


def config_of(schedule: Schedule, stages: Sequence[_core.Stage], devices: int, slots: int, lock_step: bool = False) -> _core.SchedulerConfig:
    """The scheduler's, with `slots` for each device that has a policy; `lock_step` is the planner's baseline."""
    return _core.SchedulerConfig(
        stages, devices=devices, slots=slots, overlap=schedule.overlap, max_wait=_NO_HURRY_S, attempts=schedule.attempts, streams=schedule.streams,
        lock_step=lock_step,
    )  # fmt: skip


@dataclass
class Query:
    """One query of a rollout: what the policy saw and did, and what came of it."""

    frame: torch.Tensor
    """(H, W, 3) uint8, before."""
    proprio: torch.Tensor
    """(P,) before."""
    action: torch.Tensor
    """(K, 7), normalised."""
    log_prob: torch.Tensor
    """(K,)."""
    command: torch.Tensor
    """(K, 7)."""
    made: Made | None = None
    """Until it is judged, or for good where frames are kept."""
    score: torch.Tensor | None = None
    """(K,)."""
    end: int = -1
    """Index of the step that ended the rollout; K where none of these did."""


@dataclass
class Flight:
    """One rollout while it is made. The front (policy and world) writes `scene`, `work` and a query's start, the judge `watch` and a query's end."""

    job: Assignment
    first: Scene | None = None
    """Where it began; None before that."""
    scene: Scene | None = None
    """Where the front is."""
    work: Any = None
    """What the last stage left."""
    watch: Any = None
    """Of the judge, after the chunks that it has judged."""
    queries: list[Query] = field(default_factory=list)
    stopped: bool = False

    def rollout(self) -> Rollout:
        """The finished rollout, on the CPU."""
        chunk = len(self.queries[0].action)
        live = torch.stack([torch.arange(chunk) <= query.end for query in self.queries])

        def rows(name: str) -> torch.Tensor:
            return torch.stack([getattr(query, name) for query in self.queries]).cpu()

        job, score = self.job, torch.where(live, rows("score"), 0.0)
        return Rollout(
            job.number, job.group, job.context, rows("frame"), rows("proprio"), rows("action"), rows("log_prob"), score, live, self.stopped
        )

    def frames(self) -> torch.Tensor:
        """(T, H, W, 3) uint8 on the CPU: after each step of its chunks, those after the end included; only where frames were kept."""
        return torch.cat([query.made.frames for query in self.queries if query.made is not None]).cpu()


def draw_uniform(policy: Policy, scenes: Sequence[Scene], seed: int) -> torch.Tensor:
    """(B, K, 7) float64 in (0, 1): the numbers that draw the next actions of B scenes."""
    numbers, chunks = np.array([s.number for s in scenes]), np.array([s.chunk for s in scenes])
    return torch.from_numpy(noise.uniform(seed, numbers, chunks, 0, noise.Stream.POLICY, (policy.chunk, 7)))


def _padded(rows: list[T], shape: int) -> list[T]:
    return [*rows, *[rows[-1]] * (shape - len(rows))]


class _Home:
    """The thread that collects: it takes reports, and does what must be done on it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inbox: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | _core.Ending | _core.GroupEnding | None] = queue.SimpleQueue()
        self._open = True

    def call(self, work: Callable[[], T]) -> T:
        """`work()`, done there; for other threads."""
        answer: Future[T] = Future()
        with self._lock:
            if not self._open:
                raise RuntimeError("the rollouts were given up")
            self._inbox.put((work, answer))
        return answer.result()

    def report(self, report: _core.Ending | _core.GroupEnding | None) -> None:
        """Hand it over; for other threads. None: there are no more."""
        self._inbox.put(report)

    def next(self) -> _core.Ending | _core.GroupEnding | None:
        """The next report; until then, do what is asked for."""
        while True:
            one = self._inbox.get()
            if not isinstance(one, tuple):
                return one
            _answer(*one)

    def close(self) -> None:
        """Refuse whatever is asked for from now on."""
        with self._lock:
            self._open = False
        with contextlib.suppress(queue.Empty):
            while True:
                one = self._inbox.get_nowait()
                if isinstance(one, tuple):
                    one[1].set_exception(RuntimeError("the rollouts were given up"))


def _answer(work: Callable[[], T], answer: Future[T]) -> None:
    try:
        answer.set_result(work())
    except Exception as error:
        answer.set_exception(error)


class Flights:
    """Makes rollouts on worker threads. A context manager: leaving it stops the threads."""

    def __init__(
        self, replicas: Sequence[Replica], *, seed: int, steps: int, threshold: float, schedule: Schedule, greedy: bool = False,
        keep_frames: bool = False,
    ) -> None:  # fmt: skip
        """One worker per replica, its own device to the scheduler. A rollout ends at the first step whose score is above `threshold`, or after
        `steps` [control steps]. What a worker needs of another's is brought to its device. ValueError where `steps` are no multiple of the chunk,
        a world with a home is to have several workers, or nobody has a part.
        """
        where = {part: [i for i, replica in enumerate(replicas) if part in replica.parts] for part in get_args(Part)}
        if missing := [part for part, those in where.items() if not those]:
            raise ValueError(f"{len(replicas)} replicas without a {' and a '.join(missing)}: want at least one of each part")
        chunk = replicas[0].policy.chunk
        if steps < chunk or steps % chunk:
            raise ValueError(f"steps={steps}: want a multiple of the policy's chunk of {chunk}")
        if len(replicas) > 1 and any(replica.world.at_home for replica in replicas):
            raise ValueError(f"{len(replicas)} workers: this world must be called on one thread; use 1")
        self._replicas, self._seed, self._threshold, self._greedy, self._keep = replicas, seed, threshold, greedy, keep_frames
        self._chunks = steps // chunk
        self._flights: dict[int, Flight] = {}
        self._starts: dict[tuple[int, int, str], Any] = {}  # by group, worker and what it is
        self._failure: Exception | None = None
        self._home = _Home()
        self._ready: set[int] = set()  # threads, by number: what threading.local holds is lost between two calls of a thread that is not Python's
        self._threads = torch.get_num_threads()
        worlds = {i: replicas[i].world.stages for i in where["simulator"]}
        parts = next(iter(worlds.values()))
        making = [self._making({i: one[n] for i, one in worlds.items()}, n == 0, n == len(parts) - 1) for n in range(len(parts))]
        stages = stages_of(schedule, parts, where)
        config = config_of(schedule, stages, len(replicas), schedule.each(replicas))
        everything = zip(stages, (self._act, *making, self._judge), strict=True)
        self._runner = _core.Runner(config, [self._guarded(run, stage.steps, schedule.streams) for stage, run in everything])

    def __enter__(self) -> Flights:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Join the threads after their running batches; what is under way is lost."""
        self._home.close()
        self._runner.stop()
        torch.set_num_threads(self._threads)

    def fly(self, jobs: Sequence[Assignment]) -> Iterator[Flight]:
        """Make the rollouts `jobs`; each is given out when it has ended, in no promised order, the cancelled ones not at all.

        Raises RolloutError, when all others have ended, that names those that failed; ValueError where a group has several contexts.
        """
        contexts: dict[int, Context] = {}
        for job in jobs:
            first = contexts.setdefault(job.group, job.context)
            if first is not job.context and not _same(first, job.context):
                raise ValueError(f"group {job.group} has rollouts of several contexts: want one")
        for device in {replica.device for replica in self._replicas if replica.device.type == "cuda"}:
            torch.cuda.synchronize(device)  # weights may still be on their way, on a stream that no worker waits for
        self._flights |= {job.number: Flight(job) for job in jobs}
        self._runner.submit([(job.number, job.group, self._chunks) for job in jobs])
        pump = threading.Thread(target=self._pump, daemon=True)
        pump.start()
        failed: list[str] = []
        while (report := self._home.next()) is not None:
            if isinstance(report, _core.GroupEnding):
                for worker, what in itertools.product(range(len(self._replicas)), ("scene", "inside", "watch")):
                    self._starts.pop((report.group, worker, what), None)
                continue
            flight = self._flights.pop(report.rollout)
            del flight.queries[report.chunks :]
            flight.stopped = report.why == "stopped"
            if report.why == "failed":
                failed.append(f"rollout {report.rollout} of group {report.group} (seed {self._seed}): {report.message}")
            elif report.why != "cancelled":
                yield flight
        pump.join()
        if failed:
            more = f"; and {len(failed) - 3} more" if len(failed) > 3 else ""
            raise RolloutError("; ".join(failed[:3]) + more) from self._failure

    def _pump(self) -> None:
        while (report := self._runner.next()) is not None:
            self._home.report(report)
        self._home.report(None)

    def cancel(self, number: int) -> None:
        """Give rollout `number` up; nothing happens where it has ended."""
        self._runner.cancel(number)

    def statistics(self) -> dict[str, Any]:
        """See `_core.Runner.statistics`."""
        return self._runner.statistics()

    # what the scheduler calls, on its threads

    def _guarded(self, run: Callable[[_core.Batch], Any], steps: int, streams: int) -> Callable[[_core.Batch], Any]:
        def guarded(batch: _core.Batch) -> Any:
            try:
                if (thread := threading.get_ident()) not in self._ready:
                    torch.set_num_threads(1)  # several threads would cut a batch into parts, so that a row's place counts
                    device = self._replicas[batch.device].device
                    if device.type == "cuda":
                        torch.cuda.set_device(device)
                        if streams > 1:  # what a chunk passes once goes before what it passes many times: others wait for it
                            torch.cuda.set_stream(_stream(device, batch.stage, 0 if steps > 1 else -1))
                    self._ready.add(thread)
                with torch.no_grad():
                    return run(batch)
            except Exception as error:
                self._failure = error
                raise

        return guarded

    def _settle(self, worker: int) -> None:
        """Wait for the kernels of this thread's batch. Only then does a rollout take what came of them: a batch that failed has changed nothing but
        where the rollout began, the next stage may be on another stream, and the memory of what is read here is not given away before. Stages are
        judged by their times, too.
        """
        device = self._replicas[worker].device
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()

    def _taken(self, batch: _core.Batch) -> list[Flight]:
        return [self._flights[number] for number in batch.rollout.tolist()]

    def _start(self, flight: Flight, worker: int, what: str, made: Callable[[World], Any]) -> Any:
        """What a worker's world makes of the rollout's start, once for its group: alone, so that nobody else has a part in it."""
        key = (flight.job.group, worker, what)
        if key not in self._starts:
            world = self._replicas[worker].world
            self._starts[key] = self._home.call(lambda: made(world)) if world.at_home else made(world)
        return self._starts[key]

    def _begun(self, flight: Flight, worker: int) -> Scene:
        job = flight.job
        scene: Scene = self._start(flight, worker, "scene", lambda world: world.begin([job.context], [job.number])[0])
        return replace(scene, number=job.number, context=job.context)

    def _act(self, batch: _core.Batch) -> None:
        replica, flights = self._replicas[batch.device], self._taken(batch)
        for flight in flights:
            if flight.scene is None:
                flight.first = flight.scene = self._begun(flight, batch.device)
        scenes = [_at(flight.scene, replica.device) for flight in flights if flight.scene is not None]
        asked = _padded(scenes, batch.shape)
        answer = replica.policy.act(observe(asked), None if self._greedy else draw_uniform(replica.policy, asked, self._seed))
        # Copies, because a view would keep the answers of the whole batch
        own = [tuple(rows[i].clone() for rows in (answer.action, answer.log_prob, answer.command)) for i in range(len(flights))]
        self._settle(batch.device)
        for flight, scene, (action, log_prob, command) in zip(flights, scenes, own, strict=True):
            flight.queries.append(Query(scene.frame, scene.proprio, action, log_prob, command))
            flight.work = scene, command

    def _making(self, of_worker: Mapping[int, WorldStage], first: bool, last: bool) -> Callable[[_core.Batch], None]:
        def entered(flight: Flight, worker: int) -> tuple[Scene, torch.Tensor]:
            scene, command = flight.work
            if scene.chunk == 0:
                scene = replace(scene, inside=self._start(flight, worker, "inside", lambda world: world.enter([scene])[0]))
            return scene, command

        def make(batch: _core.Batch) -> None:
            flights, stage = self._taken(batch), of_worker[batch.device]
            rows = _padded([entered(flight, batch.device) if first else flight.work for flight in flights], batch.shape)
            world = self._replicas[batch.device].world
            done = self._home.call(lambda: stage.run(rows)) if world.at_home else stage.run(rows)
            self._settle(batch.device)
            for flight, one, step in zip(flights, done[: len(flights)], batch.step.tolist(), strict=True):
                flight.work = one
                if last and step == stage.steps - 1:
                    flight.queries[-1].made, flight.scene, flight.work = one, one.after, None

        return make

    def _judge(self, batch: _core.Batch) -> list[tuple[bool, float]]:
        flights, world, chunks = self._taken(batch), self._replicas[batch.device].world, batch.chunk.tolist()
        queries = [flight.queries[chunk] for flight, chunk in zip(flights, chunks, strict=True)]
        made = _padded([query.made for query in queries if query.made is not None], batch.shape)
        watched = [flight.watch if chunk else self._watch(flight, batch.device) for flight, chunk in zip(flights, chunks, strict=True)]
        score, watches = world.judge(_padded(watched, batch.shape), made)
        self._settle(batch.device)
        score = score[: len(flights)]
        if not bool(torch.isfinite(score).all()):
            raise FloatingPointError(f"a score is {score[~torch.isfinite(score)][0].item()}")
        ends, verdicts = ended_at(score, self._threshold).tolist(), []
        for i, (flight, query, end) in enumerate(zip(flights, queries, ends, strict=True)):
            flight.watch, query.score, query.end = watches[i], score[i], end
            if not self._keep:
                query.made = None
            verdicts.append((end < score.shape[1], float(score[i, min(end, score.shape[1] - 1)])))
        return verdicts

    def _watch(self, flight: Flight, worker: int) -> Any:
        assert flight.first is not None
        first = flight.first
        return self._start(flight, worker, "watch", lambda world: world.watch([first])[0])


@functools.cache
def _stream(device: torch.device, stage: int, priority: int) -> torch.cuda.Stream:
    """One for the life of the process: memory that torch keeps for a stream is of use to no other."""
    return torch.cuda.Stream(device, priority)  # type: ignore[no-untyped-call]


def _at(scene: Scene, device: torch.device) -> Scene:
    """`scene` with what a policy sees of it on `device`; what the world remembers stays where it is."""
    if scene.frame.device == device:
        return scene
    return replace(scene, frame=scene.frame.to(device), proprio=scene.proprio.to(device))


def _same(one: Context, other: Context) -> bool:
    return (one.instruction, one.task, one.state_index, one.gripper) == (other.instruction, other.task, other.state_index, other.gripper) and (
        np.array_equal(one.frame, other.frame) and np.array_equal(one.pose, other.pose)
    )


def collect(
    policy: Policy, world: World, jobs: Sequence[Assignment], *, seed: int, steps: int, threshold: float, schedule: Schedule | None = None,
    greedy: bool = False,
) -> Iterator[Rollout]:  # fmt: skip
    """Yield each rollout of `jobs` as it ends, in no promised order, made by one worker. Errors as `Flights` and `Flights.fly`.

    A rollout ends at the first step whose score is above `threshold`, or after `steps` [control steps, a multiple of the chunk].
    """
    settings = Schedule() if schedule is None else schedule
    with Flights([Replica(policy, world)], seed=seed, steps=steps, threshold=threshold, schedule=settings, greedy=greedy) as flights:
        for flight in flights.fly(jobs):
            yield flight.rollout()

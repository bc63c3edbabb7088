"""Stage loop: Algorithm 1 of the paper (arXiv:2509.24948, section 4.4)."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from worldenv import console, noise
from worldenv.data.collect import factor_of
from worldenv.engines.parity import Parity
from worldenv.learning import processes
from worldenv.learning.loop.update import Learner
from worldenv.nouns import Context, Rollout
from worldenv.policy import weights as policies
from worldenv.policy.openvla_oft import OpenVLAOFT
from worldenv.rollout.collect import Assignment
from worldenv.rollout.store import RolloutStore, stored
from worldenv.run import RunError, Stage, snapshot_path
from worldenv.stages.desk import LOOP_NUMBERS, Desk
from worldenv.stages.fleet import Fleet, assembled


class _Start(NamedTuple):
    """Where a rollout may begin."""

    task: int
    state: int
    """Number of the initial state."""
    shown: tuple[Literal["demos", "explore"], int] | None = None
    """The episode that began there, by the stage that has it and its number; None: a training state of the environment."""


def contexts_of(desk: Desk, iteration: int) -> list[Context]:
    """The start states of one LOOP iteration: spread over the tasks, training states only, `hard_share` of them hard where a task has such."""
    loop, tasks = desk.settings.loop, desk.site.tasks
    pool = [_Start(e.task, e.state_index, ("demos", e.number)) for e in desk.episodes("demos").entries]
    if loop.context_states == "train":
        pool = pool + _recorded(desk) if desk.settings.env.recorded else _states(desk)
    failed = _failed_from(desk) if loop.hard_share else []
    chosen = []
    for n in range(loop.contexts):
        number = iteration * loop.contexts + n
        mine, hard = ([start for start in some if start.task == number % len(tasks)] for some in (pool, failed))
        mine = hard if hard and n < loop.hard_share * loop.contexts else mine
        draw = noise.integers(desk.seed, noise.Stream.CONTEXT, number, len(mine), 1)
        start = mine[int(draw[0])]
        # an episode knows what it began from, and of somebody else's the environment does not
        chosen.append(desk.context(start.task, start.state) if start.shown is None else desk.episodes(start.shown[0]).load(start.shown[1]).context)
    return chosen


def _states(desk: Desk) -> list[_Start]:
    return [_Start(task, index) for task in range(len(desk.site.tasks)) for index in range(desk.site.states("train"))]


def _recorded(desk: Desk, failed: bool = False) -> list[_Start]:
    """Where recorded exploration began that something is learned from; or that of it which failed."""
    entries = [e for e in desk.episodes("explore").entries if e.number not in desk.held_out]
    return [_Start(e.task, e.state_index, ("explore", e.number)) for e in entries if not failed or e.first_success is None]


def assignments_of(desk: Desk, iteration: int) -> list[Assignment]:
    """The rollouts of one LOOP iteration, by number: `group` from each of its start states."""
    loop, contexts = desk.settings.loop, contexts_of(desk, iteration)
    first, group = LOOP_NUMBERS + iteration * loop.contexts * loop.group, iteration * loop.contexts
    return [Assignment(first + n, group + n // loop.group, contexts[n // loop.group]) for n in range(loop.contexts * loop.group)]


def _failed_from(desk: Desk) -> list[_Start]:
    """Training states from which exploration failed at least once, with noise no wider than LOOP's; what was recorded does not say how wide."""
    settings, tasks = desk.settings, len(desk.site.tasks)
    if settings.env.recorded:
        return _recorded(desk, failed=True)
    entries = [e for e in desk.episodes("explore").entries if factor_of(e.number, tasks, settings.explore) <= settings.loop.scale_factor]
    return sorted({_Start(e.task, e.state_index) for e in entries if e.first_success is None})


@dataclass(frozen=True)
class Practice:
    """Where LOOP's rollouts happen."""

    fleet: Fleet
    success: float
    """A score above it is success."""
    terminates: bool
    """And ends the rollout."""

    @property
    def threshold(self) -> float:
        """A score above it ends a rollout."""
        return self.success if self.terminates else math.inf


def practice_of(desk: Desk, policy: OpenVLAOFT, folder: Path) -> Practice:
    """For `policy`, with engines as stage loop in `folder` took them, or takes them now."""
    reflector = None if desk.settings.loop.control == "true-simulator" else desk.reflector(desk.judging)
    success = 0.5 if reflector is None else reflector.config.threshold
    return Practice(assembled(desk, folder, policy, reflector), success, desk.settings.loop.termination)


def log_path(folder: Path, iteration: int, machine: int = 0) -> Path:
    """Where the finished rollouts of a machine lie while their iteration is under way; 0 leads."""
    return folder / f"iteration-{iteration:04d}{f'.{machine}' if machine else ''}.log"


def logs(folder: Path, iteration: int) -> list[Path]:
    """Those that are there, whatever number of machines made them."""
    return sorted(folder.glob(f"iteration-{iteration:04d}.*log"))


def _stored(paths: Sequence[Path]) -> list[Rollout]:
    return [rollout for path in paths if path.is_file() for rollout in stored(path)]


def _ready(machines: processes.Machines, desk: Desk, folder: Path, kept: Mapping[str, Any] | None = None) -> tuple[Learner, Practice]:
    """What stage loop in `folder` works with on this machine; `kept` is what the leader's learner goes on from."""
    with machines.together():
        learner = Learner(desk.policy("scale"), desk.settings.loop, desk.seed)
        if kept is not None:
            learner.load_tree(kept)
    learner.keep_up(machines)  # plans are found by the weights that they were built with
    with machines.leader_first():  # it chooses engines and writes down which; the others take these
        practice = practice_of(desk, learner.policy, folder)
        learner.share(practice.fleet.policies[1:])
    return learner, practice


def _make(desk: Desk, practice: Practice, jobs: Sequence[Assignment], numbers: Sequence[int], store: RolloutStore) -> None:
    """Those of `jobs` that have these numbers, into `store`."""
    wanted = set(numbers)
    with desk.flights(practice.fleet.replicas, practice.threshold) as flights:
        for flight in flights.fly([job for job in jobs if job.number in wanted]):
            store.add(flight.rollout())


def help_loop(desk: Desk) -> None:
    """What a process other than the leading one does in stage loop: the first one of a machine makes its part of every iteration's rollouts.

    Raises what stage loop does, and ProcessError where another process has failed or is gone.
    """
    machines = processes.machines()
    if machines is None:
        return
    folder = desk.run.folder("loop")
    learner, practice = _ready(machines, desk, folder)
    while (told := machines.agreed(None)) is not None:
        iteration, missing = told
        learner.keep_up(machines)
        with machines.together():
            practice.fleet.follow()
            with contextlib.closing(RolloutStore(log_path(folder, iteration, machines.number))) as store:
                _make(desk, practice, assignments_of(desk, iteration), machines.dealt(missing), store)


def loop(desk: Desk, stage: Stage) -> None:
    """Algorithm 1: rollouts in the imagined world, leave-one-out advantages, clipped updates of LoRA and heads.

    Of several machines all make rollouts, each into a log of its own, and this one learns from them. Raises ProcessError where another has failed
    or is gone, RunError where what it made is not to be seen here.
    """
    settings = desk.settings.loop
    processes.agreed("loop")
    machines = processes.machines()
    assert machines is not None  # the leader is the first one of its machine
    savepoint = stage.savepoint("iterations")
    history: list[dict[str, float]] = []
    groups: list[dict[str, list[float]]] = []
    seconds: list[float] = []
    collected: list[list[float]] = []  # rollouts that were made and seconds, by iteration; what a killed run had made of one is in neither
    if (kept := savepoint.load("learner", "history", "groups", "seconds", "collected")) is not None:
        history, groups, seconds, collected = kept["history"], kept["groups"], kept["seconds"], kept["collected"]
    for done in range(len(history)):  # left where the run was killed between a savepoint and this
        for log in logs(stage.folder, done):
            log.unlink()
    learner, practice = _ready(machines, desk, stage.folder, kept and kept["learner"])
    refits = dict[str, Parity]()
    for iteration in (bar := console.track(len(history), settings.iterations, "loop")):
        began = time.monotonic()
        own = log_path(stage.folder, iteration)
        store = RolloutStore(own)
        others = [log for log in logs(stage.folder, iteration) if log != own]
        made = {one.number for one in (*store.rollouts, *_stored(others))}
        jobs = assignments_of(desk, iteration)
        missing = [job.number for job in jobs if job.number not in made]
        machines.agreed((iteration, missing))
        learner.keep_up(machines)
        with machines.together():
            refits = practice.fleet.follow()
            _make(desk, practice, jobs, machines.dealt(missing), store)
        others = sorted({*others, *(log_path(stage.folder, iteration, number) for number in range(1, machines.count))})
        by_number = {one.number: one for one in (*store.rollouts, *_stored(others))}
        if lost := [job.number for job in jobs if job.number not in by_number]:
            raise RunError(f"{stage.folder}: {len(lost)} rollouts of other machines are not there; want --out on a disk that all machines share")
        rollouts = [by_number[job.number] for job in jobs]
        collected.append([len(missing), time.monotonic() - began])
        metrics = learner.update(rollouts, iteration)
        returns = np.array([rollout.value for rollout in rollouts]).reshape(-1, settings.group)
        history.append({
            "return": float(np.mean(returns)),
            "imagined_success": float(np.mean([r.value > practice.success for r in rollouts])),
            "spread": float(np.mean(np.std(returns, axis=1))),
            **metrics,
        })  # fmt: skip
        groups.append({"mean": returns.mean(axis=1).tolist(), "low": returns.min(axis=1).tolist(), "high": returns.max(axis=1).tolist()})
        seconds.append(time.monotonic() - began)
        if settings.snapshot_every and (iteration + 1) % settings.snapshot_every == 0:
            learner.save_change(snapshot_path(stage.folder, iteration + 1), desk.policy_file("scale"))
        savepoint.save({"learner": learner.tree(), "history": history, "groups": groups, "seconds": seconds, "collected": collected})
        store.close()
        for log in (own, *others):
            log.unlink()
        bar.note(history[-1], **{"return": history[-1]["return"], "clip": metrics["clip_fraction"]})
    machines.agreed(None)
    stage.timings["machines"] = machines.count
    policies.save(stage.folder / "policy.safetensors", learner.policy, learner.merged())
    learner.export_adapter(stage.folder / "lora_adapter")
    stage.metrics["engines"] = practice.fleet.engines
    stage.timings["refit"] = {name: one.plain() for name, one in refits.items()}
    stage.metrics |= {"return_first": history[0]["return"], "return_last": history[-1]["return"], "history": history, "groups": groups}
    stage.timings["seconds_per_iteration"] = float(np.mean(seconds))
    rollouts_made, took = np.sum(collected, axis=0)
    stage.timings["rollouts_per_second"] = float(rollouts_made / took)

"""Stage loop: Algorithm 1 of the paper (arXiv:2509.24948, section 4.4)."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from worldenv import console, noise
from worldenv.data.collect import factor_of
from worldenv.engines.parity import Parity
from worldenv.learning.loop.update import Learner
from worldenv.nouns import Context
from worldenv.policy import weights as policies
from worldenv.policy.openvla_oft import OpenVLAOFT
from worldenv.rollout.collect import Assignment
from worldenv.rollout.store import RolloutStore
from worldenv.run import Stage, snapshot_path
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
    threshold: float
    """A score above it ends a rollout."""


def practice_of(desk: Desk, policy: OpenVLAOFT, folder: Path) -> Practice:
    """For `policy`, with engines as stage loop in `folder` took them, or takes them now."""
    reflector = None if desk.settings.loop.control == "true-simulator" else desk.reflector(desk.judging)
    threshold = 0.5 if reflector is None else reflector.config.threshold
    fleet = assembled(desk, folder, policy, reflector)
    return Practice(fleet, threshold if desk.settings.loop.termination else math.inf)


def _log(folder: Path, iteration: int) -> Path:
    """Where the finished rollouts of an iteration lie while it is under way."""
    return folder / f"iteration-{iteration:04d}.log"


def loop(desk: Desk, stage: Stage) -> None:
    """Algorithm 1: rollouts in the imagined world, leave-one-out advantages, clipped updates of LoRA and heads."""
    settings = desk.settings.loop
    learner = Learner(desk.policy("scale"), settings, desk.seed)
    savepoint = stage.savepoint("iterations")
    history: list[dict[str, float]] = []
    groups: list[dict[str, list[float]]] = []
    seconds: list[float] = []
    if (kept := savepoint.load()) is not None:
        learner.load_tree(kept["learner"])
        history, groups, seconds = kept["history"], kept["groups"], kept["seconds"]
    for done in range(len(history)):  # left where the run was killed between a savepoint and this
        _log(stage.folder, done).unlink(missing_ok=True)
    practice = practice_of(desk, learner.policy, stage.folder)
    learner.share(practice.fleet.policies[1:])
    refits = dict[str, Parity]()
    for iteration in (bar := console.track(len(history), settings.iterations, "loop")):
        began = time.monotonic()
        store = RolloutStore(_log(stage.folder, iteration))
        made = {rollout.number for rollout in store.rollouts}
        jobs = [job for job in assignments_of(desk, iteration) if job.number not in made]
        refits = practice.fleet.follow()
        with desk.flights(practice.fleet.replicas, practice.threshold) as flights:
            for flight in flights.fly(jobs):
                store.add(flight.rollout())
        collected = time.monotonic()
        metrics = learner.update(store.rollouts, iteration)
        returns = np.array([rollout.value for rollout in sorted(store.rollouts, key=lambda r: r.number)]).reshape(-1, settings.group)
        history.append({
            "return": float(np.mean(returns)),
            "imagined_success": float(np.mean([r.stopped for r in store.rollouts])),
            "spread": float(np.mean(np.std(returns, axis=1))),
            **metrics,
        })  # fmt: skip
        groups.append({"mean": returns.mean(axis=1).tolist(), "low": returns.min(axis=1).tolist(), "high": returns.max(axis=1).tolist()})
        seconds.append(time.monotonic() - began)
        stage.timings["rollouts_per_second"] = len(jobs) / max(collected - began, 1e-9)
        if settings.snapshot_every and (iteration + 1) % settings.snapshot_every == 0:
            policies.save(snapshot_path(stage.folder, iteration + 1), learner.policy, learner.merged())
        savepoint.save({"learner": learner.tree(), "history": history, "groups": groups, "seconds": seconds})
        store.discard()
        bar.note(history[-1], **{"return": history[-1]["return"], "clip": metrics["clip_fraction"]})
    policies.save(stage.folder / "policy.safetensors", learner.policy, learner.merged())
    learner.export_adapter(stage.folder / "lora_adapter")
    stage.metrics["engines"] = practice.fleet.engines
    stage.timings["refit"] = {name: one.plain() for name, one in refits.items()}
    stage.metrics |= {"return_first": history[0]["return"], "return_last": history[-1]["return"], "history": history, "groups": groups}
    stage.timings["seconds_per_iteration"] = float(np.mean(seconds))

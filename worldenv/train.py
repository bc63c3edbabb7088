"""The story of a run, stage by stage: demonstrations, a policy, a learned world, a judge, LOOP between them, and what came of it.

    demos -> sft -> scale -> explore -> world -> reward -> loop -> eval -> report

A stage reads what earlier stages wrote and writes its own folder; it is skipped when that is there and matches its inputs and settings.
"""

from __future__ import annotations

import gc
import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from worldenv import console, presets
from worldenv.checkpoint import Savepoint
from worldenv.config import RunConfig
from worldenv.data import recorded
from worldenv.devices import device_of
from worldenv.learning import processes, sft
from worldenv.reflector import weights as reflectors
from worldenv.run import Run, RunError, Stage, done, savepoint_path, settings_of
from worldenv.simulator.schedule import Sampler
from worldenv.simulator.weights import want_beginning
from worldenv.stages.desk import Desk
from worldenv.stages.evaluate import evaluate
from worldenv.stages.loop import help_loop, loop
from worldenv.stages.policy import demos, explore, fine_tune, fit_policy, scale
from worldenv.stages.record import RECORDED, write_report
from worldenv.stages.reward import reward
from worldenv.stages.world import fit_world, world


@dataclass(frozen=True)
class Plan:
    """What a stage does and what decides its output."""

    work: Callable[[Desk, Stage], None]
    inputs: tuple[str, ...]
    settings: Callable[[RunConfig], list[Any]]
    """See `deciding`."""


def _site(settings: RunConfig) -> list[Any]:
    """Where it happens: the environment; or what the recordings hold that stand in its place, wherever they lie, and what a run makes of them."""
    env = settings.env
    return [env.name, env.tasks, env.image, env.steps, recorded.fingerprint(env)] if env.recorded else [env]


def _exploration(settings: RunConfig) -> list[Any]:
    """As `_site`, of what the policy does there."""
    explore = settings.explore
    return [explore.held_out, recorded.opened(Path(explore.source), "explore.source").fingerprint] if settings.env.recorded else [explore]


STAGES: dict[str, Plan] = {
    "demos": Plan(demos, (), lambda c: [c.seed, *_site(c), c.demos]),
    "sft": Plan(fine_tune, ("demos",), lambda c: [c.seed, *_site(c), c.policy, c.sft]),
    "scale": Plan(scale, ("demos", "sft"), lambda c: [c.seed, *_site(c), c.scale]),
    "explore": Plan(explore, ("scale",), lambda c: [c.seed, *_site(c), *_exploration(c)]),
    "world": Plan(world, ("demos", "explore"), lambda c: [c.seed, *_site(c), c.explore.held_out, c.simulator, c.world]),
    "reward": Plan(
        reward,
        ("demos", "explore", "world"),
        lambda c: [c.seed, *_site(c), c.explore.held_out, c.policy.chunk, c.reflector, c.reward, c.engines],
    ),
    "loop": Plan(
        loop,
        ("demos", "scale", "explore", "world", "reward"),
        lambda c: [c.seed, *_site(c), *_exploration(c), c.loop, c.engines],
    ),
    "eval": Plan(
        evaluate,
        ("scale", "explore", "world", "reward", "loop"),
        lambda c: [c.seed, *_site(c), c.explore.held_out, c.policy.chunk, c.loop, c.eval, c.report.replays, c.engines],
    ),
    "report": Plan(write_report, RECORDED, lambda c: [c]),
}


def deciding(name: str, settings: RunConfig) -> list[Any]:
    """What of `settings` decides the output of stage `name`: not where it is made, nor in how much memory."""
    return STAGES[name].settings(settings.placed_as(presets.TINY))  # as one and the same run is


def _inputs(name: str, settings: RunConfig) -> tuple[str, ...]:
    """Stages that stage `name` reads: in the true environment LOOP imagines nothing, and the predicate judges."""
    needs = STAGES[name].inputs
    true = name == "loop" and settings.loop.control == "true-simulator"
    return tuple(one for one in needs if one not in ("world", "reward")) if true else needs


def _up_to(last: str, settings: RunConfig) -> list[str]:
    """Stage `last` and all that it is made from, in order."""
    needed, names = {last}, list(STAGES)
    for name in reversed(names[: names.index(last) + 1]):
        needed |= set(_inputs(name, settings)) if name in needed else set()
    return [name for name in names if name in needed]


def chosen(settings: RunConfig, only: str | None = None, until: str | None = None) -> list[str]:
    """The stages that `train` runs, in order.

    ValueError where the simulator's steps make no sampler, and where the policy's head has no density and one of the stages is made with it.
    """
    Sampler.ddim(settings.simulator.denoise_steps, settings.simulator.eta)
    names = [only] if only else _up_to(until, settings) if until else list(STAGES)
    if needy := [name for name in names if "scale" in _up_to(name, settings)]:
        settings.policy.want_laplace(f"stage {needy[0]}")
    return names


def _want_brought(settings: RunConfig, names: Sequence[str]) -> None:
    """RunError for what the user brings, one of the stages `names` begins from and is not there, or is no such thing: said before the hours of the
    stages before it."""
    if "explore" in names and settings.env.recorded and not settings.explore.source:
        raise RunError(
            "explore.source: env.name=recorded has nothing to explore: run --until scale, let its policy act on the robot, record and label that, "
            "then go on with that folder (--explore.source; docs/own-robot.md)"
        )
    brought = (
        ("demos", "demos.source", settings.demos.source),
        ("sft", "sft.start", settings.sft.start),
        ("explore", "explore.source", settings.explore.source),
        ("world", "world.initial", settings.world.initial),
        ("world", "world.clip", settings.world.clip),
        ("reward", "reward.start", settings.reward.start),
    )
    for stage, name, path in brought:
        if stage in names and path and not Path(path).exists():
            raise RunError(f"{name}={path!r}: nothing is there, and stage {stage} begins from it; say where it lies (--{name})")
    if settings.env.recorded:
        recorded.fingerprint(settings.env)
        if settings.explore.source:
            recorded.opened(Path(settings.explore.source), "explore.source")
    _want_weights(settings, names)


def _want_weights(settings: RunConfig, names: Sequence[str]) -> None:
    """RunError for published weights that one of the stages `names` begins from and that are damaged or of another network, by names and shapes."""
    world, judge, clip = settings.world, settings.reward, Path(settings.world.clip) if settings.world.clip else None
    checks: tuple[tuple[str, str, str, Callable[[], object]], ...] = (
        ("sft", "sft.start", settings.sft.start, lambda: sft.want_start(settings.policy, settings.sft)),
        ("world", "world.initial", world.initial, lambda: want_beginning(settings.simulator, Path(world.initial), clip)),
        ("reward", "reward.start", judge.start, lambda: reflectors.open_directory(Path(judge.start), settings.reflector, device="meta")),
    )
    for stage, name, path, check in checks:
        if stage in names and path:
            try:
                check()
            except ValueError as error:
                raise RunError(f"{name}: {error}") from error


def _want_unchanged(run: Run, again: Sequence[str]) -> None:
    """RunError where recordings hold something else than when a stage took them: doing it again would throw away what came of it."""
    settings = run.settings
    for stage, setting, path in (("demos", "env.recordings", settings.env.recordings), ("explore", "explore.source", settings.explore.source)):
        if not settings.env.recorded or stage in again or not done(run.out, stage):
            continue
        now = recorded.fingerprint(settings.env) if stage == "demos" else recorded.opened(Path(path), setting).fingerprint
        if run.record(stage)["metrics"]["recordings"] != now:
            with_robot = " or env.robot" if stage == "demos" else ""
            raise RunError(
                f"{setting}={path!r}{with_robot}: not what stage {stage} of {run.out} took; take what did not change over into a new --out "
                f"(--reuse {run.out}), or lose what came of it: --from {stage}"
            )


def train(
    out: Path, settings: RunConfig, first: str | None = None, only: str | None = None, reuse: Sequence[Path] = (), until: str | None = None
) -> None:
    """Run the stages in `out`, or go on there. `first` does that stage and all later ones again, `only` that one alone; of these, one that has not
    finished goes on. With `until`, that stage and what it is made from, and none else.

    Of several processes (worldenv.distributed) the first one does this, and the others join it in stages sft, world and loop.
    A stage that a run of `reuse` has done with the same settings and inputs is taken from there, unless it is to be done again.
    Raises RunError, CheckpointError, FloatingPointError or OSError with one line that names the thing and the cure, and ValueError as `chosen` does.
    """
    names = chosen(settings, only, until)
    if processes.rank():
        _follow(out)
        return
    order = list(STAGES)
    again = [name for name in names if order.index(name) >= order.index(first)] if first else [only] if only else []
    _want_brought(settings, [name for name in names if name in again or not any(done(folder, name) for folder in (out, *reuse))])
    if only and _inputs(only, settings) and not (out / "run.json").is_file():
        raise RunError(f"--only {only}: {out}: no run there (no run.json) to make it from; start one: worldenv-train --out {out}")
    if {"reward", "loop", "eval"} & set(names):
        _ = Desk(Run(out, settings, leads=False)).places  # said before hours of work, and before anything is made or forgotten
    run = Run(out, settings)
    _want_unchanged(run, again)
    desk = Desk(run)
    for name in again:
        if done(out, name):  # one that was begun again and stopped goes on
            run.forget(name)
    run.keep_settings()
    idle = _idle(out, settings, names)
    for name in names:
        plan = STAGES[name]
        fingerprint = run.fingerprint(name, deciding(name, settings), list(_inputs(name, settings)))
        if run.check(name, fingerprint):
            console.say(f"{name:>7}: skipped, done before")
            continue
        if name not in again and run.borrow(name, fingerprint, reuse):
            console.say(f"{name:>7}: taken from another run")
            continue
        if name in _TOGETHER and idle:
            console.say(f"{name:>7}: {idle}")
            idle = None
        with console.logging(out / "log.jsonl"), run.at_work(name, fingerprint) as stage:
            plan.work(desk, stage)
    processes.agreed(None)
    if "report" in names:
        console.say(f"report: {out / 'report.html'}")


_TOGETHER = ("sft", "world")
"""Stages in which all processes train; where there is one, one GPU does."""


def _idle(out: Path, settings: RunConfig, names: Sequence[str]) -> str | None:
    """One line where GPUs that the run may have would idle while this process trains alone in one of the stages `names`, with the command that takes
    them: as many as the batches can be divided among.
    """
    shared = [name for name in names if name in _TOGETHER]
    if not shared or processes.count() > 1 or device_of(settings.device) != torch.device("cuda"):
        return None
    there = min(settings.gpus or torch.cuda.device_count(), torch.cuda.device_count())
    batches = {"sft": settings.sft.batch, "world": settings.world.batch}
    taken = max(n for n in range(1, there + 1) if math.gcd(*(batches[name] for name in shared)) % n == 0)
    if taken == 1:
        return None
    return (
        f"trains on one GPU, {there - 1} idle. Stop it (Ctrl-C) and give, for {taken}: torchrun --nproc-per-node {taken} -m worldenv.cli.train "
        f"--resume {shlex.quote(str(out))} --until {shared[-1]}"
    )


def _follow(out: Path) -> None:
    """What every process but the first does: wait until that one begins a stage in which all have a part, take it, and wait again."""
    together: dict[str, Callable[[Desk, Callable[[str], Savepoint]], Any]] = {
        "sft": fit_policy, "world": fit_world, "loop": lambda desk, _: help_loop(desk),
    }  # fmt: skip
    while (name := processes.agreed(None)) is not None:
        run = Run(out, settings_of(out), leads=False)  # the leader's settings, whatever this one was called with
        together[name](Desk(run), _reader(run.folder(name)))
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # from here on the first process may make rollouts on this one's GPU


def _reader(folder: Path) -> Callable[[str], Savepoint]:
    return lambda part: Savepoint(savepoint_path(folder, part))

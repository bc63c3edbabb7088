"""Stage eval: success in the true environment before and after LOOP, and imagined against true; of recordings, what can be said without one."""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from worldenv import audit, checkpoint, evaluation
from worldenv.config import EnginesConfig
from worldenv.data.episode import Episode
from worldenv.data.scenes import OneScene, Scenes, ScenesApart
from worldenv.nouns import Context
from worldenv.policy import weights as policies
from worldenv.policy.openvla_oft import OpenVLAOFT
from worldenv.reflector.contract import Judge
from worldenv.report.fields import POLICIES
from worldenv.rollout.collect import Assignment
from worldenv.run import Run, Stage, settings_of, snapshots
from worldenv.stages.desk import AUDIT_NUMBERS, REPLAY_NUMBERS, Desk, open_env
from worldenv.stages.fleet import Fleet, Imagining, assembled, imagining


def evaluate(desk: Desk, stage: Stage) -> None:
    """Success before and after LOOP, and imagined against true."""
    if desk.settings.env.recorded:
        _in_imagination(desk, stage)
    else:
        _in_truth(desk, stage)


def _in_truth(desk: Desk, stage: Stage) -> None:
    """Greedy success in the true environment, of both policies on the same test states; their imagined rollouts, replayed there."""
    settings = desk.settings
    with _scenes(desk) as scenes:
        outcomes = _outcomes(desk, stage, scenes)
        eta = outcomes["sft"].threshold
        checkpoint.save(stage.folder / "outcomes.safetensors", {name: one.tree() for name, one in outcomes.items()})
        stage.metrics |= {name: one.tally(desk.env.tasks) for name, one in outcomes.items()}
        stage.metrics["paired"] = evaluation.paired(outcomes["sft"].by("oracle"), outcomes["loop"].by("oracle"))
        stage.metrics["curve"] = _curve(desk, stage, scenes, outcomes)
    simulators = imagining(desk, stage.folder)
    stage.metrics["world"] = _fidelity(desk, simulators, desk.explored[1])
    stage.metrics["engines"] = {"world": simulators.engines}
    for i, name in enumerate(POLICIES):
        pairs, engines = _replays(desk, name, stage.folder, REPLAY_NUMBERS + i * settings.report.replays)
        stage.metrics["engines"][name] = engines
        stage.metrics["world"][f"outcome_agreement_{name}"] = audit.agreement(pairs, desk.env.tasks, eta)
        checkpoint.save(stage.folder / f"replays-{name}.safetensors", [_plain(pair) for pair in pairs])


@contextlib.contextmanager
def _scenes(desk: Desk) -> Iterator[Scenes]:
    """Where policies act in truth: here, or in processes."""
    if desk.settings.eval.processes == 1:
        yield OneScene(desk.env)
        return
    apart = ScenesApart(desk.env, functools.partial(open_env, desk.settings.env), desk.settings.eval.processes)
    try:
        yield apart
    finally:
        apart.close()


def _outcomes(desk: Desk, stage: Stage, scenes: Scenes) -> dict[str, evaluation.Outcomes]:
    """Of both policies from the same test states, judged on every device that judges LOOP's rollouts."""
    settings, judges = desk.settings, desk.judges()
    chosen, eta = evaluation.starts(desk.env, settings.eval.episodes), judges[0].config.threshold
    return {
        name: evaluation.evaluate(
            desk.policy("scale" if name == "sft" else "loop"), scenes, chosen, settings.env.steps, judges, eta, desk.device, f"eval {name}",
            savepoint=stage.savepoint(f"outcomes-{name}"),
        )
        for name in POLICIES
    }  # fmt: skip


def _in_imagination(desk: Desk, stage: Stage) -> None:
    """Greedy success in the learned world, by the reflector, from where held-out recordings began, each once; and these recordings imagined.

    Nothing here is success of a robot. What is true are the recordings: how near the world and the judge come to them is measured.
    """
    settings, held, hits = desk.settings, _spread(desk.explored[1]), {}
    begun = [episode.context for episode in held[: settings.eval.episodes]]
    for name in POLICIES:
        hits[name], engines = _imagined(desk, name, begun, stage.folder)
        stage.metrics[name] = {"imagined": evaluation.tally(hits[name], np.array([context.task for context in begun]), desk.site.tasks)}
        stage.metrics.setdefault("engines", {})[name] = engines
    checkpoint.save(stage.folder / "outcomes.safetensors", hits)
    stage.metrics["paired"] = evaluation.paired(hits["sft"], hits["loop"])
    simulators = imagining(desk, stage.folder)
    stage.metrics["engines"]["world"] = simulators.engines
    pairs = _recorded_pairs(desk, simulators, held[: settings.report.replays])
    stage.metrics["world"] = {
        **_fidelity(desk, simulators, held),
        "outcome_agreement_recorded": audit.agreement(pairs, desk.site.tasks, settings.reflector.threshold),
    }
    checkpoint.save(stage.folder / "recorded.safetensors", [_plain(pair) for pair in pairs])


def _imagined(desk: Desk, name: str, contexts: Sequence[Context], folder: Path) -> tuple[NDArray[np.bool_], dict[str, Any]]:
    """Whether the reflector ended each greedy rollout of policy `name` from `contexts`, (n,); and what ran them."""
    reflector = desk.reflector(desk.judging)
    fleet = audited(desk, desk.policy("scale" if name == "sft" else "loop"), reflector, folder, name)
    jobs = [Assignment(REPLAY_NUMBERS + i, i, context) for i, context in enumerate(contexts)]
    with desk.flights(fleet.replicas, reflector.config.threshold, greedy=True) as flights:
        flown = {flight.job.group: flight.stopped for flight in flights.fly(jobs)}
    return np.array([flown[i] for i in range(len(contexts))]), fleet.engines


def _spread(episodes: Sequence[Episode]) -> list[Episode]:
    """`episodes` in turn of their tasks: people record one after the other, and the first few are to be of all."""
    seen = Counter[int]()
    turns = []
    for episode in episodes:
        turns.append((seen[episode.task], episode.task))
        seen[episode.task] += 1
    return [episodes[i] for i in sorted(range(len(episodes)), key=lambda i: turns[i])]


def _recorded_pairs(desk: Desk, simulators: Imagining, episodes: Sequence[Episode]) -> list[audit.Pair]:
    return audit.recorded(simulators.worlds, desk.judges(), episodes, desk.settings.loop.slots, desk.settings.policy.chunk)


def _curve(desk: Desk, stage: Stage, scenes: Scenes, outcomes: Mapping[str, evaluation.Outcomes]) -> list[dict[str, Any]]:
    """Greedy success in the true environment by LOOP iteration; `outcomes` are those before the first and after the last."""
    settings = desk.settings
    chosen = evaluation.starts(desk.env, min(settings.eval.curve_episodes, settings.eval.episodes))
    known = {0: outcomes["sft"], settings.loop.iterations: outcomes["loop"]}
    rows = []
    for iteration, path in snapshots(desk.run.out):
        outcome = known[iteration].first(len(chosen)) if iteration in known else evaluation.evaluate(
            policies.load(path, desk.device), scenes, chosen, settings.env.steps, (), 1.0, desk.device, f"eval iteration {iteration}",
            savepoint=stage.savepoint(f"outcomes-{iteration}"),
        )  # fmt: skip
        rows.append({"iteration": iteration, **outcome.tally(desk.env.tasks)["oracle"]})
    return rows


def _fidelity(desk: Desk, simulators: Imagining, episodes: Sequence[Episode]) -> dict[str, Any]:
    """PSNR by chunk on held-out exploration: imagined, the first frame repeated, and the autoencoder's own reconstruction as ceiling."""
    chunk, reconstruct = desk.settings.policy.chunk, desk.simulator().reconstruct
    ours = [frames[1:] for frames in audit.imagine_episodes(simulators.worlds, episodes, desk.settings.loop.slots, chunk, "imagine held-out")]
    still = [np.broadcast_to(e.frame[:1], e.frame[1:].shape) for e in episodes]
    ceiling = [reconstruct(torch.from_numpy(e.frame[1:]).to(desk.device)).cpu().numpy() for e in episodes]
    by = {"psnr_by_chunk": ours, "psnr_copy_first_by_chunk": still, "psnr_ceiling_by_chunk": ceiling}
    return {"episodes": len(episodes), **{name: audit.psnr_by_chunk(frames, [e.frame[1:] for e in episodes], chunk) for name, frames in by.items()}}


def audited(desk: Desk, policy: OpenVLAOFT, reflector: Judge, folder: Path, name: str) -> Fleet:
    """Who makes imagined rollouts of `policy` with LOOP's noise, by stage eval's engines; `name` is of sft or loop."""
    policy.scale_factor = desk.settings.loop.scale_factor
    (folder / name).mkdir(exist_ok=True)
    return assembled(desk, folder / name, policy, reflector)


def _replays(desk: Desk, name: str, folder: Path, first: int) -> tuple[list[audit.Pair], dict[str, Any]]:
    """Rollouts of policy `name` with LOOP's noise, from training states spread over the tasks and over all that a task has (the first ones are those
    of its demonstrations), imagined and true; and what ran the imagined ones.
    """
    policy, reflector = desk.policy("scale" if name == "sft" else "loop"), desk.reflector(desk.judging)
    fleet = audited(desk, policy, reflector, folder, name)
    tasks, states, replays = len(desk.env.tasks), desk.env.states("train"), desk.settings.report.replays
    each = -(-replays // tasks)
    contexts = [desk.context(n % tasks, n // tasks * states // each % states) for n in range(replays)]
    pairs = audit.replay(
        fleet.replicas, desk.env, fleet.judges, contexts, seed=desk.seed, first_number=first, steps=desk.settings.env.steps, schedule=desk.schedule,
    )  # fmt: skip
    return pairs, fleet.engines


def audit_run(out: Path, name: Literal["sft", "loop"], episodes: int, device: str, kept: Path | None = None) -> dict[str, Any]:
    """The learned world of the run in `out` against the truth: `episodes` rollouts of its policy before ("sft") or after LOOP, imagined and replayed.

    Rollouts are others than those of stage eval, by eager networks, and nothing is written to the run; the pairs are kept in file `kept`. Of a run
    from recordings, which nobody can replay, they are its held-out recordings, as many as there are, whatever `name` is. Returns
    counts (`audit.agreement`), `psnr_by_chunk` [dB] of imagined against true frames, and `psnr_copy_first_by_chunk`, of the first frame repeated.
    RunError and CheckpointError where a stage has left nothing, or is damaged.
    """
    settings = settings_of(out)
    eager, few = EnginesConfig(back_end="eager"), replace(settings.report, replays=episodes)
    here = replace(settings.loop, apart="none", apart_gpus=0)  # one device, wherever the run was
    desk = Desk(Run(out, replace(settings, device=device, gpus=1, loop=here, engines=eager, report=few), leads=False))
    with tempfile.TemporaryDirectory() as folder:
        if settings.env.recorded:
            pairs = _recorded_pairs(desk, imagining(desk, Path(folder)), _spread(desk.explored[1])[:episodes])
        else:
            pairs, _ = _replays(desk, name, Path(folder), AUDIT_NUMBERS)
    if kept is not None:
        checkpoint.save(kept, [_plain(pair) for pair in pairs])
    true, chunk = [pair.true for pair in pairs], settings.policy.chunk
    still = [np.broadcast_to(pair.context.frame, pair.true.shape) for pair in pairs]
    return {
        **audit.agreement(pairs, desk.site.tasks, desk.settings.reflector.threshold),
        "psnr_by_chunk": audit.psnr_by_chunk([pair.imagined for pair in pairs], true, chunk),
        "psnr_copy_first_by_chunk": audit.psnr_by_chunk(still, true, chunk),
    }


def _plain(pair: audit.Pair) -> dict[str, Any]:
    context = {f.name: getattr(pair.context, f.name) for f in fields(pair.context)}
    return {**{f.name: getattr(pair, f.name) for f in fields(pair)}, "context": context}


def replayed_pairs(path: Path) -> list[audit.Pair]:
    """What stage eval stored in `path` (replays-sft.safetensors, replays-loop.safetensors; of recordings recorded.safetensors)."""
    return [audit.Pair(**{**tree, "context": Context(**tree["context"])}) for tree in checkpoint.load(path)]

"""Stage report: what the stages left, as a record and a page, with what a reader has to know of this run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from worldenv import audit, checkpoint, config, report
from worldenv.envs import suites
from worldenv.run import Stage
from worldenv.stages.desk import Desk
from worldenv.stages.evaluate import replayed_pairs

RECORDED = ("demos", "sft", "scale", "explore", "world", "reward", "loop", "eval")
"""Stages that the report reads."""


def write_report(desk: Desk, stage: Stage) -> None:
    """The record and the page, from what the stages left."""
    records = {name: desk.run.record(name) for name in RECORDED}
    metrics = {name: record["metrics"] for name, record in records.items()}
    history = metrics["loop"]["history"]
    measured = dict(metrics["eval"]["world"])
    settings, of_recordings = desk.settings, desk.settings.env.recorded
    written = {
        "preset": settings.preset,
        **({"unverified": True} if of_recordings else {}),
        "seed": settings.seed,
        "fast": settings.fast,
        "settings": config.to_dict(settings),
        "versions": report.versions(desk.site.versions()["renderer"]),
        "commit": report.commit(),
        "seconds_total": sum(record["seconds"] for record in records.values()),
        "peak_rss_mb": max(record["peak_rss_mb"] for record in records.values()),
        "stages": {name: {"seconds": record["seconds"], "peak_rss_mb": record["peak_rss_mb"]} for name, record in records.items()},
        "demos": metrics["demos"],
        "sft": metrics["sft"],
        "scale": metrics["scale"],
        "explore": {**metrics["explore"], "outcomes": report.lengths_by_outcome(desk.episodes("explore").entries)},
        "eval": {name: metrics["eval"][name] for name in ("sft", "loop", "paired")},
        "world": {**metrics["world"], **measured, "outcome_agreement": measured[f"outcome_agreement_{'recorded' if of_recordings else 'loop'}"]},
        "reward": metrics["reward"],
        "loop": {
            "returns": [row["return"] for row in history],
            "engines": metrics["loop"]["engines"],
            "metrics": history,
            **({} if of_recordings else {"curve": metrics["eval"]["curve"]}),
            "seconds_per_iteration": records["loop"]["timings"]["seconds_per_iteration"],
            "rollouts_per_second": records["loop"]["timings"]["rollouts_per_second"],
        },
        "notes": [*_notes(desk), _kinematics(metrics["world"]["kinematics"]), _run_by(metrics["loop"]["engines"])],
    }
    pairs = replayed_pairs(desk.run.folder("eval") / f"{'recorded' if of_recordings else 'replays-loop'}.safetensors")
    scores = checkpoint.load(desk.run.folder("reward") / "held-out.safetensors")
    figures = report.Figures(score=scores["score"], success=scores["success"])
    made = report.write(desk.run.out, written, figures, _videos(pairs, desk))
    stage.beside += [str(path) for path in made]


def _kinematics(off: dict[str, float]) -> str:
    return (
        f"Kinematics, which says where action maps are drawn, is {off['position_mm']:.1f} mm, {off['angle_rad']:.3f} rad and {off['gripper']:.3f} "
        f"of the gripper's travel off after {off['commands']} commands of held-out exploration (medians)."
    )


def _run_by(engines: dict[str, dict[str, Any]]) -> str:
    """What ran the networks of LOOP's rollouts, and why not something else."""
    by: dict[str, list[str]] = {}
    for name, one in engines.items():
        by.setdefault(one["back_end"], []).append(name)
    said = "; ".join(f"{back_end} ({', '.join(names)})" for back_end, names in by.items())
    why = [one["why"] for one in engines.values() if one.get("why")]
    return f"Rollouts of LOOP were run by {said}." + (f" Not taken: {'; '.join(why)}." if why else "")


def _notes(desk: Desk) -> list[str]:
    settings = desk.settings
    states = f"all {desk.site.states('train')} training states of each task"
    if settings.env.recorded:
        states = "where the demonstrations and the exploration of training began"
    if settings.loop.context_states == "demos":
        states = "the first observations of the demonstrations"
    if settings.loop.hard_share:
        states += f", a share of {settings.loop.hard_share:g} of the draws from those from which exploration had failed"
    judge = "the reflector's vision tower and language model on the per-frame labels of training episodes, then frozen before its head was fitted."
    if settings.reward.judge == "classifier":
        judge = "the judge, a frame classifier (the baseline of other systems), on the per-frame labels of training episodes."
    begun = f"The policy began from {settings.sft.start}; every other network" if settings.sft.start else "No pretrained backbone: every network"
    if settings.sft.prior_steps and not settings.sft.start:
        shown = f"{settings.sft.prior_per_task} scripted episodes of each of three reaching tasks in other scenes"
        begun = f"No pretrained backbone: the policy learned from {shown} before it saw a demonstration; every network"
    notes = [
        f"{begun} was trained from scratch in this run; {judge}",
        f"LOOP started from {states}, never from {'held-out recordings' if settings.env.recorded else 'test states'}.",
        f"Memory is the sum of resident pages over the process tree, sampled; density: scale factor {settings.loop.scale_factor:g}, "
        f"floor {settings.policy.scale_floor:g}, both inside the log-density.",
    ]
    shown = f"demonstrations read from {settings.demos.source}" if settings.demos.source else "scripted demonstrations"
    if settings.env.recorded:
        notes.insert(0, (
            f"No environment: a robot ({desk.site.robot.name}) was recorded, {settings.demos.per_task} demonstrations of each of "
            f"{len(desk.site.tasks)} tasks and what its policy did. Nothing here was tried on it; what is called true are recordings."
        ))  # fmt: skip
    elif settings.env.name != "tabletop":
        own, per_task = suites.step_limit(settings.env.name), settings.demos.per_task
        notes.insert(0, (
            f"Environment: {settings.env.name}, {len(desk.site.tasks)} of its tasks; {per_task} {shown} a task; one view of "
            f"{settings.env.image} px; step limit {settings.env.steps}, where published evaluations have {own}; LIBERO's published initial states, "
            "in order."
        ))  # fmt: skip
    elif settings.demos.source:
        notes.insert(0, f"{settings.demos.per_task} {shown} a task.")
    if settings.loop.control != "none":
        notes.append(f"Control: loop.control={settings.loop.control}. This is not the method, but what it is compared with.")
    if not settings.loop.termination:
        notes.append("loop.termination=False: no rollout was ended by the reflector; each was judged at the step limit.")
    if not settings.world.extra_data:
        notes.append("--no-extra-data: the world model saw demonstrations alone.")
    if not settings.reward.head:
        notes.append('--no-reward-head: scores are the probability of "Yes".')
    if settings.fast:
        notes.append("--fast: every stage was cut short; nothing here says anything about success.")
    return notes


def _videos(pairs: Sequence[audit.Pair], desk: Desk) -> list[report.Video]:
    """A success, a failure, a false stop, an imagined failure that truly succeeded; then whatever comes next."""
    eta, most = desk.settings.reflector.threshold, desk.settings.report.videos
    shown = "recorded, same commands, held-out recording" if desk.settings.env.recorded else "true, same commands, training state"

    def kind(pair: audit.Pair) -> str:
        imagined, true = bool((pair.imagined_score > eta).any()), bool(pair.success.any())
        return {(1, 1): "success", (0, 0): "failure", (1, 0): "false stop", (0, 1): "missed success"}[(int(imagined), int(true))]

    ordered: list[audit.Pair] = []
    for turn in range(most):
        for name in ("success", "false stop", "failure", "missed success"):
            ordered += [pair for pair in pairs if kind(pair) == name][turn : turn + 1]
    return [
        report.Video(
            f"{kind(pair)}: {pair.context.instruction}",
            f"Imagined beside {shown} {pair.context.state_index}; all {len(pair.command)} steps are shown.",
            pair.imagined, pair.true, pair.imagined_score, pair.success, eta,
        )
        for pair in ordered[:most]
    ]  # fmt: skip

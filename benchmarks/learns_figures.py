"""`python -m benchmarks.learns_figures`: the pictures of docs/results.md, from the runs that `benchmarks.learns` left.

    success_by_iteration.png    greedy success in the true environment by LOOP iteration and task (cf. the paper's Figure 3), a thin line per seed
    imagined_and_true.png       what LOOP's rollouts were judged to be, beside true success of the same iteration's policy
    world_by_chunk.png          PSNR, and the reflector's agreement with the predicate on imagined and on true frames, by chunk
    after_success.png           an episode that succeeds and then fails, and where the reflector would have ended it (cf. Figure 6)
    imagined_success.png, imagined_failure.png    the same commands imagined and true (cf. Figures 11 and 12)
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from worldenv import audit, checkpoint, report
from worldenv.cli.arguments import parse
from worldenv.cli.ending import Ending
from worldenv.data.collect import act_out
from worldenv.data.scenes import OneScene
from worldenv.evaluation import Outcomes
from worldenv.policy import weights as policies
from worldenv.run import Run, settings_of
from worldenv.stages.desk import Desk
from worldenv.stages.evaluate import replayed_pairs

_SHOWN = 9
"""Frames of a strip."""
_TASK_COLOURS = ("#c2452d", "#1f6fd6", "#b98a00")


@dataclass(frozen=True)
class FiguresArgs:
    """Draw the figures of docs/results.md."""

    runs: Path = Path("runs/learns")
    """Folder of the runs: seed-*/method are drawn."""
    out: Path = Path("docs/figures")
    """Where the pictures go."""


def _percent(tally: dict[str, Any]) -> float:
    return 100 * float(tally["successes"]) / float(tally["episodes"])


def _panels(count: int, height: float = 3.0) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(4.2 * count, height), layout="constrained")
    axes = list(np.atleast_1d(figure.subplots(1, count)))
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def success_by_iteration(records: Sequence[dict[str, Any]], path: Path) -> None:
    """One panel per task and one for all of them."""
    tasks = list(records[0]["loop"]["curve"][0]["by_task"])
    figure, axes = _panels(len(tasks) + 1)
    for panel, task, colour in zip(axes, [*tasks, None], [*_TASK_COLOURS, "#1f2430"], strict=False):
        lines = [[_percent(point["by_task"][task] if task else point) for point in record["loop"]["curve"]] for record in records]
        iteration = [point["iteration"] for point in records[0]["loop"]["curve"]]
        for record, line in zip(records, lines, strict=True):
            panel.plot(iteration, line, lw=0.9, alpha=0.5, color=colour, label=f"seed {record['seed']}")
        panel.plot(iteration, np.mean(lines, axis=0), "o-", lw=2, ms=3.5, color=colour)
        panel.set_title(task or "all tasks", fontsize=9)
        panel.set_xlabel("LOOP iteration")
    axes[0].set_ylabel("greedy success, true [%]")
    figure.savefig(path, dpi=110)


def imagined_and_true(records: Sequence[dict[str, Any]], path: Path) -> None:
    """A panel per seed."""
    figure, axes = _panels(len(records))
    for panel, record in zip(axes, records, strict=True):
        judged = [100 * row["imagined_success"] for row in record["loop"]["metrics"]]
        panel.plot(np.arange(1, len(judged) + 1), judged, color="#ca5b17", lw=1, label="rollouts, imagined (with noise)")
        curve = record["loop"]["curve"]
        panel.plot([p["iteration"] for p in curve], [_percent(p) for p in curve], "o-", color="#1f6fd6", label="greedy, true")
        panel.set_title(f"seed {record['seed']}", fontsize=9)
        panel.set_xlabel("LOOP iteration")
    axes[0].set_ylabel("success [%]")
    axes[0].legend(frameon=False, fontsize=7.5)
    figure.savefig(path, dpi=110)


def _agreement(pairs: Sequence[audit.Pair], eta: float, chunk: int) -> tuple[list[float], list[float]]:
    """Share of frames [%] by chunk whose score is on the predicate's side of eta: imagined frames, true frames."""
    truth = np.stack([pair.success for pair in pairs])
    sides = (np.stack([getattr(pair, name) for pair in pairs]) > eta for name in ("imagined_score", "true_score"))
    imagined, true = ([100 * float((side == truth)[:, c : c + chunk].mean()) for c in range(0, truth.shape[1], chunk)] for side in sides)
    return imagined, true


def world_by_chunk(records: Sequence[dict[str, Any]], pairs: Sequence[audit.Pair], eta: float, path: Path) -> None:
    """PSNR of all seeds; agreement of one run's replays."""
    figure, axes = _panels(2)
    lines = {"psnr_ceiling": ("autoencoder alone", "#1c8a4c"), "psnr": ("imagined", "#ca5b17"), "psnr_copy_first": ("first frame copied", "#7b8698")}
    for key, (label, colour) in lines.items():
        for i, record in enumerate(records):
            line = record["world"][f"{key}_by_chunk"]
            axes[0].plot(np.arange(1, len(line) + 1), line, "o-", ms=3, lw=1, color=colour, label=label if i == 0 else None)
    axes[0].set_ylabel("PSNR [dB]")
    chunks = records[0]["settings"]["policy"]["chunk"]
    for line, label, colour in zip(_agreement(pairs, eta, chunks), ("imagined frames", "true frames"), ("#ca5b17", "#1f6fd6"), strict=True):
        axes[1].plot(np.arange(1, len(line) + 1), line, "o-", ms=3.5, color=colour, label=label)
    axes[1].set_ylabel("reflector agrees with the predicate [%]")
    for panel in axes:
        panel.set_xlabel("chunk")
        panel.legend(frameon=False, fontsize=7.5)
    figure.savefig(path, dpi=110)


def _strip(rows: Sequence[tuple[str, NDArray[np.uint8], NDArray[np.floating] | None, NDArray[np.bool_]]], eta: float, title: str, path: Path) -> None:
    """Videos (T, H, W, 3) below each other at the same moments; the frame is green where the predicate holds; scores stand above."""
    at = np.linspace(0, len(rows[0][1]) - 1, _SHOWN).round().astype(int)
    figure = Figure(figsize=(1.35 * _SHOWN, 1.75 * len(rows) + 0.4), layout="constrained")
    grid = figure.subplots(len(rows), _SHOWN, squeeze=False)
    for (name, video, score, success), line in zip(rows, grid, strict=True):
        for t, axes in zip(at, line, strict=True):
            axes.imshow(video[t], interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set_color("#1c8a4c" if success[t] else "#d4d9e1")
                spine.set_linewidth(3 if success[t] else 1)
            said = "" if score is None or math.isnan(score[t]) else f"  R {score[t]:.2f}{'*' if score[t] > eta else ''}"
            axes.set_title(f"t {t + 1}{said}", fontsize=7.5)
        line[0].set_ylabel(name, fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=110)


def after_success(run: Path, path: Path) -> str:
    """A test episode of the post-trained policy, else of the fine-tuned one, that succeeds where the reflector ends it and fails at the limit."""
    desk = Desk(Run(run, settings_of(run)))
    stored = checkpoint.load(run / "stages" / "eval" / "outcomes.safetensors")
    for name, stage in (("loop", "loop"), ("sft", "scale")):
        outcomes = Outcomes.from_tree(stored[name])
        saved = np.flatnonzero(outcomes.by("reflector") & ~outcomes.by("limit"))
        if len(saved):
            start, end = outcomes.start[saved[0]], int(outcomes.ends()[saved[0]])
            policy = policies.load(run / "stages" / stage / "policy.safetensors", desk.device)
            (recorder,) = act_out(OneScene(desk.env), policy, [start], desk.settings.env.steps, None, render=True, device=desk.device)
            video = np.stack([m.frame for m in recorder.moments[1:]])
            success = np.array([m.success for m in recorder.moments[1:]])
            assert outcomes.score is not None
            title = f"{desk.env.tasks[start.task]}: done, then undone. The reflector ends it at t {end}. Green: the predicate holds; *: R > eta"
            _strip([("true", video, outcomes.score[saved[0]], success)], outcomes.threshold, title, path)
            return f"{path}: {len(saved)} of {len(outcomes.start)} episodes of policy {name} are like this"
    return f"{path}: not drawn, no episode succeeds where the reflector ends it and fails at the limit"


def _trajectories(pairs: Sequence[audit.Pair], eta: float, out: Path) -> list[str]:
    said = []
    for name, wanted in (("success", True), ("failure", False)):
        fitting = [p for p in pairs if bool((p.imagined_score > eta).any()) == wanted == bool(p.success.any())]
        if not fitting:
            said.append(f"{out / f'imagined_{name}.png'}: not drawn, no such rollout")
            continue
        pair = fitting[0]
        rows = [("imagined", pair.imagined, pair.imagined_score, pair.success), ("true", pair.true, pair.true_score, pair.success)]
        title = f"{pair.context.instruction}: the same commands imagined and true. Green: the predicate holds; R: reflector; *: R > eta"
        _strip(rows, eta, title, out / f"imagined_{name}.png")
        said.append(str(out / f"imagined_{name}.png"))
    return said


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when all is drawn, 2 where there is no finished run."""
    with Ending("benchmarks.learns_figures") as ending:
        args = parse("benchmarks.learns_figures", FiguresArgs, FiguresArgs(), sys.argv[1:] if argv is None else argv)
        runs = [path for path in sorted(args.runs.glob("seed-*/method")) if (path / "report.json").is_file()]
        if not runs:
            raise ValueError(f"{args.runs}: no seed-*/method/report.json, so no finished run; make one: python -m benchmarks.learns --seed 0")
        torch.set_num_threads(1)
        args.out.mkdir(parents=True, exist_ok=True)
        records = [report.read(run) for run in runs]
        eta = float(Outcomes.from_tree(checkpoint.load(runs[0] / "stages" / "eval" / "outcomes.safetensors")["loop"]).threshold)
        pairs = replayed_pairs(runs[0] / "stages" / "eval" / "replays-loop.safetensors")
        success_by_iteration(records, args.out / "success_by_iteration.png")
        imagined_and_true(records, args.out / "imagined_and_true.png")
        world_by_chunk(records, pairs, eta, args.out / "world_by_chunk.png")
        for line in (after_success(runs[0], args.out / "after_success.png"), *_trajectories(pairs, eta, args.out)):
            print(line)
    return ending.code


if __name__ == "__main__":
    raise SystemExit(main())

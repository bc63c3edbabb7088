"""How much one iteration of LOOP can learn: the policy's gradient beside its noise, group by group, before any update.

    python -m benchmarks.loop_signal RUN [--contexts 96] [--true] [--factor F] [--hard-share H]

RUN is a run of worldenv-train with stage reward done. Rollouts of the fine-tuned policy start from `contexts` states, a group from each; the
gradient of Eq. 5 is taken for every group apart, with the advantages that LOOP would use. If g_1 .. g_n are these gradients, their mean's squared
length is too large by trace(C) / n, where C is their covariance; what is left over is signal. Printed for an iteration of the run's settings
(loop.contexts groups): signal over noise, |E g|^2 / (trace(C) / contexts), in the measure of Adam, which divides every weight's gradient by its
root mean square. Updates of a ratio far below 1 are mostly a random walk: then more rollouts, other start states or a better judge help, and a
larger learning rate does not.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from worldenv import report
from worldenv.checkpoint import CheckpointError
from worldenv.learning.loop.update import Learner, advantages
from worldenv.run import Run, RunError, settings_of
from worldenv.stages.desk import Desk
from worldenv.stages.loop import assignments_of, practice_of

ITERATION = 1 << 12
"""Its start states and rollout numbers: no run has so many iterations."""


def signal(gradients: torch.Tensor, contexts: int) -> float:
    """Signal over noise of the mean of `contexts` groups, from the gradients (n, P) of n others; about 0, also below it, where there is none.

    ValueError where fewer than 2 groups have a gradient.
    """
    if int((gradients != 0).any(1).sum()) < 2:
        raise ValueError(f"of {len(gradients)} groups fewer than 2 have returns that differ: nothing to measure; raise --contexts or --hard-share")
    kept = gradients[:, gradients.abs().sum(0) > 0].double()
    kept = kept / kept.pow(2).mean(0).sqrt()
    noise = float(kept.var(0).sum())
    return contexts * (float(kept.mean(0).pow(2).sum()) - noise / len(kept)) / noise


def measure(desk: Desk, contexts: int) -> dict[str, Any]:
    """Rollouts of the fine-tuned policy from the run's start states, and what `signal` says of their groups' gradients for `contexts` groups."""
    settings = desk.settings.loop
    learner = Learner(desk.policy("scale"), settings, desk.seed)
    practice = practice_of(desk, learner.policy, desk.run.folder("loop"))
    with desk.flights(practice.fleet.replicas, practice.threshold) as flights:
        rollouts = sorted((flight.rollout() for flight in flights.fly(assignments_of(desk, ITERATION))), key=lambda one: one.number)
    groups = [rollouts[n : n + settings.group] for n in range(0, len(rollouts), settings.group)]
    gradients = [learner.gradient(some, advantages(some)) for some in groups]
    stopped = np.array([[one.stopped for one in some] for some in groups])
    return {
        "groups": len(groups),
        "success": float(stopped.mean()),
        "differing": float((stopped.any(1) & ~stopped.all(1)).mean()),
        **{name: signal(torch.stack([one[name] for one in gradients]), contexts) for name in ("lora", "action_head")},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """A line for people, then one JSON line. Exit code 0; 2 with one line where there is no such run or nothing to measure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loop_signal", description="Signal and noise of an iteration of LOOP.")
    parser.add_argument("run", type=Path, help="folder of a run with stage reward done")
    parser.add_argument("--contexts", type=int, default=96, help="groups to measure with")
    parser.add_argument("--true", action="store_true", help="in the true environment, by the predicate")
    parser.add_argument("--factor", type=float, help="loop.scale_factor; the run's by default")
    parser.add_argument("--hard-share", type=float, help="loop.hard_share; the run's by default")
    args = parser.parse_args(argv)
    try:
        settings = settings_of(args.run)
        changed: dict[str, Any] = {"contexts": args.contexts, "batch": settings.loop.group, "control": "true-simulator" if args.true else "none"}
        changed |= {"scale_factor": args.factor} if args.factor is not None else {}
        changed |= {"hard_share": args.hard_share} if args.hard_share is not None else {}
        loop = dataclasses.replace(settings.loop, **changed)
        eager = dataclasses.replace(settings.engines, back_end="eager")  # which also writes nothing into the run
        row = measure(Desk(Run(args.run, dataclasses.replace(settings, loop=loop, engines=eager), leads=False)), settings.loop.contexts)
    except (ValueError, RunError, CheckpointError) as error:
        print(f"benchmarks.loop_signal: {error}", file=sys.stderr)
        return 2
    where = "true environment" if args.true else "imagined world"
    print(
        f"{where}, scale x{loop.scale_factor:g}, hard share {loop.hard_share:g}: success {row['success']:.3f}, outcomes differ in "
        f"{row['differing']:.1%} of {row['groups']} groups\n"
        f"signal over noise in an iteration of {settings.loop.contexts} groups: {row['lora']:.3f} (LoRA), {row['action_head']:.3f} (head)"
    )
    print(json.dumps({"benchmark": "loop_signal", "true": args.true, **{n: getattr(loop, n) for n in ("scale_factor", "hard_share")}, **row,
                      "contexts": settings.loop.contexts, "commit": report.commit()}))  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

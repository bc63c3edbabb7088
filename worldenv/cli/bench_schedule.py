"""worldenv-bench plan, scheduler and rollout: cases with flags of their own, whose rows hold more than one number."""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch

from worldenv.benchmarks import bench_plan, bench_rollout, bench_scheduler, harness
from worldenv.cli.arguments import parse

NAMES = ("plan", "scheduler", "rollout")


def run(argv: Sequence[str], program: str) -> int:
    """`argv` starts with one of NAMES. Lines for people, then one line of JSON.

    Returns the exit code: 1 where rollouts that should be identical are not. ValueError for a bad command line or a plan that does not fit.
    """
    if argv[0] == "plan":
        lines, row = bench_plan.plan(parse(program, bench_plan.PlanArgs, bench_plan.PlanArgs(), argv[1:]))
    elif argv[0] == "rollout":
        lines, row = bench_rollout.measure(parse(program, bench_rollout.RolloutArgs, bench_rollout.RolloutArgs(), argv[1:]))
    else:
        lines, row = bench_scheduler.measure(parse(program, bench_scheduler.SchedulerArgs, bench_scheduler.SchedulerArgs(), argv[1:]))
    print(*lines, sep="\n")
    device = torch.device(row.get("device", "cpu"))
    record = {"rows": [row], "machine": harness.machine(device), "versions": harness.versions(), "commit": harness.commit()}
    print(json.dumps(record, allow_nan=False))
    return 0 if row.get("same_rollouts", True) else 1

"""worldenv-bench plan, scheduler and rollout: cases with flags of their own, whose rows hold more than one number."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

import torch

from worldenv.benchmarks import bench_plan, bench_rollout, bench_scheduler, harness
from worldenv.cli.arguments import parse

NAMES = ("plan", "scheduler", "rollout")


def main(argv: Sequence[str]) -> int:
    """`argv` starts with one of NAMES. Lines for people, then one line of JSON.

    Exit code 1 where rollouts that should be identical are not, 2 for a bad command line or a plan that does not fit.
    """
    program = f"worldenv-bench {argv[0]}"
    try:
        if argv[0] == "plan":
            lines, row = bench_plan.plan(parse(program, bench_plan.PlanArgs, bench_plan.PlanArgs(), argv[1:]))
        elif argv[0] == "rollout":
            lines, row = bench_rollout.measure(parse(program, bench_rollout.RolloutArgs, bench_rollout.RolloutArgs(), argv[1:]))
        else:
            lines, row = bench_scheduler.measure(parse(program, bench_scheduler.SchedulerArgs, bench_scheduler.SchedulerArgs(), argv[1:]))
    except ValueError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    print(*lines, sep="\n")
    device = torch.device(row.get("device", "cpu"))
    record = {"rows": [row], "machine": harness.machine(device), "versions": harness.versions(), "commit": harness.commit()}
    print(json.dumps(record, allow_nan=False))
    return 0 if row.get("same_rollouts", True) else 1

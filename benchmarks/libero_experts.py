"""How often do LIBERO's scripted experts succeed, and in how many steps?

    python -m benchmarks.libero_experts --episodes 10     adds what is missing to benchmarks/results/libero_experts.jsonl, then prints the table
    python -m benchmarks.libero_experts --table           prints the table, and nothing else

The ceiling is every episode, and the suite's step limit (220, 280, 300, 520 control steps after 10 settling steps). An episode starts in a published
initial state, 0 upwards; the experts were tuned on others. Success is LIBERO's own predicate, the first time that it holds. `stays` counts the
successes that still hold 30 steps later, when the gripper has let go and moved away. Nothing is drawn. Episodes of another version of the experts
are measured anew: a row has a hash of their code, comments and docstrings apart. The table shows the newest row of each episode; (1) marks a task
of which one is of an earlier version.
"""

from __future__ import annotations

import ast
import contextlib
import datetime
import functools
import hashlib
import json
import multiprocessing
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from worldenv import console, noise, report
from worldenv.benchmarks import harness
from worldenv.cli.arguments import parse
from worldenv.cli.ending import Ending
from worldenv.config import LIBERO_TEST_STATES
from worldenv.envs import libero
from worldenv.envs.experts import libero as expert
from worldenv.envs.experts import libero_scene
from worldenv.envs.libero import Libero, Suite

RESULTS = Path(__file__).parent / "results" / "libero_experts.jsonl"

_AFTER = 30  # steps past success, for letting go
_SEED = 0


@dataclass(frozen=True)
class ExpertsArgs:
    """Which episodes are wanted."""

    episodes: int = 10
    """Published initial states per task, from 0."""
    processes: int = 1
    """Episodes of different tasks at the same time."""
    only: str = ""
    """Only tasks whose suite or instruction contains this."""
    results: Path = RESULTS
    """Where rows are added."""
    table: bool = False
    """Print the table of what is there, and nothing else."""

    def __post_init__(self) -> None:
        if not 1 <= self.episodes <= LIBERO_TEST_STATES or self.processes < 1:
            raise ValueError(f"episodes={self.episodes}, processes={self.processes}: want 1 to {LIBERO_TEST_STATES}, and at least 1 process")


def version() -> str:
    """Hash of the experts' code; comments, docstrings and layout do not count."""
    digest = hashlib.sha256()
    for module in (expert, libero_scene):
        tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                node.body = [line for line in node.body if not (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))]
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()[:12]


def play(env: Libero, task: int, index: int) -> dict[str, Any]:
    """One episode from published state `index`: `steps` until the predicate holds (None: never), and whether it `stays`."""
    manner = noise.uniform(_SEED, task * LIBERO_TEST_STATES + index, 0, 0, noise.Stream.DEMOS, (expert.VARIATION,))
    env.begin(task, "test", index)
    row = {"suite": env.suite, "task": task, "index": index, "steps": None, "stays": False}
    for step in range(env.steps):
        if env.advance(expert.command(env, manner), render=False).success:
            row["steps"] = step + 1
            for _ in range(_AFTER):
                row["stays"] = env.advance(expert.command(env, manner), render=False).success
            break
    return row


def _measure(results: Path, code: str, work: tuple[Suite, int, tuple[int, ...]]) -> int:
    suite, task, indices = work
    env = Libero(suite, pictures=False)
    where = {"commit": report.commit(), "machine": harness.machine(torch.device("cpu")), "versions": harness.versions()}
    for index in indices:
        row = {"benchmark": "libero_experts", **play(env, task, index), "expert": code, **where}
        row["date"] = datetime.datetime.now(datetime.UTC).date().isoformat()
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    env.close()
    return len(indices)


def read(results: Path) -> list[dict[str, Any]]:
    """The newest row of each episode; a file's rows stand in the order in which they were added."""
    if not results.is_file():
        return []
    rows: list[dict[str, Any]] = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    return list({(row["suite"], row["task"], row["index"]): row for row in rows}.values())


def table(rows: Iterable[Mapping[str, Any]], code: str) -> str:
    """All tasks as Markdown, those without an expert named, those with a row that is not of version `code` marked, and a line for each suite."""
    lines = ["| suite | task | success | stays | mean steps | min-max | limit |", "|---|---|---|---|---|---|---|"]
    found = list(rows)
    for suite in libero.SUITES:
        for task, instruction in enumerate(libero.instructions(suite)):
            some = [row for row in found if (row["suite"], row["task"]) == (suite, task)]
            steps = [row["steps"] for row in some if row["steps"] is not None]
            start = f"| {suite} | {task} {instruction} |"
            if task not in expert.TASKS[suite]:
                lines.append(f"{start} no expert | | | | |")
            elif some:
                spread = f"{np.mean(steps):.0f} | {min(steps)}-{max(steps)}" if steps else "|"
                mark = "" if all(row["expert"] == code for row in some) else " (1)"
                lines.append(f"{start} {len(steps)}/{len(some)}{mark} | {sum(row['stays'] for row in some)} | {spread} | {libero.STEPS[suite]} |")
        some = [row for row in found if row["suite"] == suite]
        tasks = len({row["task"] for row in some})
        lines.append(f"| **{suite}** | {tasks} tasks | {sum(row['steps'] is not None for row in some)}/{len(some)} | | | | |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when all is measured or the table printed, 1 where LIBERO is not there, 2 for a bad command line."""
    with Ending("benchmarks.libero_experts") as ending:
        args = parse("benchmarks.libero_experts", ExpertsArgs, ExpertsArgs(), sys.argv[1:] if argv is None else argv)
        names = {suite: libero.instructions(suite) for suite in libero.SUITES}
        code = version()
        if not args.table:
            there = {(row["suite"], row["task"], row["index"]) for row in read(args.results) if row["expert"] == code}
            work = [
                (suite, task, missing)
                for suite in libero.SUITES
                for task in expert.TASKS[suite]
                if args.only in suite or args.only in names[suite][task]
                if (missing := tuple(i for i in range(args.episodes) if (suite, task, i) not in there))
            ]
            measure = functools.partial(_measure, args.results, code)
            done: Iterator[int]
            with contextlib.ExitStack() as stack:
                if args.processes > 1:
                    done = stack.enter_context(multiprocessing.get_context("spawn").Pool(args.processes)).imap_unordered(measure, work)
                else:
                    done = map(measure, work)
                for _ in console.track(0, len(work), "tasks"):
                    next(done)
        rows = read(args.results)
        print(table(rows, code))
        successes = sum(row["steps"] is not None for row in rows)
        print(json.dumps({"benchmark": "libero_experts", "expert": code, "episodes": len(rows), "successes": successes}))
    return ending.code


if __name__ == "__main__":
    raise SystemExit(main())

"""worldenv-bench: how fast, against what, and how far from the machine's limit."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import tyro

from worldenv import console
from worldenv.benchmarks import cases, compile_kernels, harness
from worldenv.cli import bench_schedule
from worldenv.cli.arguments import parse
from worldenv.cli.ending import Ending
from worldenv.devices import architectures
from worldenv.nouns import no_such


@dataclass(frozen=True)
class BenchArgs:
    """Measure cases against their baselines in one run: a table, then one line of JSON. Exit code 1 where something computes wrong numbers."""

    case: tyro.conf.Positional[tuple[str, ...]] = ()
    """Cases: copy, matmul (this machine's ceilings), simulator_unet, vae, chunk_loop, hoisting (counted, not timed), reflector, kernels, maps,
    engines. Alone,
    with flags of their own: plan, scheduler, rollout."""
    device: str = "auto"
    """auto takes cuda where there is one, else cpu."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of weights and activations; auto: bfloat16 on a GPU, else float32."""
    size: Literal["auto", "tiny", "published"] = "auto"
    """Networks of the tiny preset or of the published sizes, with random weights; auto: published on a GPU, else tiny."""
    preset: Literal["", "tiny"] = ""
    """With engines: this preset's networks, as --size tiny."""
    threads: int | None = None
    """Threads of one operation on the CPU; as many as torch chooses where not given."""
    only: Annotated[str, tyro.conf.arg(metavar="WORD,...")] = ""
    """Of a case's variants, those whose name contains one of these words."""
    pairs: int = 15
    """Pairs of calls, at most."""
    seconds: float = 30.0
    """A measurement ends after this, and at least 3 pairs [s]."""
    compile_only: bool = False
    """With kernels: compile each for --arch and say what it takes, on any machine; nothing is run."""
    arch: Annotated[str, tyro.conf.arg(metavar="SM,...")] = "sm_90"
    """With --compile-only: sm_80, sm_86, sm_89, sm_90, sm_100, sm_120."""


def _compile_only(args: BenchArgs) -> int:
    """Exit code 1 where a kernel spills. ValueError as `compile_kernels.compile_all`."""
    if args.case != ("kernels",):
        raise ValueError(f"--compile-only goes with kernels alone, not with {', '.join(args.case)}")
    rows = []
    for row in compile_kernels.compile_all(architectures(args.arch), [word for word in args.only.split(",") if word]):
        print(f"{row.arch:8} {row.registers:4} registers {row.shared_bytes:6} B shared {row.spill_bytes:4} B spilled  {row.kernel}", flush=True)
        rows.append(dataclasses.asdict(row))
    print(json.dumps({"rows": rows, "versions": harness.versions(), "commit": harness.commit()}))
    return 1 if any(row["spill_bytes"] for row in rows) else 0


def _measure(args: BenchArgs) -> int:
    """Exit code 1 where a parity failed. ValueError for what cannot be measured."""
    known = (*cases.CASES, *bench_schedule.NAMES)
    if not args.case:
        raise ValueError(f"name a case: {', '.join(known)}")
    for name in args.case:
        if name in bench_schedule.NAMES:
            raise ValueError(f"{name} has flags of its own: worldenv-bench {name} ..., by itself")
        if name not in known:
            raise no_such("case", name, known)
    if args.compile_only:
        return _compile_only(args)
    if args.pairs < 1:
        raise ValueError(f"--pairs {args.pairs}: want at least 1")
    if not args.seconds >= 0.0:  # what is no number is refused too
        raise ValueError(f"--seconds {args.seconds}: want 0 or more")
    if args.preset and args.size not in ("auto", args.preset):
        raise ValueError(f"--preset {args.preset} and --size {args.size}: choose one")
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"--threads {args.threads}: want at least 1")
        torch.set_num_threads(args.threads)
    setting = harness.Setting.on(
        args.device, dtype=None if args.dtype == "auto" else getattr(torch, args.dtype),
        size=args.preset or (None if args.size == "auto" else args.size), pairs=args.pairs, seconds=args.seconds,
    )  # fmt: skip
    rows = []
    for row in cases.run(args.case, setting, [word for word in args.only.split(",") if word]):
        unmeasured = f"wrong numbers, {row.note}" if row.parity == "fail" else row.note
        console.say(f"{row.case}: {unmeasured if row.value is None else f'{row.value:.4g} {row.unit}'}")
        rows.append(row)
    print(*harness.table(rows), sep="\n")
    print(harness.line(rows, setting))
    return 1 if any(row.parity == "fail" for row in rows) else 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0, 1 where a parity failed or there was no room, 2 for a bad command line."""
    argv = sys.argv[1:] if argv is None else argv
    alone = bool(argv) and argv[0] in bench_schedule.NAMES
    program = f"worldenv-bench {argv[0]}" if alone else "worldenv-bench"
    with Ending(program) as ending:
        ending.code = bench_schedule.run(argv, program) if alone else _measure(parse(program, BenchArgs, BenchArgs(), argv))
    return ending.code


if __name__ == "__main__":
    raise SystemExit(main())

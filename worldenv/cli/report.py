"""worldenv-report: make a run's page anew, compare two runs, or show how the episodes of a set ended."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from worldenv import report
from worldenv.cli.arguments import parse
from worldenv.cli.ending import Ending
from worldenv.data.episode import EpisodeSet
from worldenv.report import findings, tables


@dataclass(frozen=True)
class ReportArgs:
    """Show what a run found and make its report.html anew from report.json and the stored plots and videos; or compare two runs; or draw how the
    episodes of a set ended."""

    run: tyro.conf.Positional[Path | None] = None
    """Folder of a run."""
    compare: Annotated[tuple[Path, Path] | None, tyro.conf.arg(metavar="A B")] = None
    """Two folders or report.json files: print the fields that differ, times and memory aside; exit 1 if there are any."""
    episodes: Path | None = None
    """A folder of episodes (demonstrations, exploration): lengths of successes and failures, their cumulative distribution, and outcomes by task,
    as figures and statistics.json in --out."""
    out: Path | None = None
    """With --episodes: where to write; if not given, FOLDER/statistics."""


_THERE = "they lie in RUN/stages/demos and RUN/stages/explore"


def _compare(left: Path, right: Path) -> int:
    found = list(report.differences(report.comparable(report.read(left)), report.comparable(report.read(right))))
    print(*found, sep="\n", end="\n" if found else "")
    print(json.dumps({"left": str(left), "right": str(right), "differences": len(found)}))
    return 1 if found else 0


def _episodes(folder: Path, out: Path) -> int:
    if not folder.is_dir():
        raise ValueError(f"--episodes {folder}: no such folder; {_THERE}")
    if not (entries := EpisodeSet(folder).entries):
        kind = "the folder of a run, not of episodes" if (folder / "run.json").is_file() else "no episodes there (000000.npz and so on)"
        raise ValueError(f"--episodes {folder}: {kind}; {_THERE}")
    told = report.write_outcomes(out, report.lengths_by_outcome(entries))
    for outcome in ("successes", "failures"):
        lengths = told[outcome]
        words = "" if not lengths["episodes"] else ", {mean:.1f} steps on average (10 % {p10:.0f}, half {p50:.0f}, 90 % {p90:.0f})".format(**lengths)
        print(f"{outcome:10}{lengths['episodes']:6}{words}")
    for task, counts in told["by_task"].items():
        print(f"  {counts['successes']:5} of {sum(counts.values()):5}  {task}")
    print(json.dumps({"episodes": str(folder), "out": str(out), **told}))
    return 0


def _show(run: Path) -> int:
    page = report.rebuild(run)
    record = report.read(run)
    print(findings.verdict(record), findings.imagined_beside_true(record), sep="\n")
    for make in (tables.success, tables.success_by_task, tables.imagined, tables.imagined_before, tables.reflector, tables.stages):
        if (table := make(record)) is not None:
            print("", *tables.for_terminal(table), sep="\n")
    print()
    unverified = {"unverified": True} if "unverified" in record else {}
    print(json.dumps({"page": str(page), "seconds": record["seconds_total"], "paired": record["eval"]["paired"], **unverified}))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0, 1 where compared runs differ or the disk refuses, 2 where the arguments or the files are no good."""
    with Ending("worldenv-report") as ending:
        args = parse("worldenv-report", ReportArgs, ReportArgs(), sys.argv[1:] if argv is None else argv)
        if sum(one is not None for one in (args.run, args.compare, args.episodes)) != 1 or (args.out and not args.episodes):
            raise ValueError("give the folder of a run, or --compare A B, or --episodes FOLDER [--out FOLDER]")
        if args.run is not None:
            ending.code = _show(args.run)
        if args.compare is not None:
            ending.code = _compare(*args.compare)
        if args.episodes is not None:
            ending.code = _episodes(args.episodes, args.out or args.episodes / "statistics")
    return ending.code


if __name__ == "__main__":
    raise SystemExit(main())

"""python -m worldenv.cli.convert: episodes from one format into another. Done once for a data set, so no command of its own."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from worldenv import console
from worldenv.cli import files
from worldenv.cli.arguments import parse
from worldenv.cli.ending import Ending
from worldenv.data import convert


@dataclass(frozen=True)
class ConvertArgs:
    """Convert episodes: from our folders, LeRobot data sets (v2.0, v2.1, v3.0) and LIBERO's HDF5 files, which are told apart by what they hold."""

    choices: Annotated[convert.Choices, tyro.conf.arg(name="")]
    """What else there is to say."""
    source: tyro.conf.Positional[Path | None] = None
    """A folder, or one HDF5 file."""
    to: convert.Format = "episodes"
    """The format that is written."""
    out: Path | None = None
    """Where; it must not be there yet."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0, 1 where the disk refuses, 2 where the arguments or the files are no good."""
    with Ending("convert") as ending:
        args = parse("python -m worldenv.cli.convert", ConvertArgs, ConvertArgs(convert.Choices()), sys.argv[1:] if argv is None else argv)
        if args.source is None or args.out is None:
            raise ValueError("want SOURCE and --out; see --help")
        ending.stopped = "; nothing was written"
        with files.written(args.out):
            done = convert.convert(args.source, args.to, args.out, args.choices)
        for what in done["left_out"]:
            console.say(f"convert: left out {what}")
        if done["left_out"]:
            console.say(f"convert: left out {len(done['left_out'])} unfit, wrote {done['episodes']}")
        if not done["successes"]:
            console.say(f"convert: no episode of {args.source} shows success, and a run takes no demonstration without it")
        print(json.dumps(done))
    return ending.code


if __name__ == "__main__":
    raise SystemExit(main())

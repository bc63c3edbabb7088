"""worldenv-doctor: what is here, what is missing, and the cure."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from worldenv import doctor
from worldenv.cli.arguments import parse
from worldenv.cli.ending import Ending
from worldenv.doctor import Topic
from worldenv.envs import libero_install


@dataclass(frozen=True)
class DoctorArgs:
    """Try what worldenv needs on this machine; `worldenv-doctor libero` draws a frame of each suite. Fails only for what was asked."""

    topics: tyro.conf.Positional[tuple[Topic, ...]] = ("core",)
    """What must work: core, libero, gpu, tensorrt. Anything else is looked at, and may be missing."""
    install_assets: bool = False
    """First put LIBERO's assets in place, from the folder or archive in WORLDENV_LIBERO_ASSETS, or by download."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 where all that was asked works, 1 where some of it does not, 2 for a bad command line."""
    with Ending("worldenv-doctor") as ending:
        args = parse("worldenv-doctor", DoctorArgs, DoctorArgs(), sys.argv[1:] if argv is None else argv)
        if args.install_assets:
            print(f"assets: {libero_install.install_assets()}", flush=True)
        found = []
        for one in doctor.examine(args.topics):
            found.append(one)
            optional = one.state == "ok" or one.topic in args.topics
            print(f"{one.state:7}  {one.topic:8}  {one.name:14}  {one.detail}{'' if optional else '  (not asked for)'}", flush=True)
            if one.cure and one.topic in args.topics:
                print(f"{'':7}  cure: {one.cure}", flush=True)
        failed = [one.name for one in found if one.state != "ok" and one.topic in args.topics]
        print(json.dumps({"asked": list(args.topics), "failed": failed, "findings": [one.plain() for one in found]}))
        ending.code = 1 if failed else 0
    return ending.code


if __name__ == "__main__":
    raise SystemExit(main())

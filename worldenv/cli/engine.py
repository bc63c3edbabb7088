"""worldenv-engine: build, list, verify and throw away compiled networks, for this machine and for others."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from worldenv import compiled, console
from worldenv.benchmarks import engine_rows
from worldenv.cli import files
from worldenv.cli.arguments import parse
from worldenv.cli.ending import Ending
from worldenv.devices import ARCHITECTURES
from worldenv.engines import backend, parity
from worldenv.engines.recipe import EngineError
from worldenv.engines.store import DEFAULT_STORE, Store

NEVER_RUN = "built, never run"
_OLDEST = 75
"""Turing: the oldest architecture that TensorRT builds for."""
"""Of a plan for another machine: nothing is known of what it computes."""


@dataclass(frozen=True)
class _Where:
    store: Path | None = None
    """Folder of the plans; by default runs/engines."""
    limit_gb: float = 20.0
    """Plans are kept up to this; those used longest ago go first [GB]."""

    def open(self) -> Store:
        """The store. ValueError for a limit that is none."""
        if not 0 < self.limit_gb < math.inf:
            raise ValueError(f"--limit-gb {self.limit_gb}: want a size above 0")
        return Store(self.store or DEFAULT_STORE, int(self.limit_gb * 1e9))

    def there(self) -> Store:
        """The store that was named, which is there, or the default one, in which there may be nothing yet. ValueError as `open`, and for none."""
        if self.store is not None and not (self.store / "plans").is_dir():
            raise ValueError(f"--store {self.store}: no store there; build makes one (plans of a run: RUN/engines)")
        return self.open()


@dataclass(frozen=True)
class BuildArgs(_Where):
    """Build engines, compare each with eager where it can run here, and print what was found. Exit code 1 where one could not be built or failed."""

    preset: str = "tiny"
    """Whose networks: the preset's sizes, with random weights; with --run, that run's."""
    run: Path | None = None
    """Take the networks of this run (stages scale, world, reward)."""
    size: Literal["preset", "narrow", "published"] = "preset"
    """narrow: the published models' layer widths, few layers; published: their full sizes (the U-Net alone took 16 GB of memory to build)."""
    back_end: Annotated[str, tyro.conf.arg(metavar="NAME,...")] = "auto"
    """eager, onnxruntime, inductor, tensorrt, tensorrt_rtx, torch_tensorrt; auto: this machine's, or tensorrt_rtx for other architectures."""
    arch: Annotated[str, tyro.conf.arg(metavar="SM,...")] = "here"
    """Of the GPUs to build for: sm_80, sm_86, sm_89, sm_90, sm_100, sm_120; here: this machine."""
    only: Annotated[str, tyro.conf.arg(metavar="WORD,...")] = ""
    """Engines whose name contains one of these words."""
    precision: Literal["auto", "fp32", "bf16", "fp8"] = "auto"
    """auto: fp32 on a CPU, bf16 for GPUs."""


@dataclass(frozen=True)
class ListArgs(_Where):
    """List the plans that are there, with their parity."""


@dataclass(frozen=True)
class VerifyArgs(_Where):
    """Check every byte of every plan. Exit code 1 where one is damaged."""

    remove: bool = False
    """Remove what is damaged: it is built anew when it is wanted."""


@dataclass(frozen=True)
class GcArgs(_Where):
    """Remove the plans used longest ago until the rest fit --limit-gb, and what killed builds left."""


def _names(args: BuildArgs, here: bool) -> list[str]:
    """ValueError for a back end that there is not."""
    if args.back_end != "auto":
        names = [name for name in args.back_end.split(",") if name]
        for name in names or [args.back_end]:
            backend.back_end(name)
        return names
    return list(backend.AUTOMATIC["cuda" if torch.cuda.is_available() else "cpu"]) if here else ["tensorrt_rtx"]


def _architectures(names: str) -> list[str]:
    """ValueError for one that no back end builds for."""
    found = [name for name in names.split(",") if name]
    if odd := [name for name in found or [names] if not re.fullmatch(r"sm_\d{2,3}", name) or int(name[3:]) < _OLDEST]:
        raise ValueError(f"--arch {odd[0]}: want here alone, or those of GPUs, sm_{_OLDEST} and later, such as {', '.join(ARCHITECTURES)}")
    return found


def build(args: BuildArgs) -> int:
    """See BuildArgs."""
    here = args.arch == "here"
    store, archs, names = args.open(), ["here"] if here else _architectures(args.arch), _names(args, here)  # said before networks are made
    device = torch.device("cuda" if torch.cuda.is_available() and here else "cpu")
    precision = args.precision if args.precision != "auto" else "bf16" if not here or device.type == "cuda" else "fp32"
    words = [word for word in args.only.split(",") if word]
    subject = engine_rows.subject(args.preset, args.size, args.run, device, precision)
    if lost := [word for word in words if not any(word in one.name for one in subject.networks)]:
        raise ValueError(f"--only {lost[0]}: there are {', '.join(one.name for one in subject.networks)}")
    networks = [one for one in subject.networks if not words or any(word in one.name for word in words)]
    if precision == "fp8" and not any(one.recipe.precision == "fp8" for one in networks):
        raise ValueError(f"--precision fp8: is the U-Net's alone, which --only {args.only} leaves out; want bf16")
    rows = []
    recorded = subject.recorded() if here else {}
    for arch in archs:
        for name in names:
            made = []
            for network in networks:
                row: dict[str, Any] = {"engine": network.name, "back_end": name, "arch": arch, "precision": network.recipe.precision}
                try:
                    if here:
                        choice = compiled.built(network, name, store, device, recorded[network.name], timed=True)
                        assert choice.parity is not None
                        assert choice.plan is not None
                        made.append(choice)
                        row |= choice.parity.plain() | {"seconds": choice.plan.seconds, "bytes": choice.plan.bytes}
                        said = choice.parity.said
                    else:
                        plan = backend.planned(name, network.plain(), network.recipe, arch, store)
                        row |= {"state": NEVER_RUN, "seconds": plan.seconds, "bytes": plan.bytes}
                        said = f"{NEVER_RUN}, {plan.bytes / 1e6:.1f} MB in {plan.seconds:.0f} s"
                except EngineError as error:
                    row["error"] = said = str(error)
                console.say(f"{network.name:22} {name:13} {arch:7} {network.recipe.precision:4} {said}")
                rows.append(row)
            rows += _closed_loop(subject, store, made)
    print(json.dumps({"store": str(store.root), "rows": rows}, allow_nan=False))
    return 1 if any("error" in row or row.get("passed") is False for row in rows) else 0


def _closed_loop(subject: engine_rows.Subject, store: Store, made: Sequence[compiled.Choice]) -> list[dict[str, Any]]:
    """What a closed loop of chunks says of the simulator's engines, where all of them were made here."""
    mine = [one for one in made if one.network.recipe.loop_tolerance is not None]
    if subject.simulator is None or len(mine) < len(parity.LOOP_CHUNKS):
        return []
    checked = compiled.checked_loop(subject.simulator, mine, store, subject.frame)
    found = next(one.parity for one in checked if one.parity is not None)
    loop = found.plain()["loop"]
    said = ", ".join(f"{error:.1e} after {chunks}" for chunks, error in found.loop.items())
    console.say(f"{'simulator, closed loop':22} {mine[0].engine.back_end:13} {'here':7} chunks: {said}, limit {found.loop_tolerance:.0e}")
    return [{"engine": "simulator, closed loop", "back_end": mine[0].engine.back_end, "loop": loop, "passed": found.passed}]


def listed(args: ListArgs) -> int:
    """See ListArgs."""
    store = args.there()
    rows = []
    for key, one in store.index().items():
        try:
            found = store.parity(key)
        except EngineError as error:
            found, state = None, str(error)
        else:
            state = "" if one["back_end"] in ("graph", "?") else NEVER_RUN
        if found is not None:
            state = f"{'passed' if found['passed'] else 'FAILED'}, error {found['max_rel_error']}, limit {found['tolerance']}"
        print(f"{key[:12]}  {one['engine']:22} {one['back_end']:13} {one['arch']:18} {one['bytes'] / 1e6:9.1f} MB  {state}".rstrip())
        rows.append({"key": key, **one, "parity": found})
    print(json.dumps({"store": str(store.root), "plans": rows}))
    return 0


def verify(args: VerifyArgs) -> int:
    """See VerifyArgs."""
    store, damaged = args.there(), []
    keys = store.keys()
    for key in keys:
        try:
            store.read(key)
        except EngineError as error:
            if not store.folder(key).exists():  # another process has thrown it away
                continue
            then = "--remove removes it" if not args.remove else "removed" if store.remove(key) else "a run is using it: left"
            print(f"worldenv-engine: {error}; {then}", file=sys.stderr)
            damaged.append(key)
    print(json.dumps({"plans": len(keys), "damaged": damaged}))
    return 1 if damaged else 0


def gc(args: GcArgs) -> int:
    """See GcArgs."""
    gone = args.there().gc()
    print(json.dumps({"removed": gone}))
    return 0


COMMANDS: dict[str, tuple[type[Any], Callable[[Any], int]]] = {
    "build": (BuildArgs, build),
    "list": (ListArgs, listed),
    "verify": (VerifyArgs, verify),
    "gc": (GcArgs, gc),
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command; exit code 0, 1 where an engine failed, 2 for a bad command line."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in COMMANDS:
        said = "worldenv-engine build|list|verify|gc, each with --help"
        if argv and argv[0] in ("--help", "-h"):
            print(said)
            return 0
        print(f"worldenv-engine: want a command: {said}", file=sys.stderr)
        return 2
    kind, command = COMMANDS[argv[0]]
    with Ending("worldenv-engine") as ending:
        ending.stopped = "; plans that were built whole are kept"
        args = parse(f"worldenv-engine {argv[0]}", kind, kind(), argv[1:])
        with files.written(args.store or DEFAULT_STORE, flag="--store", then=", or choose another --store"):
            ending.code = command(args)
    return ending.code


if __name__ == "__main__":
    raise SystemExit(main())

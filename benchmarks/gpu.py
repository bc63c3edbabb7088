"""`python -m benchmarks.gpu [--only NAME,...] [--resume]`: build, test and measure on one NVIDIA GPU, in under 9 minutes, from a bare checkout.

Parts run one after another, each in a process of its own with a time limit, so that one that fails, hangs or runs out of memory costs
itself alone. A row is appended to benchmarks/results/<gpu>.jsonl as soon as it is measured: one line of JSON like worldenv-bench's, with
the part and the date. `--resume` skips the parts that this commit has finished here. Exit code 0 where all parts that were asked for
passed, 1 where one failed or there was no time for it, 2 for a bad command line.
Nothing is downloaded; of packages only torch and numpy must be there: whatever needs another one is skipped by name.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from worldenv.benchmarks import harness
from worldenv.benchmarks.harness import ROOT, Row, Setting
from worldenv.nouns import no_such

_TOTAL_S = 530.0
"""Under 9 minutes, with what it takes to start and to end."""
_MEMORY_GB = 80.0
_MEASURED_S = 12.0
"""Of one row's pairs."""
_CORE = "worldenv._core"


@dataclass(frozen=True)
class Part:
    """One process."""

    name: str
    limit_s: float
    """It is ended after this."""
    cases: tuple[str, ...] = ()
    """Of benchmarks.cases."""
    only: str = ""
    """Of their variants, those whose name contains this."""


PARTS = (
    # In the order of what is missed most where there is time for few: the denoising step as runs make it, then kernels, then the other networks
    Part("build", 120.0),
    Part("ceilings", 40.0, ("copy", "matmul")),
    Part("engines_unet_320x512", 400.0, ("engines",), "simulator_unet 320x512"),
    Part("kernels", 150.0, ("kernels",)),
    Part("tests", 240.0),
    Part("engines_vae_320x512", 300.0, ("engines",), "coder 320x512"),
    Part("chunk_loop_320x512", 150.0, ("chunk_loop",), "320x512"),
    Part("engines_llm", 400.0, ("engines",), "reflector_llm"),
    Part("engines_policy_backbone", 400.0, ("engines",), "policy_backbone"),
    Part("engines_vision", 200.0, ("engines",), "reflector_vision"),
    Part("engines_policy_heads", 200.0, ("engines",), "policy_heads"),
    Part("engines_unet_256x256", 400.0, ("engines",), "simulator_unet 256x256"),
    Part("simulator_unet_320x512", 90.0, ("simulator_unet",), "320x512"),
    Part("vae_320x512", 90.0, ("vae",), "320x512"),
    Part("engines_vae_256x256", 300.0, ("engines",), "coder 256x256"),
    Part("engines_unet_of_one_shape", 400.0, ("engines",), "simulator_unet of one shape"),
    Part("chunk_loop_256x256", 120.0, ("chunk_loop",), "256x256"),
    Part("simulator_unet_256x256", 90.0, ("simulator_unet",), "256x256"),
    Part("vae_256x256", 60.0, ("vae",), "256x256"),
)


def device_name(device: torch.device) -> str:
    """As it is written in file names: "nvidia-h100-80gb-hbm3"."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


# The parts, each in its own process


def _pybind_include() -> str:
    """pybind11's headers: the package's, or those that come with torch."""
    if importlib.util.find_spec("pybind11") is not None:
        import pybind11

        return str(pybind11.get_include())
    return str(Path(torch.__file__).parent / "include")


def build() -> str:
    """Make worldenv._core as this machine can: by pip where worldenv is installed, else with the compiler alone, beside the package.

    Raises RuntimeError where neither works.
    """
    try:
        importlib.metadata.distribution("worldenv")
    except importlib.metadata.PackageNotFoundError:
        return compile_beside(ROOT)
    command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-build-isolation", "--no-deps", "-e", str(ROOT)]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"pip install -e . failed: {done.stderr.strip()[-500:]}")
    return "pip"


def compile_beside(root: Path) -> str:
    """The extension of the checkout at `root`, from its sources, by the compiler alone; returns it. RuntimeError if it fails."""
    compiler = next((found for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++") if name and (found := shutil.which(name))), None)
    if compiler is None:
        raise RuntimeError("no C++ compiler: install g++ 12 or later, or set CXX")
    sources = sorted(str(path) for folder in ("core", "onnxruntime", "bindings") for path in (root / "csrc" / folder).glob("*.cpp"))
    target = root / "worldenv" / f"_core{sysconfig.get_config_var('EXT_SUFFIX')}"
    partial = target.with_suffix(".partial")
    includes = [f"-I{folder}" for folder in (root / "csrc", _pybind_include(), sysconfig.get_path("include"))]
    flags = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wno-psabi", "-pthread"]

    def compiler_runs(*more: str) -> None:
        done = subprocess.run([compiler, *flags, *more], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{compiler}: {done.stderr.strip()[:500]}")

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as together:
        objects = [f"{folder}/{number}.o" for number in range(len(sources))]
        list(together.map(lambda one: compiler_runs(*includes, "-c", one[0], "-o", one[1]), zip(sources, objects, strict=True)))
        compiler_runs("-shared", *objects, "-o", str(partial))
    partial.replace(target)
    return compiler


class MissingPackages:
    """A pytest plugin: a test file that imports a package which is not installed is skipped, and says which."""

    def pytest_make_collect_report(self, collector: Any) -> Any:
        """Collect as pytest does, then turn that one failure into a skip."""
        from _pytest import runner

        report = runner.pytest_make_collect_report(collector)
        call = getattr(report, "call", None)
        error = call.excinfo.value if call is not None and call.excinfo is not None else None
        while error is not None and not isinstance(error, ModuleNotFoundError):
            error = error.__cause__ or error.__context__
        if report.outcome == "failed" and error is not None and (error.name or "worldenv").split(".")[0] not in ("worldenv", "tests"):
            report.outcome, report.longrepr = "skipped", (str(collector.path), 0, f"Skipped: needs {error.name}")
        return report


def gpu_tests(root: Path) -> list[str]:
    """Test files with a test that is marked gpu."""
    return sorted(str(path) for path in (root / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text())


def _tests() -> None:
    import pytest

    files = gpu_tests(ROOT)
    if not files:
        raise RuntimeError("no test is marked gpu")
    # by name and at once, since the part may be ended; one file that cannot be imported costs itself alone
    said = ["-v", "-rs", "--durations=10", "--continue-on-collection-errors"]
    code = pytest.main([*said, "-m", "gpu", "-p", "no:cacheprovider", "-o", "timeout=60", *files], plugins=[MissingPackages()])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise RuntimeError(f"pytest ended with {code}")


def _measure(part: Part, setting: Setting, results: Path) -> None:
    from worldenv.benchmarks import cases  # needs the extension, so not before it is built

    words = [part.only] if part.only and setting.size == "published" else []
    failed = []
    for (case, variant), measure in cases.chosen(part.cases, setting, words).items():
        try:
            row = measure()
        except Exception as error:  # costs its own row alone
            row = Row(f"{case} {variant}", "none", None, "ms", parity="fail", note=f"{type(error).__name__}: {error}"[:500])
        print(*list(harness.table([row]))[1:], flush=True)
        stamp = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        line = json.dumps({**harness.record([row], setting), "part": part.name, "note": row.note, "date": stamp}, allow_nan=False)
        results.parent.mkdir(parents=True, exist_ok=True)
        with results.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        failed += [row.case] if row.parity == "fail" or (row.value is None and row.engine is not None) else []
    if setting.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(setting.device) / 1e9
        print(f"{part.name}: peak {peak:.1f} GB", flush=True)
        if peak > _MEMORY_GB:
            raise RuntimeError(f"peak memory {peak:.1f} GB, want at most {_MEMORY_GB:.0f}")
    if failed:
        raise RuntimeError(f"wrong numbers, or none: {', '.join(failed)}")


def run_part(part: Part, setting: Setting, results: Path) -> None:
    """One part, here and now. Raises RuntimeError where it fails."""
    if part.name == "build":
        print(f"build: by {build()}")
        importlib.import_module(_CORE)
    elif part.name == "tests":
        missing = [name for name in ("pytest",) if importlib.util.find_spec(name) is None]
        print("tests: skipped, pytest is not installed") if missing else _tests()
    else:
        _measure(part, setting, results)


# All parts


@dataclass(frozen=True)
class Ended:
    """How a part ended."""

    name: str
    passed: bool
    said: str


class Finished:
    """Which parts a commit has finished on this device; kept in a file of the checkout's build folder."""

    def __init__(self, path: Path, commit: str, resume: bool) -> None:
        self._path, self._commit = path, commit
        self.names: set[str] = set()
        if resume and path.exists():
            stored = json.loads(path.read_text(encoding="utf-8"))
            self.names = set(stored["finished"]) if stored["commit"] == commit else set()

    def add(self, name: str) -> None:
        """Keep it at once: a run may be ended between two parts."""
        self.names.add(name)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps({"commit": self._commit, "finished": sorted(self.names)}), encoding="utf-8")
        partial.replace(self._path)


def run_all(parts: Sequence[Part], command: Callable[[Part], list[str]], finished: Finished, total_s: float = _TOTAL_S) -> list[Ended]:
    """Each part as a process made by `command`, with what they write shown as it comes; those in `finished` are not run again."""
    ended, until = [], time.monotonic() + total_s
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
    for part in parts:
        if part.name in finished.names:
            ended.append(Ended(part.name, True, "finished before"))
            continue
        left = min(part.limit_s, until - time.monotonic())
        if left <= 0:
            ended.append(Ended(part.name, False, "no time left; --resume goes on here"))
            continue
        began = time.monotonic()
        try:
            code = subprocess.run(command(part), cwd=ROOT, env=environment, timeout=left).returncode
            said = f"{time.monotonic() - began:.0f} s" + ("" if code == 0 else f", exit code {code}")
        except subprocess.TimeoutExpired:
            code, said = 124, f"ended after {left:.0f} s"
        if code == 0:
            finished.add(part.name)
        ended.append(Ended(part.name, code == 0, said))
        print(f"--- {part.name}: {'passed' if code == 0 else 'FAILED'}, {said}", flush=True)
    return ended


def chosen(only: str) -> list[Part]:
    """The parts whose name contains a word of `only` ("" is all), the build always first. ValueError for a word that no name contains."""
    words = [word for word in only.split(",") if word]
    for word in words:
        if not any(word in part.name for part in PARTS):
            raise no_such("--only", word, [part.name for part in PARTS])
    return [part for part in PARTS if not words or part.name == "build" or any(word in part.name for word in words)]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    # argparse, not tyro: a bare machine has no tyro
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description="Build, test and measure on one NVIDIA GPU.")
    parser.add_argument("--only", default="", metavar="NAME,...", help="parts whose name contains one of these")
    parser.add_argument("--resume", action="store_true", help="skip the parts that this commit has finished here")
    parser.add_argument("--device", default="cuda", help="cpu tries the command itself, with --small")
    parser.add_argument("--small", action="store_true", help="the tiny preset's sizes, few calls: tries the command, measures nothing")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the rows")
    parser.add_argument("--part", default="", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    try:
        parts = chosen(args.only)
        setting = Setting.on(args.device, seconds=_MEASURED_S)
        if args.small:
            setting = dataclasses.replace(setting, size="tiny", pairs=3, seconds=0.0, brief=True)
        elif setting.device.type != "cuda":
            raise ValueError(f"--device {args.device}: published sizes want a GPU; add --small")
    except ValueError as error:
        print(f"benchmarks.gpu: {error}", file=sys.stderr)
        return 2
    name = device_name(setting.device)
    results = args.results / f"{name}.jsonl"
    if args.part:
        try:
            run_part(next(part for part in PARTS if part.name == args.part), setting, results)
        except (RuntimeError, ValueError) as error:  # out of memory is a RuntimeError
            print(f"benchmarks.gpu: {args.part}: {error}", file=sys.stderr)
            return 1
        return 0
    same = ["--device", args.device, "--results", str(args.results), *(["--small"] if args.small else [])]
    finished = Finished(ROOT / "build" / "gpu" / f"{name}{'-small' if args.small else ''}.json", harness.commit(), args.resume)
    ended = run_all(parts, lambda part: [sys.executable, "-m", "worldenv.benchmarks.gpu", "--part", part.name, *same], finished)
    for one in ended:
        print(f"{'passed' if one.passed else 'FAILED'}  {one.name:24}  {one.said}")
    print(json.dumps({"results": str(results), "parts": [dataclasses.asdict(one) for one in ended]}))
    return 0 if all(one.passed for one in ended) else 1


if __name__ == "__main__":
    raise SystemExit(main())

"""What a run writes down about itself: versions, machine, commit, and the largest memory of its processes."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
from importlib import metadata
from pathlib import Path
from types import TracebackType

import torch

_PACKAGES = (
    "worldenv", "torch", "triton", "transformers", "diffusers", "peft", "safetensors", "mujoco", "gymnasium", "numpy",
    "opencv-python-headless", "av", "matplotlib",
)  # fmt: skip
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cpu() -> str:
    """The processor's name as the kernel gives it; where it gives none (many ARM machines), the architecture."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def versions(renderer: str | None = None) -> dict[str, str]:
    """What ran, and on what: packages, Python, system, processor, cores that this process may use, GPUs.

    `renderer` is the OpenGL renderer's name, which only a program with an open context knows; without it the name of MuJoCo's
    backend stands there. Every value is text; nothing in it changes between two runs on one machine.
    """
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return {
        "python": platform.python_version(),
        **{package: _version(package) for package in _PACKAGES},
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "renderer": renderer or os.environ.get("MUJOCO_GL", "unknown"),
        "cpu": _cpu(),
        "cores": str(len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()),
        "gpu": ", ".join(gpus) or "none",
    }


def commit() -> str:
    """The commit (40 hex digits) of the source tree that runs, with "+dirty" where tracked files differ from it; else "unknown".

    Rows below benchmarks/results do not count: that a benchmark wrote one does not change what the next one measures.
    Unknown: no git, no repository, or one that does not track this file, such as a project in whose .venv worldenv is installed.
    """
    root = Path(__file__).resolve().parents[2]
    # A hook's GIT_DIR would name another repository; without the lock, nothing in this one is written.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")} | {"GIT_OPTIONAL_LOCKS": "0"}

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=30).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", str(Path(__file__).resolve().relative_to(root)))
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
        return git("rev-parse", "HEAD") + ("+dirty" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _children(pid: int) -> list[int]:
    """Process ids of the children of all threads of `pid`; [] where it is gone."""
    try:
        return [int(child) for thread in os.listdir(f"/proc/{pid}/task") for child in _read(f"/proc/{pid}/task/{thread}/children").split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def _children_by_parent() -> dict[int, list[int]]:
    """Children of every process, from one pass over /proc: for kernels without /proc/PID/task/TID/children."""
    children: dict[int, list[int]] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            parent = int(_read(f"/proc/{name}/stat").rpartition(")")[2].split()[1])  # the name in brackets may hold anything
        except (FileNotFoundError, ProcessLookupError):
            continue
        children.setdefault(parent, []).append(int(name))
    return children


def _read(path: str) -> str:
    with open(path) as opened:
        return opened.read()


def tree_rss_mb() -> float:
    """Resident memory (RSS) of this process and all its descendants now [MB, 1e6 bytes]; pages that they share count once in each."""
    by_parent = None if os.path.exists(f"/proc/self/task/{os.getpid()}/children") else _children_by_parent()
    pages, waiting = 0, [os.getpid()]
    while waiting:
        pid = waiting.pop()
        try:
            pages += int(_read(f"/proc/{pid}/statm").split()[1])
        except (FileNotFoundError, ProcessLookupError):  # it ended while we looked
            continue
        waiting += _children(pid) if by_parent is None else by_parent.get(pid, [])
    return pages * _PAGE_BYTES / 1e6


class PeakMemory:
    """`with PeakMemory() as memory: ...; memory.peak_mb`: the largest memory of the process tree while the block ran.

    A thread sums the RSS of this process and its descendants every `interval_s` seconds. Shared pages count once in each process, so
    the sum is an upper bound where processes share; what rises and falls between two samples is not seen. Blocks may be nested.
    Reads /proc, so Linux only: elsewhere `with` raises OSError.
    """

    def __init__(self, interval_s: float = 0.2) -> None:
        """Sample every `interval_s` seconds, and at the block's beginning and end."""
        if interval_s <= 0:
            raise ValueError(f"PeakMemory: interval_s={interval_s}, want seconds > 0")
        self._interval_s = interval_s
        self._peak_mb = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)

    @property
    def peak_mb(self) -> float:
        """Largest sum so far [MB, 1e6 bytes]."""
        return self._peak_mb

    def _sample(self) -> None:
        self._peak_mb = max(self._peak_mb, tree_rss_mb())

    def _watch(self) -> None:
        while not self._stop.wait(self._interval_s):
            self._sample()

    def __enter__(self) -> PeakMemory:
        if not os.path.exists("/proc/self/statm"):
            raise OSError("PeakMemory: no /proc/self/statm; memory of a process tree is measured on Linux only")
        self._sample()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()

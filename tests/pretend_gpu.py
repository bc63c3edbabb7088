"""Run a Python module on GPUs that are not there, to see what a real one would refuse.

    python -m tests.pretend_gpu [--kernels] MODULE ARGUMENTS...

Two "cuda" devices (tests/pretend_gpu.cpp, compiled in some 10 seconds and kept in build/): their memory is the host's and their operators are
the CPU's, but an operator that is given tensors of two devices, and NumPy that is given one of a GPU, fail as there. Instead of each Triton
kernel its definition runs, on the CPU; with --kernels the kernel itself, by Triton's interpreter, thousands of times slower. What this cannot
show: compiled kernels, streams, CUDA graphs, memory, speed, other rounding.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import runpy
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch

ROOT = Path(__file__).parents[1]
_SOURCE = Path(__file__).with_suffix(".cpp")
_TORCH = Path(torch.__file__).parent
_GIVEN = "WORLDENV_PRETENDED_GPU"
NOT_HERE = (
    "there is a GPU" if torch.cuda.is_available() and _GIVEN not in os.environ
    else f"torch {torch.__version__} brings its own CUDA; GPUs are pretended beside its CPU build (torch==2.13.0+cpu)" if torch.version.cuda
    else ""
)  # fmt: skip
"""Why no GPU can be pretended on this machine."""


def library() -> Path:
    """The compiled back end for this torch. RuntimeError where the compiler fails."""
    key = hashlib.sha256(_SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    target = ROOT / "build" / "pretend_gpu" / f"{key}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}")
        includes = [f"-I{_TORCH / 'include'}", f"-I{_TORCH / 'include' / 'torch' / 'csrc' / 'api' / 'include'}"]
        libraries = [f"-L{_TORCH / 'lib'}", f"-Wl,-rpath,{_TORCH / 'lib'}", "-lc10", "-ltorch_cpu"]
        compiler = os.environ.get("CXX") or shutil.which("c++") or "g++"
        command = [compiler, "-std=c++20", "-O1", "-shared", "-fPIC", *includes, str(_SOURCE), "-o", str(partial), *libraries]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")
        partial.replace(target)
    return target


def environment() -> dict[str, str]:
    """For a process that has the pretended GPUs: they must be there before torch asks which devices there are."""
    return {**os.environ, "LD_PRELOAD": str(library()), "TRITON_INTERPRET": "1", _GIVEN: "1", "PYTHONPATH": str(ROOT)}


class _Event:
    """In the place of torch.cuda.Event: the host's time, since the host does the work."""

    def __init__(self, enable_timing: bool = False) -> None:
        self._at = 0.0

    def record(self, stream: object = None) -> None:
        self._at = time.perf_counter()

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: _Event) -> float:
        return 1e3 * (end._at - self._at)


class _Stream:
    """In the place of torch.cuda.Stream: the host does the work in order anyway."""

    taken: ClassVar[dict[int, _Stream]] = {}
    """By thread."""

    def __init__(self, device: torch.device | None = None, priority: int = 0) -> None:
        self.device, self.priority = device, priority

    def synchronize(self) -> None: ...

    @classmethod
    def present(cls, *_: object) -> _Stream:
        return cls.taken.setdefault(threading.get_ident(), cls())

    @classmethod
    def take(cls, stream: _Stream) -> None:
        cls.taken[threading.get_ident()] = stream


def _exchanged(index: int) -> int:
    before = torch.accelerator.current_device_index()
    if index >= 0:
        torch.accelerator.set_device_index(index)
    return before


def _install() -> None:
    """What Python asks of torch.cuda; the rest of it is not there, and says so."""
    found = SimpleNamespace(name="pretended GPU", total_memory=80 * 2**30, major=9, minor=0, multi_processor_count=1)
    answers: dict[str, Any] = {
        "_lazy_init": None, "synchronize": None, "is_available": True, "device_count": 2, "get_device_name": found.name,
        "get_device_properties": found, "get_device_capability": (found.major, found.minor), "max_memory_allocated": 0,
        "_sleep": None,
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    torch.cuda.get_rng_state = torch.cuda.random.get_rng_state = lambda *_: torch.get_rng_state()
    torch.cuda.set_rng_state = torch.cuda.random.set_rng_state = lambda *_, **__: None
    torch.cuda.Event, torch.cuda.Stream = _Event, _Stream  # type: ignore[assignment,misc]
    torch.cuda.current_stream, torch.cuda.set_stream = _Stream.present, _Stream.take  # type: ignore[assignment]
    torch._C._cuda_getDevice, torch._C._cuda_setDevice = torch.accelerator.current_device_index, torch.accelerator.set_device_index  # type: ignore[attr-defined]
    torch.cuda._exchange_device = torch.cuda._maybe_exchange_device = _exchanged
    torch.Tensor.__deepcopy__ = _copied(torch.Tensor.__deepcopy__)  # type: ignore[method-assign]
    torch.nn.Parameter.__deepcopy__ = _copied(torch.nn.Parameter.__deepcopy__)  # type: ignore[method-assign]


def _copied(way: Any) -> Any:
    """Storages of pretended memory cannot be copied, tensors can."""

    def copied(tensor: torch.Tensor, memo: dict[int, Any]) -> Any:
        if tensor.device.type != "cuda" or not tensor.is_leaf:
            return way(tensor, memo)
        if id(tensor) not in memo:
            other = tensor.detach().clone().requires_grad_(tensor.requires_grad)
            memo[id(tensor)] = torch.nn.Parameter(other, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else other
        return memo[id(tensor)]

    return copied


def _by_definition() -> None:
    """Where a kernel would run, copy its tensors to the CPU and back: its definition is for the CPU."""
    from worldenv.kernels import action_map, ddim_step, frames, laplace, philox

    ways = {
        action_map: ("paint", "rays"), ddim_step: ("ddim_step",), frames: ("for_policy", "for_reflector", "for_vae", "to_frames"),
        laplace: ("draw", "log_prob", "clipped"), philox: ("normal",),
    }  # fmt: skip
    for module, names in ways.items():
        for name in names:
            setattr(module, name, _there_and_back(getattr(module, name)))


def _there_and_back(way: Any) -> Any:
    @functools.wraps(way)
    def run(*given: Any, **named: Any) -> Any:
        homes: set[torch.device] = set()
        plain = _moved((given, named), None, homes)
        if len(homes) > 1:
            raise RuntimeError(f"{way.__name__}: a kernel cannot reach tensors on {' and '.join(sorted(map(str, homes)))}")
        out = way(*plain[0], **plain[1])
        home = homes.pop() if homes else torch.device("cpu")
        return out if home.type == "cpu" else _moved(out, home, set())

    return run


def _moved(value: Any, home: torch.device | None, homes: set[torch.device]) -> Any:
    """`value` with all its tensors on `home`, None for the CPU; devices that it named are added to `homes`."""
    if isinstance(value, torch.Tensor) and value.is_meta:  # operations are counted
        return value
    if isinstance(value, torch.Tensor):
        homes.add(value.device)
        return value.to(home or "cpu")
    if isinstance(value, torch.device) and value.type == "cuda":
        homes.add(torch.device("cuda", value.index or 0))
        return home or torch.device("cpu")
    if isinstance(value, dict):
        return {key: _moved(one, home, homes) for key, one in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_moved(one, home, homes) for one in value))
    if isinstance(value, tuple | list):
        return type(value)(_moved(one, home, homes) for one in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{f.name: _moved(getattr(value, f.name), home, homes) for f in dataclasses.fields(value)})
    return value


def main(arguments: list[str]) -> None:
    """Of the command line."""
    if NOT_HERE:
        raise SystemExit(f"tests.pretend_gpu: {NOT_HERE}")
    if _GIVEN not in os.environ:
        os.execve(sys.executable, [sys.executable, "-m", "tests.pretend_gpu", *arguments], environment())
    _install()
    if arguments[0] == "--kernels":
        del arguments[0]
    else:
        _by_definition()
    sys.argv = arguments
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])

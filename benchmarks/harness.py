"""How a speed is measured: beside its baseline, pair by pair in one run, with parity first and the machine's own ceiling beside it.

A row holds the median of our calls and of the baseline's; its speedup is the median of the ratios of neighbouring calls, so that a
machine that slows down half way slows both. Time is that of CUDA events on a GPU and of the monotonic clock on a CPU. The ceiling is
what the matrix rate and the copy bandwidth, measured right behind it, allow (roofline; Williams et al. 2009, doi:10.1145/1498765.1498785).
"""

from __future__ import annotations

import functools
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
"""The checkout."""
Parity = Literal["pass", "fail", "none"]
Size = Literal["tiny", "published"]
_LEAST_PAIRS, _WARM_UP = 3, 2
_FLUSHED_BYTES, _AHEAD_CYCLES = 256 * 2**20, 2_000_000
_PACKAGES = ("worldenv", "torch", "triton", "numpy")


@dataclass(frozen=True)
class Setting:
    """Where and at what size cases run."""

    device: torch.device
    dtype: torch.dtype
    """Of weights and activations of what is measured."""
    size: Size
    """tiny: the preset of that name; published: the released model's sizes, random weights."""
    pairs: int = 15
    """Pairs of calls, at most."""
    seconds: float = 30.0
    """After this, and at least 3 pairs, a measurement ends [s]."""
    brief: bool = False
    """Ceilings from small operands and few denoising steps: for tests of the measuring itself."""

    @classmethod
    def on(cls, device: str = "auto", **changes: Any) -> Setting:
        """bfloat16 at published sizes on a GPU, float32 at tiny ones on a CPU, unless `changes` says otherwise. ValueError for other devices."""
        chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        try:
            kind = torch.device(chosen)
        except RuntimeError:
            raise ValueError(f"--device {device}: no device of torch; use auto, cpu or cuda") from None
        if kind.type not in ("cpu", "cuda") or (kind.type == "cuda" and not torch.cuda.is_available()):
            raise ValueError(f"--device {device}: not on this machine; use auto or cpu")
        on_gpu = kind.type == "cuda"
        defaults = {"dtype": torch.bfloat16 if on_gpu else torch.float32, "size": "published" if on_gpu else "tiny"}
        return cls(kind, **{**defaults, **{name: value for name, value in changes.items() if value is not None}})


@dataclass(frozen=True)
class Row:
    """One measured thing."""

    case: str
    backend: str
    """What ran it, with its type: "eager bfloat16"."""
    value: float | None
    """Median; None where parity failed."""
    unit: str
    baseline: str | None = None
    """What it is compared with."""
    baseline_value: float | None = None
    """Median, same unit."""
    speedup: float | None = None
    """Above 1: better than the baseline."""
    ceiling: float | None = None
    """The best value that this machine's measured rates allow, same unit."""
    share_of_ceiling: float | None = None
    """1 is the ceiling; above it is what computes fewer operations than its definition has."""
    parity: Parity = "none"
    spread: float | None = field(default=None, metadata={"table": True})
    """Half the distance between the quartiles, as a share of the median; for people only."""
    note: str = field(default="", metadata={"table": True})
    """Measured parity error or what else a reader should know; for people only."""
    engine: str | None = None
    """Of an engine's row: which network it is."""
    max_rel_error: float | None = None
    """Its largest relative L2 distance to eager on recorded inputs."""
    tolerance: float | None = None
    """The largest that is accepted."""

    def plain(self) -> dict[str, Any]:
        """For programs; what only engines have stands in their rows alone."""
        own = ("engine", "max_rel_error", "tolerance") if self.engine is None else ()
        return {one.name: getattr(self, one.name) for one in fields(self) if not one.metadata.get("table") and one.name not in own}


Variants = Mapping[str, Callable[[], Row]]
"""What a case measures, by name."""
Case = Callable[[Setting], Variants]


@dataclass(frozen=True)
class Work:
    """What has to be done at least, however it is done."""

    flops: float
    """One multiply-add is 2."""
    bytes: float
    """Read from and written to memory."""


@dataclass(frozen=True)
class Agreement:
    """Whether what is measured computes what it should."""

    error: float
    limit: float

    @property
    def parity(self) -> Parity:
        """An error that is not a number fails."""
        return "pass" if self.error <= self.limit else "fail"


def count_flops(call: Callable[[], object]) -> int:
    """FLOPs of matrix products and convolutions in `call`, one multiply-add being 2; cheapest with tensors on the meta device."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


def milliseconds(device: torch.device, call: Callable[[], object]) -> float:
    """Of one `call`, all its work on `device` done [ms].

    A GPU's L2 holds nothing of the call's then, as between two uses in a rollout, and the GPU has a millisecond to do first, in which a short call
    is launched: what is timed is its work, and the launches of a long one as far as the GPU waits for them.
    """
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        with torch.cuda.device(device):
            _flushed(device).zero_()
            torch.cuda._sleep(_AHEAD_CYCLES)  # type: ignore[no-untyped-call]
            start.record()
            call()
            end.record()
        end.synchronize()
        return float(start.elapsed_time(end))
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1e3


@functools.cache
def _flushed(device: torch.device) -> torch.Tensor:
    """More than any GPU's L2 holds."""
    return torch.empty(_FLUSHED_BYTES, dtype=torch.uint8, device=device)


def measure(setting: Setting, *calls: Callable[[], object]) -> list[list[float]]:
    """Milliseconds of each of `calls`, after warming up, in rounds in which each is called once, in turn first and last."""
    for call in calls:
        for _ in range(_WARM_UP):
            milliseconds(setting.device, call)
    taken: list[list[float]] = [[] for _ in calls]
    until = time.monotonic() + setting.seconds
    for pair in range(setting.pairs):
        order = range(len(calls)) if pair % 2 == 0 else reversed(range(len(calls)))
        for i in order:
            taken[i].append(milliseconds(setting.device, calls[i]))
        if pair + 1 >= _LEAST_PAIRS and time.monotonic() > until:
            break
    return taken


def spread(values: Sequence[float]) -> float:
    """Half the distance between the quartiles, as a share of the median."""
    if len(values) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / 2 / middle


@dataclass(frozen=True)
class Ceilings:
    """What this device does at best, measured."""

    bytes_per_ms: float
    """Read plus written by a copy."""
    flops_per_ms: float
    """Of a large square matrix product."""

    def least_ms(self, work: Work) -> float:
        """No shorter time is possible for `work` at these rates."""
        return max(work.flops / self.flops_per_ms, work.bytes / self.bytes_per_ms)


def _copy_bytes(setting: Setting) -> int:
    return 2**20 if setting.brief else 2**30 if setting.device.type == "cuda" else 2**26


def _matrix_side(setting: Setting) -> int:
    return 128 if setting.brief else 8192 if setting.device.type == "cuda" else 1024


def copy_rates(setting: Setting) -> list[float]:
    """Bytes per ms, read plus written, of copies of one buffer to another, far larger than any cache [1/ms]."""
    size = _copy_bytes(setting)
    source, target = (torch.randint(256, (size,), dtype=torch.uint8, device=setting.device) for _ in range(2))  # zeros move faster on some GPUs
    (taken,) = measure(setting, lambda: target.copy_(source))
    return [2 * size / ms for ms in taken]


def matrix_rates(setting: Setting) -> list[float]:
    """FLOPs per ms of square matrix products in the setting's type [1/ms]."""
    side = _matrix_side(setting)
    a, b = (torch.randn(side, side, device=setting.device, dtype=setting.dtype) for _ in range(2))
    out = torch.empty_like(a)
    (taken,) = measure(setting, lambda: torch.mm(a, b, out=out))
    return [2 * side**3 / ms for ms in taken]


def ceilings(setting: Setting) -> Ceilings:
    """Measured anew for every row, right behind it: others on a machine come and go."""
    return Ceilings(statistics.median(copy_rates(setting)), statistics.median(matrix_rates(setting)))


def backend(setting: Setting) -> str:
    """"eager float32"."""
    return f"eager {str(setting.dtype).removeprefix('torch.')}"


def compare(
    case: str,
    setting: Setting,
    ours: Callable[[], object],
    baseline: tuple[str, Callable[[], object]],
    agreement: Agreement,
    work: Work | None,
) -> Row:
    """The row of a time: `ours` against the named `baseline`. Where they do not agree nothing is timed, and the row has no speed."""
    name, other = baseline
    said = f"error {agreement.error:.2g}, limit {agreement.limit:.2g}"
    if agreement.parity == "fail":
        return Row(case, backend(setting), None, "ms", name, parity="fail", note=said)
    taken, published = measure(setting, ours, other)
    value = statistics.median(taken)
    ratio = statistics.median(b / a for a, b in zip(taken, published, strict=True))
    ceiling = None if work is None else ceilings(setting).least_ms(work)
    share = None if ceiling is None else ceiling / value
    return Row(
        case, backend(setting), value, "ms", name, statistics.median(published), ratio, ceiling, share, agreement.parity, spread(taken), said
    )  # fmt: skip


def machine(device: torch.device) -> str:
    """CPU, cores that this process may use, threads in use, and the GPU where one is measured."""
    info = Path("/proc/cpuinfo")
    models = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    said = f"{models[0] if models else platform.processor() or platform.machine()}, {cores} cores usable, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        said = f"{found.name}, {found.total_memory / 2**30:.0f} GiB, {found.multi_processor_count} SMs; {said}"
    return said


def versions() -> dict[str, str | None]:
    """Of Python and of what does the work; None: not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    found["torch"] = torch.__version__
    found["cuda"] = torch.version.cuda
    return found


def commit() -> str:
    """WORLDENV_COMMIT, for a copy without its history; else of the checkout, "+" behind it where tracked files differ from it; else "unknown"."""
    if given := os.environ.get("WORLDENV_COMMIT"):
        return given
    try:
        said = subprocess.run(["git", "describe", "--always", "--dirty=+", "--exclude=*"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return said.stdout.strip()


def _cell(value: float | None, unit: str = "") -> str:
    return "-" if value is None else f"{value:.4g}{unit}"


def table(rows: Sequence[Row]) -> Iterator[str]:
    """For people: a line per row, columns aligned."""
    head = ("case", "backend", "value", "unit", "spread", "baseline", "its value", "speedup", "ceiling", "share", "parity", "")
    cells = [head] + [
        (
            row.case, row.backend, _cell(row.value), row.unit, "-" if row.spread is None else f"{row.spread:.1%}", row.baseline or "-",
            _cell(row.baseline_value), _cell(row.speedup, "x"), _cell(row.ceiling),
            "-" if row.share_of_ceiling is None else f"{row.share_of_ceiling:.0%}", row.parity, row.note,
        )
        for row in rows
    ]  # fmt: skip
    widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
    for line in cells:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()


def record(rows: Sequence[Row], setting: Setting) -> dict[str, Any]:
    """For programs: all rows, and where they come from."""
    return {"rows": [row.plain() for row in rows], "machine": machine(setting.device), "versions": versions(), "commit": commit()}


def line(rows: Sequence[Row], setting: Setting) -> str:
    """`record` as one line of JSON, which has no infinity and no NaN."""
    return json.dumps(record(rows, setting), allow_nan=False)

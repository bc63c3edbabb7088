"""`python -m tests.golden DIR [DIR...]`: judge the implementation by golden cases: directories with a case.json, or directories of such.

A case names its `kind` and, in `limits`, which outputs are judged and how strictly; no limit is made up here. Prints a line per tensor,
and as its last line one JSON object `{"cases": [{"case", "tensor", "error", "limit", "pass"}]}`. FAIL, and exit code 1, also for: a DIR without a
case, tensors without a case.json, an unknown kind, a case that cannot be run, a limit that names no tensor, and an output that a limit
names and nothing produced.
"""

from __future__ import annotations

import fnmatch
import json
import math
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from tests.golden import evac, oft

Outputs = Mapping[str, torch.Tensor | NDArray[Any]]
KINDS: dict[str, Callable[[Path, dict[str, Any]], Outputs]] = {**evac.KINDS, **oft.KINDS}

_PIXELS = 3
"""Trailing axes of a picture: height, width, colour."""


@dataclass(frozen=True)
class Row:
    """One tensor, judged by one number of its limit."""

    case: str
    tensor: str
    error: float | None
    """None where there is nothing to measure."""
    limit: str
    """"name value", as in case.json, or what is wrong."""
    passed: bool

    def line(self) -> str:
        """For people."""
        error = "-" if self.error is None else f"{self.error:.3g}"
        return f"{'PASS' if self.passed else 'FAIL'}  {self.case}  {self.tensor}  error {error}  limit {self.limit}"

    def plain(self) -> dict[str, Any]:
        """For programs."""
        values = asdict(self)
        values["pass"] = values.pop("passed")
        return values


def find(folder: Path) -> list[Path]:
    """The cases of `folder`: itself, or what lies directly below and holds a case.json or tensors (which are no case without one)."""
    if (folder / "case.json").is_file():
        return [folder]
    return sorted({path.parent for name in ("case.json", "*.safetensors", "*.npz") for path in folder.glob(f"*/{name}")})


def stored(folder: Path) -> dict[str, NDArray[Any]]:
    """Every tensor of a case by name: those of tensors.safetensors and of .npz files."""
    found: dict[str, NDArray[Any]] = {}
    if (folder / "tensors.safetensors").is_file():
        found |= {name: value.numpy() for name, value in load_file(folder / "tensors.safetensors").items()}
    for path in sorted(folder.glob("*.npz")):
        with np.load(path, allow_pickle=False) as opened:
            found |= dict(opened)
    return found


def _pictures(array: NDArray[Any]) -> NDArray[Any]:
    """(N, H, W, 3)."""
    return array.reshape(-1, *array.shape[-_PIXELS:])


def measure(ours: NDArray[Any], want: NDArray[Any], by: str) -> float:
    """The error of `ours` against `want` that a limit named `by` bounds; infinite where something is not finite. ValueError for an unknown name."""
    if by in ("max_abs", "mean_abs"):
        difference = np.abs(ours.astype(np.float64) - want.astype(np.float64))
        error = float(difference.max() if by == "max_abs" else difference.mean()) if difference.size else 0.0
    elif by in ("max_fraction_different", "mean_fraction_different"):
        if want.ndim < _PIXELS:
            raise ValueError(f"{by} of {want.ndim} axes, want pictures (..., H, W, 3)")
        fractions = (_pictures(ours) != _pictures(want)).any(axis=-1).mean(axis=(1, 2))
        error = float(fractions.max() if by == "max_fraction_different" else fractions.mean())
    else:
        raise ValueError(f"unknown limit {by!r}")
    return error if math.isfinite(error) else math.inf


def judge(folder: Path) -> list[Row]:
    """Run one case and judge every tensor that its limits name."""
    name = folder.name
    try:
        case = json.loads((folder / "case.json").read_text(encoding="utf-8"))
        name = case.get("case", name)
        run = KINDS.get(case.get("kind"))
        if run is None:
            return [Row(name, "*", None, f"unknown kind {case.get('kind')!r}", False)]
        limits: dict[str, dict[str, float]] = case.get("limits") or {}
        want = stored(folder)
        claimed = {tensor: pattern for tensor in want if (pattern := next((p for p in limits if fnmatch.fnmatchcase(tensor, p)), None))}
        rows = [Row(name, pattern, None, "names no tensor", False) for pattern in limits if not fnmatch.filter(want, pattern)]
        if not claimed:
            return [*rows, Row(name, "*", None, "no tensor is judged", False)]
        produced = run(folder, case)
        outputs = {key: value.detach().numpy() if isinstance(value, torch.Tensor) else np.asarray(value) for key, value in produced.items()}
    except Exception as problem:  # any crash of a case is that case's failure, and the others are still judged
        traceback.print_exc()
        return [Row(name, "*", None, f"crashed: {problem!r}", False)]
    for tensor, pattern in claimed.items():
        if not limits[pattern]:
            rows.append(Row(name, tensor, None, "empty limit", False))
        for by, limit in limits[pattern].items():
            rows.append(_row(name, tensor, outputs.get(tensor), want[tensor], by, limit))
    return rows


def _row(case: str, tensor: str, ours: NDArray[Any] | None, want: NDArray[Any], by: str, limit: float) -> Row:
    if ours is None:
        return Row(case, tensor, None, f"{by} {limit:g}, not produced", False)
    if ours.shape != want.shape:
        return Row(case, tensor, None, f"{by} {limit:g}, shape {ours.shape}, want {want.shape}", False)
    try:
        error = measure(ours, want, by)
    except ValueError as problem:
        return Row(case, tensor, None, str(problem), False)
    return Row(case, tensor, error, f"{by} {limit:g}", error <= limit)


def main(argv: Sequence[str]) -> int:
    """Judge the cases under `argv`; 0 if everything passed, 1 if not, 2 for wrong usage."""
    if not argv:
        print("usage: python -m tests.golden DIR [DIR...]", file=sys.stderr)
        return 2
    rows = []
    for arg in argv:
        for folder in find(Path(arg)) or [None]:  # a folder without a case fails, whatever the others hold
            judged = [Row(arg, "*", None, "no case", False)] if folder is None else judge(folder)
            rows += judged
            print(*(row.line() for row in judged), sep="\n", flush=True)
    # JSON has no infinity; an error that is not finite is no number at all there.
    plain = [{**row.plain(), "error": row.error if row.error is not None and math.isfinite(row.error) else None} for row in rows]
    print(json.dumps({"cases": plain}))
    return 0 if all(row.passed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

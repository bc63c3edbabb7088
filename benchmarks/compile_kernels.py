"""Every kernel in every configuration, compiled ahead of time for GPUs that need not be there: registers, shared memory, spills.

    worldenv-bench kernels --compile-only --arch sm_80,sm_90

Each is compiled as Triton would at sizes that 16 divides, at odd sizes, and where all sizes are 1. Besides what the assembler says, two things
are read from the code itself: that no offset into memory is computed in 32 bits, and that what promises bits has no contracted float64 arithmetic.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from worldenv.kernels import action_map, ddim_step, frames, laplace, philox
from worldenv.kernels.backend import Build

MODULES = {"philox": philox, "laplace": laplace, "ddim_step": ddim_step, "action_map": action_map, "frames": frames}
SIZES = ("even", "odd", "ones")
"""What Triton tells apart: integers that 16 divides, any others, and ones, which it takes as constants."""
_NARROW = re.compile(r"tt\.addptr %\S+, (%\S+) : .*, (?:tensor<\S*xi32>|i32)(?: |$)")


@dataclass(frozen=True)
class Compiled:
    """What one configuration became on one architecture."""

    kernel: str
    arch: str
    registers: int
    """Per thread."""
    shared_bytes: int
    """Per program."""
    spill_bytes: int
    """Stored and loaded, per thread."""


def builds() -> Iterator[tuple[str, Build]]:
    """All configurations, named by file and kernel."""
    for name, module in MODULES.items():
        for build in module.BUILDS:
            yield f"{name}.{build.name}", build


def _source(build: Build, sizes: str) -> Any:
    names, types, constants = build.kernel.arg_names, dict(build.types), dict(build.constants)
    integers = [name for name in names if types.get(name) == "i32"]
    if sizes == "ones":
        for name in integers:
            del types[name]
            constants[name] = 1
    aligned = [name for name in names if types.get(name, "").startswith("*") or (sizes == "even" and name in integers)]
    return ASTSource(
        build.kernel,
        {name: types.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )


def _assembler(arch: int) -> Path:
    name = "ptxas-blackwell" if arch >= 100 else "ptxas"
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def narrow_offsets(ttir: str) -> list[str]:
    """Lines in which an address is made with a 32-bit offset that is not a constant."""
    constant = set(re.findall(r"(%\S+) = arith\.constant", ttir))
    return [line.strip() for line in ttir.splitlines() if (found := _NARROW.search(line)) and found.group(1) not in constant]


def build_one(name: str, build: Build, arch: str, sizes: str) -> Compiled:
    """Compile for one of SIZES; ValueError where code is not what the build promises."""
    number = int(arch.removeprefix("sm_"))
    made = triton.compile(
        _source(build, sizes), target=GPUTarget("cuda", number, 32), options={"num_warps": build.warps, "enable_fp_fusion": build.contract}
    )
    narrow, ptx = narrow_offsets(made.asm["ttir"]), made.asm["ptx"]
    if narrow:
        raise ValueError(f"{name}: {len(narrow)} offsets of 32 bits: {narrow[0]}")
    if not build.contract and "fma.rn.f64" in ptx:
        raise ValueError(f"{name}: float64 products and sums are contracted")
    registers, spilled = assembled(name, ptx, number, build.contract)
    return Compiled(f"{name} {sizes}", arch, registers, int(made.metadata.shared), spilled)


def assembled(name: str, ptx: str, arch: int, contract: bool = True) -> tuple[int, int]:
    """Registers of a thread, and bytes that it spills (stored and loaded), of code for sm_`arch`. ValueError that names it where the assembler says
    neither."""
    target = re.search(r"\.target (sm_\w+)", ptx)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        plain = [] if contract else ["--fmad=false"]
        said = subprocess.run(
            [str(_assembler(arch)), "-v", *plain, f"--gpu-name={target.group(1)}", str(path), "-o", os.devnull],
            capture_output=True, text=True, check=True,
        ).stderr  # fmt: skip
    registers = re.search(r"Used (\d+) registers", said)
    if registers is None or "spill" not in said:
        raise ValueError(f"{name}: the assembler says nothing of registers and spills: {said.strip()[:200]}")
    return int(registers.group(1)), sum(int(number) for number in re.findall(r"(\d+) bytes spill (?:stores|loads)", said))


def compile_all(architectures: Sequence[str], words: Sequence[str] = ()) -> Iterator[Compiled]:
    """All configurations whose name contains one of `words` (all without one), for each of `architectures`.

    Raises ValueError for a word that no name contains, or in a process that interprets kernels.
    """
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise ValueError("TRITON_INTERPRET is set: kernels are interpreted in this process; unset it to compile them")
    if lost := [word for word in words if not any(word in name for name, _ in builds())]:
        raise ValueError(f"--only {lost[0]}: there are {', '.join(MODULES)}")
    chosen = [(name, build) for name, build in builds() if not words or any(word in name for word in words)]
    for arch in architectures:
        for name, build in chosen:
            for sizes in SIZES:
                yield build_one(name, build, arch, sizes)

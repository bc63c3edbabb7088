"""What there is to measure, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from worldenv.benchmarks.bench_ceilings import copy, matmul
from worldenv.benchmarks.bench_chunk_loop import chunk_loop
from worldenv.benchmarks.bench_engines import engines
from worldenv.benchmarks.bench_hoisting import hoisting
from worldenv.benchmarks.bench_kernels import kernels, maps
from worldenv.benchmarks.bench_reflector import reflector
from worldenv.benchmarks.bench_simulator_unet import simulator_unet
from worldenv.benchmarks.bench_vae import vae
from worldenv.benchmarks.harness import Case, Row, Setting

CASES: dict[str, Case] = {
    "copy": copy,
    "matmul": matmul,
    "simulator_unet": simulator_unet,
    "vae": vae,
    "chunk_loop": chunk_loop,
    "hoisting": hoisting,
    "reflector": reflector,
    "kernels": kernels,
    "maps": maps,
    "engines": engines,
}


def chosen(names: Sequence[str], setting: Setting, only: Sequence[str] = ()) -> dict[tuple[str, str], Callable[[], Row]]:
    """What measures each row of the cases `names`; of their variants those whose name contains a word of `only`, all without one.

    Raises ValueError, before anything is measured, for a case that there is not or a word that no variant contains.
    """
    for name in names:
        if name not in CASES:
            raise ValueError(f"no case {name!r}; there are {', '.join(CASES)}")
    variants = {(name, variant): measure for name in names for variant, measure in CASES[name](setting).items()}
    found = {key: measure for key, measure in variants.items() if not only or key[1].startswith("needs ") or any(word in key[1] for word in only)}
    if lost := [word for word in only if not any(word in variant or variant.startswith("needs ") for _, variant in variants)]:
        raise ValueError(f"--only {lost[0]}: there are {', '.join(variant for _, variant in variants)}")
    return found


def run(names: Sequence[str], setting: Setting, only: Sequence[str] = ()) -> Iterator[Row]:
    """Rows of `chosen`, as they are measured. Raises what that does, and what a measurement raises."""
    for measure in chosen(names, setting, only).values():
        yield measure()

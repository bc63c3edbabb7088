"""All back ends behind one call: what an engine is, which back ends there are, and which of them can work here.

A back end is a module of this folder with

    requires() -> str | None                      what is missing on this machine, in a line that names it and the cure; None: nothing
    versions() -> dict                            of whatever decides a plan's bytes
    architecture(device) -> str                   what a plan made for `device` runs on
    build(module, recipe, folder, arch, store)    write a plan; `module` is in the recipe's precision (`export.prepared`)
    load(folder, recipe, device) -> Engine        open what `build` wrote

and no runtime is imported before one of these is called.
"""

from __future__ import annotations

import importlib
import platform
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import nn

from worldenv import checkpoint
from worldenv.engines import export
from worldenv.engines.recipe import EngineError, EngineRecipe, Signature, signature, symbol
from worldenv.engines.store import Plan, Store, Wanted
from worldenv.nouns import no_such

BACK_ENDS = ("eager", "onnxruntime", "inductor", "tensorrt", "tensorrt_rtx", "torch_tensorrt")
AUTOMATIC: dict[str, tuple[str, ...]] = {"cpu": ("onnxruntime",), "cuda": ("tensorrt", "tensorrt_rtx", "inductor")}
"""What `auto` tries beside eager, by kind of device. On a CPU Inductor compiles for a minute, and is slower than eager on several workers
(docs/performance.md)."""

WITHOUT_REFIT = ("tensorrt_rtx",)
"""Back ends whose plans keep their weights."""


class Engine(Protocol):
    """A network that runs."""

    @property
    def recipe(self) -> EngineRecipe:
        """What it is."""
        ...

    @property
    def back_end(self) -> str:
        """What runs it."""
        ...

    def __call__(self, *given: torch.Tensor) -> Any:
        """Its output, or a tuple of several, of inputs as in the recipe."""
        ...

    def refit(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Take `weights`, all of them or RefitError. After an error the engine must not be used."""
        ...


_Change = tuple[list[int] | None, torch.dtype]
"""Of one input: its shape where it is repeated, and its type."""


class Running:
    """An engine as a network calls it: inputs become the recipe's types, what is alike for all rows is repeated, outputs are of the caller's type."""

    def __init__(self, engine: Engine, outside: nn.Module | None = None) -> None:
        """`outside` takes inputs of lengths that the engine was not built for, which is said once; without it they are an EngineError."""
        self.engine, self._outside, self._told = engine, outside, False
        self._changes: dict[Signature, tuple[Callable[..., Any], list[_Change]]] = {}
        """What runs inputs of a signature, and what is done to each before."""

    @property
    def dtype(self) -> torch.dtype:
        """That activations become: whoever calls with the same tensors again and again may cast them once."""
        return self.engine.recipe.dtype

    def __call__(self, *given: torch.Tensor) -> Any:
        """As the engine."""
        asked = signature(given)
        if asked not in self._changes:  # once for what comes again at every step of every chunk
            self._changes[asked] = self._changed(given)
        run, changes = self._changes[asked]
        ready = []
        for one, (shape, kind) in zip(given, changes, strict=True):
            wide = one if shape is None else one.expand(shape)
            ready.append((wide if wide.dtype == kind else wide.to(kind)).contiguous())
        with torch.no_grad():
            made = run(*ready)
        own = next((one.dtype for one in given if one.is_floating_point()), torch.float32)
        return tuple(one.to(own) for one in made) if isinstance(made, tuple) else made.to(own)

    def _changed(self, given: Sequence[torch.Tensor]) -> tuple[Callable[..., Any], list[_Change]]:
        shapes, recipe = self._repeated(given), self.engine.recipe
        kinds = [recipe.kind_of(binding) for binding in recipe.inputs]
        if self._outside is not None:
            try:
                recipe.check([torch.empty(shape, dtype=kind, device="meta") for shape, kind in zip(shapes, kinds, strict=True)])
            except EngineError as error:
                if not self._told:
                    warnings.warn(f"{error}; until then, eager runs what is outside them", RuntimeWarning, stacklevel=3)
                self._told = True
                # as for the engine: some of what is given may be of the engine's type already, see `dtype`
                own = next((one.dtype for one in self._outside.parameters()), recipe.dtype)
                return self._outside, [(None, own if binding.kind == "model" else recipe.kind_of(binding)) for binding in recipe.inputs]
        changed = (None if shape == list(one.shape) else shape for shape, one in zip(shapes, given, strict=True))
        return self.engine, list(zip(changed, kinds, strict=True))

    def _repeated(self, given: Sequence[torch.Tensor]) -> list[list[int]]:
        recipe = self.engine.recipe
        long: dict[str, int] = {}
        for binding, one in zip(recipe.inputs, given, strict=True):
            for axis, length in zip(binding.axes, one.shape, strict=True):
                long[symbol(axis)] = max(long.get(symbol(axis), 0), length)
        shapes = []
        for binding, one in zip(recipe.inputs, given, strict=True):
            axes = zip(binding.axes.items(), one.shape, strict=True)
            shapes.append([long[symbol(axis)] if isinstance(length, tuple) else now for (axis, length), now in axes])
        return shapes


class BackEnd(Protocol):
    """What a module of a back end holds; see the top."""

    def requires(self) -> str | None: ...
    def versions(self) -> dict[str, str]: ...
    def architecture(self, device: torch.device) -> str: ...
    def build(self, module: nn.Module, recipe: EngineRecipe, folder: Path, arch: str, store: Store) -> None: ...
    def load(self, folder: Path, recipe: EngineRecipe, device: torch.device) -> Engine: ...


def back_end(name: str) -> BackEnd:
    """The back end `name`. Raises ValueError with the nearest name where there is none."""
    if name not in BACK_ENDS:
        raise no_such("back end", name, BACK_ENDS)
    return cast(BackEnd, importlib.import_module(f"worldenv.engines.{name}"))


def compute_capability(device: torch.device) -> str:
    """"sm_90" of a GPU; of a CPU its machine and widest vector unit, since plans for it are machine code."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"sm_{major}{minor}"
    return f"cpu-{platform.machine()}-{torch.backends.cpu.get_cpu_capability().lower()}"


def capability(arch: str) -> tuple[int, int]:
    """(9, 0) of "sm_90". Raises EngineError for another form."""
    found = re.fullmatch(r"sm_(\d+)(\d)", arch)
    if not found:
        raise EngineError(f"{arch}: no architecture of a GPU")
    return int(found.group(1)), int(found.group(2))


def only_here(name: str, arch: str, device: torch.device) -> None:
    """Raises EngineError where `arch` is not this machine's: `name` builds for the machine that it runs on, and for no other."""
    if arch != (here := compute_capability(device)):
        where = f"a machine with a GPU of compute capability {'.'.join(map(str, capability(arch)))}" if arch.startswith("sm_") else "such a machine"
        raise EngineError(f"{name} builds for the machine that it runs on, which is {here}: for {arch}, run worldenv-engine build on {where}")


def wanted(name: str, module: nn.Module, recipe: EngineRecipe, arch: str) -> Wanted:
    """What decides the bytes of a plan of `module`, which is in the recipe's precision."""
    weights = checkpoint.tensors_hash(export.state(module))
    return Wanted(recipe.name, name, arch, recipe.precision, export.architecture(module, recipe), weights, back_end(name).versions())


def planned(
    name: str, module: nn.Module, recipe: EngineRecipe, arch: str, store: Store, recorded: Sequence[Sequence[torch.Tensor]] = ()
) -> Plan:
    """The plan of `module` for `arch` by back end `name`: the one in `store`, or a new one. ModelOpt calibrates fp8 on `recorded` inputs.

    Raises EngineError where a library is missing, this machine cannot build for `arch`, the export or the build fails, or the disk is full.
    """
    chosen = back_end(name)
    if missing := chosen.requires():
        raise EngineError(missing)
    ready = export.prepared(module, recipe, recorded, name)
    return store.get(wanted(name, ready, recipe, arch), lambda folder: chosen.build(ready, recipe, folder, arch, store))

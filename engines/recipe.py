"""What an engine is, as data: its inputs with their ranges, its precision, and how far its outputs may be from eager's.

No runtime is imported here or in a recipe file, so any machine can read and test a recipe.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from worldenv.nouns import Failed

Range = tuple[int, int, int]
"""(min, opt, max) of an axis that may vary; axes of one name are as long in every input (name and name' are one name)."""
Precision = Literal["fp32", "bf16", "fp8"]
Kind = Literal["model", "fp32", "int64", "bool"]

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16, "int64": torch.int64, "bool": torch.bool}
"""Of weights and activations by precision (an fp8 engine is given and gives bfloat16), and of inputs that are no activations."""


_FEW = 64
"""Longest axis of a network of which few shapes come up."""

Signature = tuple[tuple[torch.Size, torch.dtype], ...]
"""Shapes and types of inputs."""


def signature(given: Sequence[torch.Tensor]) -> Signature:
    """Of inputs."""
    return tuple((one.shape, one.dtype) for one in given)


def symbol(axis: str) -> str:
    """The name under which an axis varies: new' is as long as new."""
    return axis.rstrip("'")


class EngineError(Failed):
    """An engine that cannot be exported, built, found, trusted or run. The message names it and the cure."""


def said(error: Exception) -> list[str]:
    """Lines of what another library's `error` says: at least one, its type's name where it says nothing."""
    return str(error).strip().splitlines() or [type(error).__name__]


@dataclass(frozen=True)
class Binding:
    """One input."""

    name: str
    axes: Mapping[str, int | Range]
    """Its axes in order: fixed lengths, or ranges."""
    kind: Kind = "model"
    """model: of the recipe's precision."""
    values: tuple[int, int] = (0, 1)
    """What an int64 input may hold: from the first up to the second, that excluded."""
    spread: float = 1.0
    """Standard deviation of what a random example holds."""

    @property
    def ranged(self) -> list[int]:
        """Which of its axes may vary."""
        return [i for i, length in enumerate(self.axes.values()) if isinstance(length, tuple)]


@dataclass(frozen=True)
class EngineRecipe:
    """One network of the rollout. Everything that decides a plan's bytes but weights, architecture and versions; and how a CPU calls it."""

    name: str
    inputs: tuple[Binding, ...]
    outputs: tuple[str, ...]
    tolerance: float
    """Largest relative L2 distance of an output to that of the network's own module, in the type of that one's weights: float32, but of published
    policies and reflectors bfloat16 (engines/parity.py). After the build and after every refit."""
    precision: Precision = "fp32"
    refit: bool = False
    """Its weights change while it is in use."""
    loop_tolerance: float | None = None
    """The same for what a closed loop of 16 chunks ends with, where this engine is part of one."""
    wide: tuple[str, ...] = ()
    """Parts that stay in float32 whatever the precision: names of modules, as they end."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Settings that the graph has built in."""
    cpu_rows: int | None = None
    """Rows, of the first axis of all that varies, that a CPU's engine computes at once: what lies between its layers then stays in the cache."""

    def __post_init__(self) -> None:
        ranges: dict[str, int | Range] = {}
        for binding in self.inputs:
            for axis, length in binding.axes.items():
                if isinstance(length, tuple) and not 0 <= length[0] <= length[1] <= length[2]:
                    raise ValueError(f"{self.name}.{binding.name}: axis {axis} {length}: want min <= opt <= max")
                if isinstance(length, tuple) and ranges.setdefault(symbol(axis), length) != length:
                    raise ValueError(f"{self.name}: axis {axis} is {ranges[symbol(axis)]} and {length}: one name, one range")
        if len({binding.name for binding in self.inputs}) < len(self.inputs):
            raise ValueError(f"{self.name}: two inputs of one name")
        if self.cpu_rows is not None and (self.cpu_rows < 1 or len(ranges) != 1 or any(one.ranged not in ([], [0]) for one in self.inputs)):
            raise ValueError(f"{self.name}: cpu_rows={self.cpu_rows}: want at least 1, and one axis that varies, the first of its inputs")

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""
        return DTYPES[self.precision]

    @property
    def ranges(self) -> dict[str, Range]:
        """The axes that may vary."""
        return {symbol(axis): length for one in self.inputs for axis, length in one.axes.items() if isinstance(length, tuple)}

    @property
    def few(self) -> bool:
        """Whether few shapes come up, each of them often. Where an axis is long, as in a language model, nothing is kept for each shape."""
        return all(high <= _FEW for _, _, high in self.ranges.values())

    def kind_of(self, binding: Binding) -> torch.dtype:
        """The type of one input."""
        return self.dtype if binding.kind == "model" else DTYPES[binding.kind]

    def shape(self, binding: Binding, at: int | Mapping[str, int]) -> tuple[int, ...]:
        """Of one input: at 0 (min), 1 (opt), 2 (max), or at named lengths, the rest at opt."""
        lengths = []
        for axis, length in binding.axes.items():
            if isinstance(length, int):
                lengths.append(length)
            else:
                lengths.append(length[at] if isinstance(at, int) else at.get(symbol(axis), length[1]))
        return tuple(lengths)

    def example(self, at: int | Mapping[str, int] = 1, seed: int = 0, device: str = "cpu") -> tuple[torch.Tensor, ...]:
        """Random inputs of these lengths (as in `shape`), a function of `seed`."""
        generator = torch.Generator("cpu").manual_seed(seed)
        made = []
        for binding in self.inputs:
            shape, dtype = self.shape(binding, at), self.kind_of(binding)
            if dtype == torch.int64:
                value = torch.randint(*binding.values, shape, generator=generator)
            elif dtype == torch.bool:
                value = torch.ones(shape, dtype=torch.bool)
            else:
                value = (binding.spread * torch.randn(shape, generator=generator)).to(dtype)
            made.append(value.to(device))
        return tuple(made)

    def lengths(self, given: Sequence[torch.Tensor]) -> dict[str, int]:
        """Of the axes that may vary, in inputs that `check` has let pass."""
        return {
            symbol(axis): now
            for binding, one in zip(self.inputs, given, strict=True)
            for (axis, length), now in zip(binding.axes.items(), one.shape, strict=True)
            if isinstance(length, tuple)
        }

    def check(self, given: Sequence[torch.Tensor]) -> None:
        """Raises EngineError that names an input of another type or of a length outside its range."""
        passed: set[Signature] = self.__dict__.setdefault("_passed", set())  # a step that a GPU does in milliseconds has no time to be asked again
        if (asked := signature(given)) in passed:
            return
        if len(given) != len(self.inputs):
            raise EngineError(f"{self.name}: {len(given)} inputs, want {len(self.inputs)}: {', '.join(one.name for one in self.inputs)}")
        seen: dict[str, int] = {}
        for binding, tensor in zip(self.inputs, given, strict=True):
            wrong = tensor.dtype != self.kind_of(binding) or tensor.dim() != len(binding.axes)
            for (axis, length), now in zip(binding.axes.items(), tensor.shape, strict=False):
                low, high = (length[0], length[2]) if isinstance(length, tuple) else (length, length)
                wrong = wrong or not low <= now <= high or (isinstance(length, tuple) and seen.setdefault(symbol(axis), now) != now)
            if wrong:
                want = ", ".join(f"{axis} {n if isinstance(n, int) else f'{n[0]}..{n[2]}'}" for axis, n in binding.axes.items())
                raise EngineError(
                    f"{self.name}: input {binding.name} is {tuple(tensor.shape)} {tensor.dtype}, want ({want}) {self.kind_of(binding)}; "
                    "build the engine anew with ranges that hold it"
                )
        passed.add(asked)

    def plain(self) -> dict[str, Any]:
        """What decides a plan's bytes, JSON-ready."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "cpu_rows"}


def relative_error(ours: torch.Tensor, want: torch.Tensor) -> float:
    """Relative L2 distance, in float64; infinite where a value of either is not finite or the shapes differ."""
    if ours.shape != want.shape or not all(bool(torch.isfinite(one).all()) for one in (ours, want)):
        return float("inf")
    want = want.double()
    distance, size = torch.linalg.vector_norm(ours.double() - want), torch.linalg.vector_norm(want)
    return float(distance / size) if float(size) else float(distance)

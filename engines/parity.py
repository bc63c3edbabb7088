"""Does an engine compute what eager does? Relative L2 on recorded inputs, after every build and every refit; JSON beside the plan.

An engine that fails is not used. What is compared with is the network's own module in eager mode, in the type that its weights have:

    trained here, float32               every engine with float32, also where its precision is bf16 or fp8
    published policy or reflector       bf16 with bf16: there is no wider original. LoRA is added in float32 and rounded to bf16 in an engine,
                                        in the module it is a product of its own
    speedup                             with what eager would run in the engine's place: in the engine's precision where the network does not train
                                        (`Choice.eager`); that is not compared, since `export.prepared` is all that it differs by
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from worldenv.engines.recipe import EngineRecipe, relative_error

LOOP_CHUNKS = (1, 4, 16)
"""After which chunks of a closed loop a simulator is compared again."""
_PAIRS = 7


@dataclass(frozen=True)
class Parity:
    """How one engine compared."""

    engine: str
    back_end: str
    max_rel_error: float
    """Largest relative L2 distance of an output, over all inputs."""
    tolerance: float
    inputs: int
    """Recorded calls compared."""
    loop: Mapping[str, float] = field(default_factory=dict)
    """Relative L2 distance of what a closed loop has made, by its number of chunks."""
    loop_tolerance: float | None = None
    speedup: float | None = None
    """Median over pairs of the time that eager would take in the engine's place to the engine's, on the recorded inputs."""
    refits: int = 0
    """Refits before this comparison."""
    refit_s: float | None = None
    """That the last one took."""

    @property
    def passed(self) -> bool:
        """An error that is not a number fails."""
        limit = self.tolerance if self.loop_tolerance is None else self.loop_tolerance
        return self.max_rel_error <= self.tolerance and all(error <= limit for error in self.loop.values())

    def plain(self) -> dict[str, Any]:
        """JSON-ready: what is not finite becomes text."""
        found = {**asdict(self), "passed": self.passed}
        found["loop"] = {name: _finite(error) for name, error in self.loop.items()}
        return {**found, "max_rel_error": _finite(self.max_rel_error)}

    @property
    def said(self) -> str:
        """One line."""
        loop = "".join(f", {error:.1e} after {chunks} chunks" for chunks, error in self.loop.items())
        faster = "" if self.speedup is None else f", {self.speedup:.2f}x eager"
        return f"error {self.max_rel_error:.1e}{loop}, limit {self.tolerance:.0e}{faster}: {'passed' if self.passed else 'FAILED'}"


def _finite(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def outputs(made: Any) -> tuple[torch.Tensor, ...]:
    """Of a call, as a tuple."""
    return made if isinstance(made, tuple) else (made,)


def compare(
    recipe: EngineRecipe, back_end: str, engine: Callable[..., Any], eager: Callable[..., Any], recorded: Sequence[Sequence[torch.Tensor]],
    rival: Callable[..., Any] | None = None,
) -> Parity:  # fmt: skip
    """Both on the same inputs; with `rival`, how much faster than that the engine is as well. ValueError where nothing was recorded."""
    if not recorded:
        raise ValueError(f"{recipe.name}: no inputs were recorded to compare on")
    worst = 0.0
    with torch.no_grad():
        for given in recorded:
            ours, want = outputs(engine(*given)), outputs(eager(*given))
            if len(ours) != len(want):
                return Parity(recipe.name, back_end, math.inf, recipe.tolerance, len(recorded))
            worst = max(worst, *(relative_error(a.float().cpu(), b.float().cpu()) for a, b in zip(ours, want, strict=True)))
        speedup = None if rival is None else _speedup(engine, rival, max(recorded, key=lambda given: sum(one.numel() for one in given)))
    return Parity(recipe.name, back_end, worst, recipe.tolerance, len(recorded), speedup=speedup)


def _speedup(engine: Callable[..., Any], eager: Callable[..., Any], given: Sequence[torch.Tensor]) -> float:
    """Median of the ratios of neighbouring calls: of CPU time on a CPU, which others on the machine change less."""
    clock = time.perf_counter if given[0].is_cuda else time.process_time

    def seconds(call: Callable[..., Any]) -> float:
        began = clock()
        call(*given)
        if given[0].is_cuda:
            torch.cuda.synchronize(given[0].device)
        return clock() - began

    seconds(engine)
    seconds(eager)
    return statistics.median(seconds(eager) / max(seconds(engine), 1e-9) for _ in range(_PAIRS))


class Recorder:
    """Stands in for a network and keeps what it is given: `most` calls at most, of different shapes first."""

    def __init__(self, call: Callable[..., Any], most: int = 4) -> None:
        self._call, self._most = call, most
        self._kept: list[tuple[torch.Tensor, ...]] = []

    def __call__(self, *given: torch.Tensor) -> Any:
        """The network's own answer."""
        shapes = [tuple(one.shape for one in kept) for kept in self._kept]
        if len(self._kept) < self._most or tuple(one.shape for one in given) not in shapes:
            self._kept.append(tuple(one.detach().clone() for one in given))
            if len(self._kept) > self._most:  # one of a shape that is there twice goes, the oldest of all otherwise
                twice = next((i for i, shape in enumerate(shapes) if shapes.count(shape) > 1), 0)
                del self._kept[twice]
        return self._call(*given)

    @property
    def recorded(self) -> list[tuple[torch.Tensor, ...]]:
        """What was kept."""
        return self._kept

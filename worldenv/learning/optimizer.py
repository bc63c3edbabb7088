"""What several stages want of an optimizer: a batch in pieces, a rate that rises and falls, and a state that comes back from a file."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch


def pieces(count: int, most: int) -> Iterator[tuple[float, slice]]:
    """All of `count` rows in order, at most `most` at a time, each piece with its share of them: what its mean loss weighs."""
    for start in range(0, count, most):
        stop = min(start + most, count)
        yield (stop - start) / count, slice(start, stop)


def one_cycle(step: int, steps: int, peak: float, rise: float = 0.1) -> float:
    """Learning rate of `step`: a straight rise to `peak` over the first share of steps, then half a cosine down to 0."""
    done = (step + 1) / steps
    return peak * (done / rise if done < rise else 0.5 * (1.0 + math.cos(math.pi * (done - rise) / (1.0 - rise))))


def restore(optimizer: torch.optim.Optimizer, kept: dict[str, Any]) -> None:
    """Load an optimizer's kept state, each moment laid out in memory as its parameter: the fused step walks both side by side.

    Files hold plain layouts, convolution weights are channels-last.
    """
    optimizer.load_state_dict(kept)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for name, value in optimizer.state[parameter].items():
                if value.shape == parameter.shape:
                    optimizer.state[parameter][name] = torch.empty_like(parameter).copy_(value)

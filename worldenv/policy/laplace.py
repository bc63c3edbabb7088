"""The policy's density: independent Laplace over the action dimensions (paper, section 4.3; Eq. 8).

    log p(a) = -|a - mu| / b - log(2 b)        b = factor * min(max(exp(beta), floor), ceiling)

`factor`, `floor` and `ceiling` are part of the density: what is drawn and what is scored is one and the same distribution. Factor 1, floor 0
and no ceiling are the paper. Every function works in the dtype that it is given; the policy gives float32 and draws in float64.
Drawing and scoring are `worldenv.kernels.laplace`.
"""

from __future__ import annotations

import math

import torch

from worldenv.kernels.laplace import draw, log_density, log_prob, sample

__all__ = ["draw", "entropy", "log_density", "log_prob", "nll", "sample", "scale"]


def scale(beta: torch.Tensor, factor: float, floor: float, ceiling: float | None = None) -> torch.Tensor:
    """log b of the density, like `beta`; where floor or ceiling hold, beta gets no gradient.

    ValueError unless factor > 0 and 0 <= floor < ceiling.
    """
    if not factor > 0 or not 0 <= floor < (math.inf if ceiling is None else ceiling):
        raise ValueError(f"Laplace scale: factor {factor}, floor {floor}, ceiling {ceiling}: want factor > 0, 0 <= floor < ceiling")
    held = beta.clamp_min(math.log(floor)) if floor else beta
    held = held if ceiling is None else held.clamp_max(math.log(ceiling))
    return held + math.log(factor)


def nll(action: torch.Tensor, mu: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
    """Mean negative log-density over all elements (Eq. 8): a scalar."""
    return -log_density(action, mu, log_scale).mean()


def entropy(log_scale: torch.Tensor) -> torch.Tensor:
    """Differential entropy of each dimension [nat]: 1 + log(2 b)."""
    return 1.0 + math.log(2.0) + log_scale

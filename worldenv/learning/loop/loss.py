"""The clipped surrogate, per executed step (paper, Eq. 5; Schulman et al. 2017, arXiv:1707.06347).

    L = -1/T sum min(r A, clip(r, 1 - eps, 1 + eps) A)        r = exp(log p_new - log p_old) of one executed step

over the executed steps; log p is summed over the action dimensions, never over the chunk. T counts executed steps, so each step weighs the
same and a long rollout more than a short one (RIPT-VLA weighs rollouts alike).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from worldenv.kernels import laplace


@dataclass(frozen=True)
class Surrogate:
    """The loss and what it was made of."""

    loss: torch.Tensor
    """Scalar."""
    ratio: torch.Tensor
    """(B, K); 0 where nothing was executed. Without gradient."""
    clipped: torch.Tensor
    """(B, K) bool: executed steps whose clipped branch counts, so that they give no gradient."""
    kl: torch.Tensor
    """(B, K): r - 1 - log r, whose mean estimates KL(old, new) [nat] without bias; 0 where nothing was executed. Without gradient."""


def surrogate(
    new: torch.Tensor, old: torch.Tensor, advantage: torch.Tensor, live: torch.Tensor, clip: float, steps: float | None = None
) -> Surrogate:
    """Loss of log-densities `new` and `old` (B, K) with `advantage` (B,) over the executed steps `live` (B, K) bool.

    `steps` is the divisor T; without it, the executed steps here. Values outside `live` do not matter, not even nan.
    """
    made = laplace.clipped(new, old, advantage, live, clip)
    count = steps if steps is not None else float(live.sum())
    if count <= 0:
        raise ValueError("surrogate: no executed step")
    return Surrogate(-made.gain.sum() / count, made.ratio, made.clipped, made.kl)

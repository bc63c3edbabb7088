"""kernels/group_norm.py: GroupNorm with the channels last, as the simulator's networks keep their activations.

    y[n, p, c] = (x[n, p, c] - mean[n, g]) / sqrt(var[n, g] + eps) * weight[c] + bias[c]
with mean and (biased) variance over all p and the channels of group g: the mean of the channels' own variances, and the variance of their means.
Source: Wu & He 2018 (arXiv:1803.08494) eq. 1 to 6.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

_SMALL = 2**16
"""Values up to which a CPU spends more time on calling operations than on memory."""


def group_norm_ref(x: torch.Tensor, groups: int, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """The definition, in float64."""
    return F.group_norm(x.double().transpose(1, 2), groups, weight.double(), bias.double(), eps).transpose(1, 2)


def _as_graph(x: torch.Tensor, groups: int, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """For whoever compiles a graph: one form for all sizes, of operators that every runtime has; statistics run along whole rows of channels.

    Sums are of what is away from the first pixel, which costs one pass over `x`: away from the mean they would cost two.
    """
    wide, (count, _, channels) = x.float(), x.shape
    first = wide[:, :1]
    away = wide - first
    of, square = (one.view(count, groups, channels // groups) for one in (away.mean(1), (away * away).mean(1)))
    center = first.view(count, groups, channels // groups) + of
    mean = center.mean(-1, keepdim=True)
    apart = center - mean
    variance = ((square - of * of).clamp_min(0.0) + apart * apart).mean(-1, keepdim=True)
    scale = torch.rsqrt(variance + eps) * weight.view(groups, -1)
    shift = bias.view(groups, -1) - mean * scale
    return (wide * scale.view(count, 1, channels) + shift.view(count, 1, channels)).to(x.dtype)


def group_norm(x: torch.Tensor, groups: int, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalise `x` (N, P, C); `weight`, `bias` (C,). Returns a tensor like `x`; statistics in float32 or wider.

    Sums over pixels run along whole rows of channels: with 32 groups of 2 to 10 channels, torch's own channels-last kernel takes 2 to 4 times
    as long on a CPU. Small pictures cost as much as there are operations: torch's channels-first kernel, with a copy before and behind it.
    Raises ValueError where `groups` does not divide C.
    """
    count, pixels, channels = x.shape
    if channels % groups:
        raise ValueError(f"group_norm: {channels} channels in {groups} groups")
    if torch.compiler.is_exporting():
        return _as_graph(x, groups, weight, bias, eps)
    if x.device.type == "cpu" and x.numel() <= _SMALL:
        return F.group_norm(x.transpose(1, 2).contiguous(), groups, weight, bias, eps).transpose(1, 2).contiguous()
    # a channel's variance is about its own mean: E[x^2] - E[x]^2 loses what the mean is wider than the spread, twice
    if x.element_size() < 4:  # read in its own type, summed in float32: no wide copy is made, and 8 bits hold no such mean to begin with
        center = x.mean(1, dtype=torch.float32)
        square = torch.linalg.vector_norm(x, dim=1, dtype=torch.float32).square() / pixels
        within = torch.addcmul(square, center, center, value=-1.0).clamp_min(0.0)
    else:
        center = x.mean(1)
        within = (x - center[:, None]).square_().mean(1)  # one wide tensor; with gradients two
    center, within = center.view(count, groups, -1), within.view(count, groups, -1)
    mean = center.mean(-1, keepdim=True)
    scale = torch.rsqrt((within + (center - mean).square()).mean(-1, keepdim=True).add_(eps)) * weight.view(groups, -1)
    shift = torch.addcmul(bias.view(groups, -1), mean, scale, value=-1.0)
    return torch.addcmul(shift.view(count, 1, channels), x, scale.view(count, 1, channels)).to(x.dtype)

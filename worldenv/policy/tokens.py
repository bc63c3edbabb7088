"""OpenVLA's action tokens: which token an action is, which action a token is, and the distribution over them, drawn and scored.

    digit d(a) = how many of 256 edges, evenly from -1 to 1, are not above a      1 .. 256, a clipped to [-1, 1] before
    token id   = 32000 - d                                                        the last 256 that Llama knows, downwards
    action(d)  = the middle between edges d and d + 1; of 256 as of 255           256 edges have 255 intervals

So digit 256 is the action 1 alone, and is executed as the interval below it. A row of the head is a token, in the order of ids: row = 256 - d.
A chunk's 7 K tokens are independent given what the network saw (parallel decoding): one pass, no token sees another. The softmax is over these 256
tokens, as it is where such policies are sampled for reinforcement learning; the published fine-tuning takes it over the whole vocabulary, the rest
of which a fine-tuned model has learned not to say.
Sources: Kim et al. 2024 (arXiv:2406.09246), section 3.2; in parallel: Kim et al. 2025 (arXiv:2502.19645); behaviour of both published codes.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

BINS = 256
"""Tokens per dimension."""
_EDGES = torch.from_numpy(np.linspace(-1.0, 1.0, BINS))
_CENTRES = torch.cat([_EDGES[:-1] + _EDGES[1:], _EDGES[-2:-1] + _EDGES[-1:]]).flip(0) / 2.0
"""Of each row."""


def of_actions(action: torch.Tensor) -> torch.Tensor:
    """Rows (...) int64 of normalised actions (...)."""
    return BINS - torch.bucketize(action.double().clamp(-1.0, 1.0), _EDGES.to(action.device), right=True)


def to_actions(row: torch.Tensor) -> torch.Tensor:
    """Normalised actions (...) float32 of rows (...) int64."""
    return _CENTRES.float().to(row.device)[row]


def draw(logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Rows (...) int64 that `uniform` (...) in (0, 1) stands for, by the inverse CDF over actions from -1 upwards; logits (..., 256).

    In float64; a token of probability 0 is never drawn.
    """
    below = logits.double().softmax(-1).flip(-1).cumsum(-1)
    digits = torch.searchsorted(below / below[..., -1:], uniform.to(below)[..., None], right=True)
    return BINS - 1 - digits[..., 0]


def log_prob(logits: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """log p of each step [nat]: logits (..., D, 256), rows (..., D) -> (...)."""
    return logits.log_softmax(-1).gather(-1, row[..., None])[..., 0].sum(-1)


def cross_entropy(logits: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
    """Mean over all tokens [nat]: logits (..., 256), normalised actions (...) -> a scalar."""
    return F.cross_entropy(logits.flatten(0, -2), of_actions(action).flatten())

"""What a policy is to the rest: observations in, action chunks out."""

from __future__ import annotations

from typing import Protocol

import torch

from worldenv.nouns import ActionChunk, Observation


class Policy(Protocol):
    """One query gives a chunk of K actions; the same weights, observation and noise give the same chunk."""

    @property
    def chunk(self) -> int:
        """Actions per query (K)."""
        ...

    def act(self, observation: Observation, uniform: torch.Tensor | None = None) -> ActionChunk:
        """Answer B observations, without gradients.

        `uniform` (B, K, 7) float64 in (0, 1) draws each action by the inverse CDF of its distribution, a Laplace density or that of OpenVLA's
        tokens; without it the answer is greedy (action = mu).
        """
        ...

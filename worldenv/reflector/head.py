"""The reward head: the pooled embedding of a video and its question becomes one logit (paper, eq. 3 and appendix B.3).

The paper gives neither its layers nor the pooling; a LayerNorm before two layers takes the backbone's scale out of the learning rate.
"""

from __future__ import annotations

import torch
from torch import nn


class RewardHead(nn.Module):
    """LayerNorm, Linear, GELU, Linear; float32 whatever the backbone runs in."""

    def __init__(self, width: int, hidden: int) -> None:
        """`width` channels of an embedding, `hidden` channels inside."""
        super().__init__()
        self.norm = nn.LayerNorm(width, dtype=torch.float32)
        self.inner = nn.Linear(width, hidden, dtype=torch.float32)
        self.outer = nn.Linear(hidden, 1, dtype=torch.float32)

    def forward(self, embedding: torch.Tensor) -> torch.Tensor:
        """Logits (...,) float32 of embeddings (..., width)."""
        logit: torch.Tensor = self.outer(nn.functional.gelu(self.inner(self.norm(embedding.float()))))
        return logit[..., 0]

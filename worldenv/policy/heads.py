"""What reads the hiddens of the action slots, and what writes the proprio token. Float32 whatever the backbone computes in.

Names of parameters are those of the published files: `action_head--N_checkpoint.pt` (model.*), `proprio_projector--N_checkpoint.pt`
(fc1, fc2), and of RIPT-VLA's `*_scale_header.pth` (trunk.*, log_b_head.*).
Sources: Kim et al. 2025 (arXiv:2502.19645) for the L1 head; paper, appendix B.1, and Tan et al. 2025 (arXiv:2505.17016) for the scale head.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import nn

from worldenv.nouns import ACTION_DIM
from worldenv.policy.tokens import BINS

LOG_SCALE_START = -3.0
"""The scale head's bias before training: b = 0.05."""


@torch.no_grad()
def begin(module: nn.Module, generator: torch.Generator) -> None:
    """Random weights of the policy's networks, all from `generator`: matrices and tokens truncated normal, norms 1, biases 0."""
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            token = name.endswith(("pos_embed", "cls_token", "reg_token", "embed_tokens.weight"))
            std = 0.02 if token else parameter[0].numel() ** -0.5
            drawn = torch.empty(parameter.shape, device=generator.device)
            parameter.copy_(nn.init.trunc_normal_(drawn, std=std, a=-2 * std, b=2 * std, generator=generator))


class _ResidualBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, x + self.ffn(x))


class MLPResNet(nn.Module):
    """norm, linear, ReLU; `blocks` times x + ReLU(linear(norm x)); norm, linear. No activation at the end."""

    def __init__(self, inputs: int, hidden: int, outputs: int, blocks: int = 2) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(inputs)
        self.fc1 = nn.Linear(inputs, hidden)
        self.mlp_resnet_blocks = nn.ModuleList(_ResidualBlock(hidden) for _ in range(blocks))
        self.layer_norm2 = nn.LayerNorm(hidden)
        self.fc2 = nn.Linear(hidden, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., inputs) -> (..., outputs)."""
        x = F.relu(self.fc1(self.layer_norm1(x)))
        for block in self.mlp_resnet_blocks:
            x = block(x)
        return cast(torch.Tensor, self.fc2(self.layer_norm2(x)))


def by_step(hidden: torch.Tensor) -> torch.Tensor:
    """Hiddens (B, 7 K, width) of the action slots as one row per step (B, K, 7 width), float32; slot = step * 7 + dimension."""
    batch, slots, width = hidden.shape
    return hidden.float().reshape(batch, slots // ACTION_DIM, ACTION_DIM * width)


class L1Head(nn.Module):
    """Hiddens (B, 7 K, width) -> location mu (B, K, 7) float32, normalised, not clamped."""

    def __init__(self, width: int, hidden: int, blocks: int = 2) -> None:
        super().__init__()
        self.model = MLPResNet(ACTION_DIM * width, hidden, ACTION_DIM, blocks)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """See the class."""
        return cast(torch.Tensor, self.model(by_step(hidden)))


class ScaleHead(nn.Module):
    """Hiddens (B, 7 K, width) -> log-scale beta (B, K, 7) float32, before factor and floor.

    form "mlp" is the paper's (the L1 head's architecture); "trunk" is RIPT-VLA's: one more linear layer after a trunk as wide as inside.
    """

    def __init__(self, width: int, hidden: int, blocks: int = 2, form: Literal["mlp", "trunk"] = "mlp") -> None:
        super().__init__()
        self.form = form
        if form == "mlp":
            self.model = MLPResNet(ACTION_DIM * width, hidden, ACTION_DIM, blocks)
        else:
            self.trunk = MLPResNet(ACTION_DIM * width, hidden, hidden, blocks)
            self.log_b_head = nn.Linear(hidden, ACTION_DIM)

    @property
    def last(self) -> nn.Linear:
        """The layer that puts out beta."""
        return self.model.fc2 if self.form == "mlp" else self.log_b_head

    @torch.no_grad()
    def begin(self) -> None:
        """The published start, on random weights: b = exp(-3), a small last layer."""
        self.last.weight.mul_(0.01)
        self.last.bias.fill_(LOG_SCALE_START)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """See the class."""
        rows = by_step(hidden)
        return cast(torch.Tensor, self.model(rows) if self.form == "mlp" else self.log_b_head(self.trunk(rows)))


class TokenHead(nn.Linear):
    """Hiddens (B, 7 K, width) -> logits (B, K, 7, 256) float32 of the action tokens; the rows of a language model's output layer that they have."""

    def __init__(self, width: int) -> None:
        super().__init__(width, BINS, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """See the class."""
        batch, slots, _ = hidden.shape
        return super().forward(hidden.float()).view(batch, slots // ACTION_DIM, ACTION_DIM, BINS)


class ProprioProjector(nn.Module):
    """Normalised proprio (B, P) -> one token (B, width)."""

    def __init__(self, proprio: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(proprio, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, proprio: torch.Tensor) -> torch.Tensor:
        """See the class."""
        return cast(torch.Tensor, self.fc2(F.gelu(self.fc1(proprio))))

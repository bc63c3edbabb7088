"""The policy's networks as functions of tensors alone: what may be run by something else than eager PyTorch while it acts.

Learning is not: `OpenVLAOFT.evaluate_actions` always goes through the modules, which have gradients.
"""

from __future__ import annotations

import torch
from torch import nn

from worldenv.policy.openvla_oft import BACKBONE, HEADS, Network

READERS = ("action_head", "scale_head", "token_head")
"""What of a network reads its hiddens: no part of the backbone's graph."""


class Backbone(nn.Module):
    """A query to the hiddens of its action slots."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: torch.Tensor, ids: torch.Tensor, lengths: torch.Tensor, proprio: torch.Tensor) -> torch.Tensor:
        """Hiddens (B, 7 K, width); arguments as of `Query`, the lengths always given."""
        hidden: torch.Tensor = self.network(pixels, ids, lengths, proprio)
        return hidden


class Heads(nn.Module):
    """Hiddens to mu and beta."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.action_head, self.scale_head = network.action_head, network.scale_head

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, K, 7) float32 each, of hiddens (B, 7 K, width)."""
        return self.action_head(hidden), self.scale_head(hidden)


def graphs(network: Network) -> dict[str, nn.Module]:
    """Both, by name; of a policy of tokens the backbone alone, since its head is one product."""
    found: dict[str, nn.Module] = {BACKBONE: Backbone(network)}
    return found if network.config.head == "tokens" else found | {HEADS: Heads(network)}

"""The simulator's networks as functions of tensors alone: what may be run by something else than eager PyTorch.

A simulator holds one callable per name (`Evac.runs`), which in the beginning are these modules. Whoever compiles them gives it others.
"""

from __future__ import annotations

import torch
from torch import nn

from worldenv.simulator.unet import KeysValues, UNet
from worldenv.simulator.vae import VAE

UNET, ENCODER, DECODER = "simulator_unet", "simulator_vae_encoder", "simulator_vae_decoder"


class UNetStep(nn.Module):
    """One denoising step."""

    def __init__(self, unet: UNet, memory: int) -> None:
        super().__init__()
        self.unet, self.memory = unet, memory

    def forward(self, x: torch.Tensor, memory_row: torch.Tensor, chunk_row: torch.Tensor, *pairs: torch.Tensor) -> torch.Tensor:
        """v (B, z, T, h, w); arguments as of `UNet.denoise`, `pairs` key, value, key, value ... of its attention blocks."""
        views = [KeysValues(key, value) for key, value in zip(pairs[::2], pairs[1::2], strict=True)]
        return self.unet.denoise(x, memory_row, chunk_row, views, self.memory)


class Encode(nn.Module):
    """Pictures to moments."""

    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-variance (N, z, h, w) of pictures (N, 3, H, W) in [-1, 1]."""
        posterior = self.vae.encode(pictures)
        return posterior.mean, posterior.logvar


class Decode(nn.Module):
    """Latents to pictures."""

    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) in about [-1, 1] of unscaled latents (N, z, h, w)."""
        return self.vae.decode(latents)


def graphs(unet: UNet, vae: VAE, memory: int) -> dict[str, nn.Module]:
    """All three, by name."""
    return {UNET: UNetStep(unet, memory), ENCODER: Encode(vae), DECODER: Decode(vae)}

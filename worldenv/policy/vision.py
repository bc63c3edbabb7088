"""The policy's eyes: DINOv2 with registers and SigLIP, patch features of the second-to-last block.

Names of parameters are those of the published OpenVLA-OFT checkpoints (timm's, with LayerScale's gamma called `scale_factor`).
Both towers: x = patches + positions; x += attention(norm(x)); x += mlp(norm(x)), LayerNorm eps 1e-6, exact (erf) GELU. DINOv2 puts a
class token and registers, which have no position, before the patches and scales both branches. The published model takes the output of
block n - 2 of n without a final norm, so the last block and that norm are never built here: leaving them out is exact.
Sources: Oquab et al. 2023 (arXiv:2304.07193), Darcet et al. 2023 (arXiv:2309.16588), Zhai et al. 2023 (arXiv:2303.15343),
Karamcheti et al. 2024 (arXiv:2402.07865) for taking both.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from worldenv.config import VisionConfig

_NORM_EPS = 1e-6


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        parts = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = parts[0], parts[1], parts[2]
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        return cast(torch.Tensor, self.proj(mixed))


class _MLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.fc2(F.gelu(self.fc1(x))))


class LayerScale(nn.Module):
    """A factor per channel on a residual branch (Touvron et al. 2021, arXiv:2103.17239)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale_factor = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` (..., width), scaled."""
        return x * self.scale_factor


class _Block(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=_NORM_EPS)
        self.attn = _Attention(config.width, config.heads)
        self.ls1 = LayerScale(config.width) if config.registers else nn.Identity()
        self.norm2 = nn.LayerNorm(config.width, eps=_NORM_EPS)
        self.mlp = _MLP(config.width, config.mlp)
        self.ls2 = LayerScale(config.width) if config.registers else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return cast(torch.Tensor, x + self.ls2(self.mlp(self.norm2(x))))


class _PatchEmbed(nn.Module):
    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, stride=patch)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.proj(pixels)).flatten(2).transpose(1, 2)


class VisionTower(nn.Module):
    """One tower: normalised pixels (B, 3, S, S) to patch features (B, N, width) of block depth - 2, N = (S / patch)^2."""

    def __init__(self, config: VisionConfig, image: int) -> None:
        super().__init__()
        self.patches = (image // config.patch) ** 2
        self.patch_embed = _PatchEmbed(config.patch, config.width)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.patches, config.width))
        self._prefix = 0
        if config.registers:
            self._prefix = 1 + config.registers
            self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
            self.reg_token = nn.Parameter(torch.zeros(1, config.registers, config.width))
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.depth - 1))
        self.recompute = False
        """Compute a block again in the backward pass instead of remembering what is inside it."""

    @torch.no_grad()
    def begin(self) -> None:
        """Positions to start training from: sines and cosines of both axes (Chen et al. 2021, arXiv:2104.02057), as strong as a patch's content.

        Drawn at 0.02 as in models that are trained for long, they drown in it: a small tower does not find out within 1500 steps where a thing is.
        """
        side, quarter = math.isqrt(self.patches), self.pos_embed.shape[-1] // 4
        place = torch.arange(side) / side
        y, x = torch.meshgrid(place, place, indexing="ij")
        rate = 4.0 * math.pi * 100.0 ** (-torch.arange(quarter) / max(1, quarter))
        angle = torch.cat([x.reshape(-1, 1) * rate, y.reshape(-1, 1) * rate], dim=1)
        self.pos_embed.zero_()
        self.pos_embed[0, :, : 4 * quarter] = torch.cat([angle.sin(), angle.cos()], dim=1)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """See the class."""
        x = self.patch_embed(pixels) + self.pos_embed
        if self._prefix:
            first = torch.cat([self.cls_token, self.reg_token], dim=1).expand(x.shape[0], -1, -1)
            x = torch.cat([first, x], dim=1)
        again = self.recompute and torch.is_grad_enabled()
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False) if again else block(x)
        return cast(torch.Tensor, x[:, self._prefix :])


class VisionBackbone(nn.Module):
    """Both towers on every view; features are concatenated on channels, DINOv2 first."""

    def __init__(self, dino: VisionConfig, siglip: VisionConfig, image: int) -> None:
        super().__init__()
        self.featurizer = VisionTower(dino, image)
        self.fused_featurizer = VisionTower(siglip, image)
        self.patches = self.featurizer.patches

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """`pixels` (B, 6 V, S, S): per view three channels normalised for DINOv2, then three for SigLIP.

        Returns (B, V N, dino width + siglip width), view after view.
        """
        batch, channels, height, width = pixels.shape
        views = pixels.reshape(batch * (channels // 6), 6, height, width)
        features = torch.cat([self.featurizer(views[:, :3]), self.fused_featurizer(views[:, 3:])], dim=-1)
        return features.reshape(batch, -1, features.shape[-1])

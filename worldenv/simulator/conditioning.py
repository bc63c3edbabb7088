"""What the simulator is told besides maps: tokens of the first picture (CLIP tower, resampler) and of the motion (resampler).

Parameters carry the names of the released checkpoints: open_clip's for the tower, the Perceiver resampler's for the two others.
Sources: Radford et al. 2021 (arXiv:2103.00020), ViT-H/14 of open_clip (laion2b_s32b_b79k); Perceiver resampler: Alayrac et al. 2022
(arXiv:2204.14198) sec. 3.1.1, as in IP-Adapter (arXiv:2308.06721) and DynamiCrafter (arXiv:2310.12190).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from worldenv.config import ClipConfig, ResamplerConfig

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_MLP_MULT = 4


def _blur_kernel(sigma: float, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """A normalised Gaussian of odd length, about 4 sigma long, at least 3."""
    size = int(max(4.0 * sigma, 3.0))
    size += 1 - size % 2
    offset = torch.arange(size, device=device, dtype=dtype) - size // 2
    weight = torch.exp(-0.5 * (offset / sigma) ** 2)
    return weight / weight.sum()


def clip_picture(pictures: torch.Tensor, side: int) -> torch.Tensor:
    """What the tower sees (B, 3, side, side) of `pictures` (B, 3, H, W) in [-1, 1]: squeezed to a square, in CLIP's range.

    Bicubic between aligned corners after a Gaussian blur of (factor - 1) / 2 pixels along shrinking axes (kornia's antialiased resize).
    """
    factors = (pictures.shape[-2] / side, pictures.shape[-1] / side)
    if max(factors) > 1.0:
        for axis, factor in enumerate(factors):
            kernel = _blur_kernel(max((factor - 1.0) / 2.0, 0.001), pictures.device, pictures.dtype)
            pad = (0, 0, len(kernel) // 2, len(kernel) // 2) if axis == 0 else (len(kernel) // 2, len(kernel) // 2, 0, 0)
            shape = (1, 1, -1, 1) if axis == 0 else (1, 1, 1, -1)
            flat = F.pad(pictures, pad, mode="reflect").flatten(0, 1)[:, None]
            pictures = F.conv2d(flat, kernel.view(shape)).view(*pictures.shape[:2], *pictures.shape[2:])
    if pictures.shape[-2:] != (side, side):
        pictures = F.interpolate(pictures, (side, side), mode="bicubic", align_corners=True)
    mean, std = (torch.tensor(value, device=pictures.device, dtype=pictures.dtype).view(3, 1, 1) for value in (CLIP_MEAN, CLIP_STD))
    seen: torch.Tensor = ((pictures + 1.0) / 2.0 - mean) / std
    return seen


class _ClipBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, _MLP_MULT * width))
        self.mlp.add_module("gelu", nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(_MLP_MULT * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.ln_1(x)
        attended: torch.Tensor = x + self.attn(y, y, y, need_weights=False)[0]
        out: torch.Tensor = attended + self.mlp(self.ln_2(attended))
        return out


class ClipTower(nn.Module):
    """The image tower of CLIP up to its last layer: all tokens, no final norm, no projection."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.config = config
        tokens = (config.image // config.patch) ** 2 + 1
        scale = config.width**-0.5
        self.conv1 = nn.Conv2d(3, config.width, config.patch, stride=config.patch, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(config.width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(tokens, config.width))
        self.ln_pre = nn.LayerNorm(config.width)
        self.transformer = nn.ModuleDict(
            {"resblocks": nn.ModuleList([_ClipBlock(config.width, config.heads) for _ in range(config.layers)])}
        )

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """Tokens (B, patches + 1, width), the class token first, of `pictures` (B, 3, H, W) in [-1, 1]."""
        x = self.conv1(clip_picture(pictures, self.config.image)).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.positional_embedding
        out: torch.Tensor = self.ln_pre(x)
        for block in self.transformer["resblocks"].children():
            out = block(out)
        return out


class _PerceiverAttention(nn.Module):
    """Queries attend to the tokens and to themselves."""

    def __init__(self, width: int, heads: int, head_channels: int) -> None:
        super().__init__()
        inner = heads * head_channels
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(self, tokens: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        tokens, queries = self.norm1(tokens), self.norm2(queries)
        key, value = self.to_kv(torch.cat([tokens, queries], dim=1)).chunk(2, dim=-1)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (self.to_q(queries), key, value))
        out: torch.Tensor = self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class Resampler(nn.Module):
    """Any number of tokens to a fixed number: learned queries attend to them. Without positions: the order of the tokens is lost."""

    def __init__(self, config: ResamplerConfig, channels_in: int, channels: int) -> None:
        super().__init__()
        width = config.width
        self.latents = nn.Parameter(torch.randn(1, config.queries, width) / width**0.5)
        self.proj_in = nn.Linear(channels_in, width)
        self.layers = nn.ModuleList()
        for _ in range(config.depth):
            feed_forward = nn.Sequential(
                nn.LayerNorm(width),
                nn.Linear(width, _MLP_MULT * width, bias=False),
                nn.GELU(),
                nn.Linear(_MLP_MULT * width, width, bias=False),
            )
            self.layers.append(nn.ModuleList([_PerceiverAttention(width, config.heads, config.head_channels), feed_forward]))
        self.proj_out = nn.Linear(width, channels)
        self.norm_out = nn.LayerNorm(channels)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, queries, channels) of `tokens` (B, N, channels_in)."""
        queries, tokens = self.latents.expand(len(tokens), -1, -1), self.proj_in(tokens)
        for layer in self.layers:
            attention, feed_forward = layer.children()
            queries = queries + attention(tokens, queries)
            queries = queries + feed_forward(queries)
        out: torch.Tensor = self.norm_out(self.proj_out(queries))
        return out

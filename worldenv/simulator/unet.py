"""EVAC's denoising network: a 2-D U-Net with temporal layers, over the latents of memory frames followed by chunk frames.

Parameters carry the names of the released checkpoints ("temopral_conv" included), so a state dict loads as it is. Attention blocks
with an even number, counted through the network, attend to action tokens, odd ones to image tokens. Only the temporal convolution is
causal; there is no positional encoding, so frames, height and width are free.

Activations are (B, T, H, W, C) in memory throughout: a convolution sees them as channels-last pictures, a normalisation over time as
one tall picture, spatial and temporal attention as tokens, and none of these views moves a byte.
Sources: EnerVerse-AC (arXiv:2505.09723); DynamiCrafter (arXiv:2310.12190), whose 512 model is its initialisation.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from worldenv.config import UNetConfig
from worldenv.simulator.layers import ClipNorm, FrameConv, FrameNorm, channels_last, upsample, zero

_GROUPS = 32
_MAX_PERIOD = 10_000.0
_FF_MULT = 4
_TAPS = 3
"""Frames that a temporal convolution sees: its own and the two before."""


class KeysValues(NamedTuple):
    """One attention block's view of its context tokens, each (B, heads, L, C / heads)."""

    key: torch.Tensor
    value: torch.Tensor


def timestep_embedding(timesteps: torch.Tensor, dim: int) -> torch.Tensor:
    """(B, dim) float32 sinusoids of `timesteps` (B,): cosines, then sines, periods 2 pi .. 2 pi 10^4."""
    half = dim // 2
    frequencies = torch.exp(-math.log(_MAX_PERIOD) / half * torch.arange(half, dtype=torch.float32, device=timesteps.device))
    angles = timesteps[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class CausalConv(nn.Conv3d):
    """Kernel (3, 1, 1) over (B, T, H, W, C): frame t sees t - 2, t - 1 and t; before the first frame, the first frame again."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, (_TAPS, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Like `x`."""
        return _over_frames(x, self.weight.squeeze(-1), self.bias)

    def folded(self) -> nn.Module:
        """The same function for a compiler of graphs (`engines.export.prepared`)."""
        return _FramesConv(self)


class _FramesConv(nn.Conv2d):
    """A `CausalConv` over pictures of frames by pixels: a runtime's fastest convolution, and nothing to be computed of its weight.

    Frames are joined as rows of channels: of pictures that are one frame high Inductor takes channels to be first, and lays all of them out so, to
    copy them before the convolution (docs/performance.md).
    """

    def __init__(self, conv: CausalConv) -> None:
        super().__init__(conv.in_channels, conv.out_channels, (_TAPS, 1))
        assert conv.bias is not None
        self.weight.data = conv.weight.detach().squeeze(-1).contiguous(memory_format=torch.channels_last)
        self.bias.data = conv.bias.detach()  # type: ignore[union-attr]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, frames, channels = x.shape[0], x.shape[1], x.shape[-1]
        rows = x.flatten(1, -2)
        first = rows[:, : rows.shape[1] // frames]
        padded = torch.cat([first] * (_TAPS - 1) + [rows], dim=1).view(batch, frames + _TAPS - 1, -1, channels)
        return super().forward(padded.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).reshape(x.shape)

    def channels_first(self) -> nn.Module:
        """As of `layers.FrameNorm`."""
        return _JoinedFramesConv(self)


class _JoinedFramesConv(nn.Conv2d):
    """A `_FramesConv` whose frames are joined as pictures, as ONNX's runtimes are given them by the layer before."""

    def __init__(self, conv: _FramesConv) -> None:
        super().__init__(conv.in_channels, conv.out_channels, (_TAPS, 1))
        self.weight, self.bias = conv.weight, conv.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _over_frames(x, self.weight, self.bias)


def _over_frames(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The causal convolution of `x` (B, T, H, W, C) or (B, T, P, C) as one of pictures of frames by pixels, with a tall kernel (C, C, 3, 1)."""
    padded = torch.cat([x[:, :1]] * (_TAPS - 1) + [x], dim=1)
    pictures = padded if x.dim() == 4 else padded.flatten(2, 3)
    y = F.conv2d(pictures.permute(0, 3, 1, 2), weight, bias).permute(0, 2, 3, 1)
    return y if x.dim() == 4 else y.reshape(x.shape)


class TemporalConvBlock(nn.Module):
    """Four causal convolutions with a residual path; the last begins at zero."""

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()

        def layer(dropped: bool) -> nn.Sequential:
            drop = [nn.Dropout(dropout)] if dropped else []
            return nn.Sequential(ClipNorm(_GROUPS, channels, 1e-5), nn.SiLU(), *drop, CausalConv(channels))

        self.conv1, self.conv2, self.conv3, self.conv4 = layer(False), layer(True), layer(True), layer(True)
        zero(self.conv4[-1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, H, W, C), like `x`."""
        y: torch.Tensor = self.conv4(self.conv3(self.conv2(self.conv1(x))))
        return x + y

    def channels_first(self) -> nn.Module:
        """As of `layers.FrameNorm`."""
        return _FlatTemporalConvBlock(self)


class _FlatTemporalConvBlock(TemporalConvBlock):
    """A `TemporalConvBlock` whose layers are given frames by pixels, as its convolutions take them: one view before all, and one behind."""

    def __init__(self, block: TemporalConvBlock) -> None:
        nn.Module.__init__(self)
        self.conv1, self.conv2, self.conv3, self.conv4 = block.conv1, block.conv2, block.conv3, block.conv4

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.flatten(2, 3)).view(x.shape)


class ResBlock(nn.Module):
    """Two convolutions per frame with the time embedding between them, then the temporal block."""

    def __init__(self, channels_in: int, channels: int, embedding: int, dropout: float) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(FrameNorm(_GROUPS, channels_in, 1e-5), nn.SiLU(), FrameConv(channels_in, channels, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, channels))
        self.out_layers = nn.Sequential(
            FrameNorm(_GROUPS, channels, 1e-5), nn.SiLU(), nn.Dropout(dropout), zero(FrameConv(channels, channels, 3, padding=1))
        )
        self.skip_connection = nn.Identity() if channels_in == channels else FrameConv(channels_in, channels, 1)
        self.temopral_conv = TemporalConvBlock(channels, dropout)

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        """(B, T, H, W, C) of `x` (B, T, H, W, C_in) and `embedding` (B, T, 1, 1, C), the output of `emb_layers`."""
        pictures = x.flatten(0, 1)
        y = self.in_layers(pictures) + embedding.flatten(0, 1)
        y = self.skip_connection(pictures) + self.out_layers(y)
        out: torch.Tensor = self.temopral_conv(y.view(*x.shape[:2], *y.shape[1:]))
        return out


# Blocks keep their tokens as rows (B T L, C): every linear layer is then one product, with no view before and behind it.


def _heads(rows: torch.Tensor, count: int, heads: int) -> torch.Tensor:
    """(count, heads, L, C / heads) of `rows` (count L, C): a view."""
    return rows.view(count, -1, heads, rows.shape[-1] // heads).transpose(1, 2)


class SpatialAttention(nn.Module):
    """Self-attention of the tokens of each frame."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels, bias=False) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x: torch.Tensor, count: int) -> torch.Tensor:
        """(count L, C) like `x`: the tokens of `count` frames."""
        q, k, v = (_heads(to(x), count, self.heads) for to in (self.to_q, self.to_k, self.to_v))
        out: torch.Tensor = self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))
        return out


class TemporalAttention(SpatialAttention):
    """Self-attention over the frames of each pixel: no mask, no position."""

    def forward(self, x: torch.Tensor, count: int, frames: int) -> torch.Tensor:  # type: ignore[override]
        """(count frames L, C) like `x`: the tokens of `count` clips."""
        # Pixels and heads lie side by side in memory, so together they are one axis of heads, and nothing is transposed.
        wide = x.shape[-1] // self.heads
        q, k, v = (to(x).view(count, frames, -1, wide).transpose(1, 2) for to in (self.to_q, self.to_k, self.to_v))
        out: torch.Tensor = self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))
        return out


class ContextAttention(nn.Module):
    """Attention of all frames to the same context tokens: action tokens in even blocks, image tokens in odd ones."""

    def __init__(self, channels: int, heads: int, context: int, even: bool) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        kind = "tp" if even else "ip"
        self._names = (f"to_k_{kind}", f"to_v_{kind}")
        for name in self._names:
            self.add_module(name, nn.Linear(context, channels, bias=False))
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def keys_values(self, tokens: torch.Tensor) -> KeysValues:
        """Of context `tokens` (B, L, context): constant over denoising steps and frames."""
        # In one layout whether they come from here or are put together from several batches: the same numbers, and faster to read
        key, value = (self.get_submodule(name)(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2).contiguous() for name in self._names)
        return KeysValues(key, value)

    def forward(self, x: torch.Tensor, pair: KeysValues) -> torch.Tensor:
        """(B N, C) like `x`: the N tokens of all frames of each clip."""
        q = _heads(self.to_q(x), pair.key.shape[0], self.heads)
        out: torch.Tensor = self.to_out(F.scaled_dot_product_attention(q, *pair).transpose(1, 2).reshape(x.shape))
        return out


class _Gated(nn.Module):
    """Linear to twice the width; one half gates the other through the exact GELU."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Two products, not one that is cut in two: halves of a row are slow to walk, twice as slow in all on a CPU.
        half = self.proj.out_features // 2
        value, gate = (F.linear(x, self.proj.weight[rows], self.proj.bias[rows]) for rows in (slice(half), slice(half, None)))
        return value * F.gelu(gate)

    def folded(self) -> nn.Module:
        """As of `CausalConv`: the halves of its weights are layers of their own."""
        return _GatedHalves(self)


class _GatedHalves(nn.Module):
    def __init__(self, gated: _Gated) -> None:
        super().__init__()
        half = gated.proj.out_features // 2
        self.value, self.gate = (nn.Linear(gated.proj.in_features, half) for _ in range(2))
        for layer, rows in ((self.value, slice(half)), (self.gate, slice(half, None))):
            layer.weight.data, layer.bias.data = (one.detach()[rows].contiguous() for one in (gated.proj.weight, gated.proj.bias))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.value(x) * F.gelu(self.gate(x))
        return out


class FeedForward(nn.Module):
    """GEGLU, four times as wide inside."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = _FF_MULT * channels
        self.net = nn.Sequential(_Gated(channels, hidden), nn.Identity(), nn.Linear(hidden, channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., C) like `x`."""
        out: torch.Tensor = self.net(x)
        return out


class SpatialBlock(nn.Module):
    """Pre-norm: self-attention within each frame, attention to context tokens, GEGLU."""

    def __init__(self, channels: int, heads: int, context: int, even: bool) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))
        self.attn1 = SpatialAttention(channels, heads)
        self.attn2 = ContextAttention(channels, heads, context, even)
        self.ff = FeedForward(channels)

    def forward(self, x: torch.Tensor, count: int, pair: KeysValues) -> torch.Tensor:
        """(count L, C) like `x`: the tokens of `count` frames."""
        x = x + self.attn1(self.norm1(x), count)
        x = x + self.attn2(self.norm2(x), pair)
        y: torch.Tensor = self.ff(self.norm3(x))
        return x + y


class TemporalBlock(nn.Module):
    """Pre-norm: self-attention over frames, twice, then GEGLU."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))
        self.attn1, self.attn2 = TemporalAttention(channels, heads), TemporalAttention(channels, heads)
        self.ff = FeedForward(channels)

    def forward(self, x: torch.Tensor, count: int, frames: int) -> torch.Tensor:
        """(count frames L, C) like `x`: the tokens of `count` clips."""
        x = x + self.attn1(self.norm1(x), count, frames)
        x = x + self.attn2(self.norm2(x), count, frames)
        y: torch.Tensor = self.ff(self.norm3(x))
        return x + y


class SpatialTransformer(nn.Module):
    """Attention within each frame and to the context, with a residual path; begins as the identity."""

    def __init__(self, channels: int, heads: int, context: int, number: int) -> None:
        super().__init__()
        self.number = number
        """How many of these blocks lie before it: even ones attend to action tokens."""
        self.norm = FrameNorm(_GROUPS, channels, 1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList([SpatialBlock(channels, heads, context, number % 2 == 0)])
        self.proj_out = zero(nn.Linear(channels, channels))

    def keys_values(self, image: torch.Tensor, action: torch.Tensor) -> KeysValues:
        """Of the tokens that this block attends to."""
        block = self.transformer_blocks[0]
        assert isinstance(block, SpatialBlock)
        return block.attn2.keys_values(image if self.number % 2 else action)

    def forward(self, x: torch.Tensor, pair: KeysValues) -> torch.Tensor:
        """(B, T, H, W, C) like `x`."""
        batch, frames, _, _, channels = x.shape
        y = self.proj_in(self.norm(x).reshape(-1, channels))
        out: torch.Tensor = self.proj_out(self.transformer_blocks[0](y, batch * frames, pair))
        return x + out.view(x.shape)


class _PointwiseConv(nn.Conv1d):
    """A Conv1d of kernel 1 as the linear layer that it is, over (..., C)."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__(channels_in, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.squeeze(-1), self.bias)


class TemporalTransformer(nn.Module):
    """Attention over frames at each pixel, normalised over the whole clip, with a residual path; begins as the identity."""

    def __init__(self, channels: int, heads: int, inner: int, pointwise: bool = False) -> None:
        super().__init__()
        project = _PointwiseConv if pointwise else nn.Linear
        self.norm = ClipNorm(_GROUPS, channels, 1e-6)
        self.proj_in = project(channels, inner)
        self.transformer_blocks = nn.ModuleList([TemporalBlock(inner, heads)])
        self.proj_out = zero(project(inner, channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, H, W, C) like `x`."""
        batch, frames, _, _, channels = x.shape
        y = self.proj_in(self.norm(x).reshape(-1, channels))
        out: torch.Tensor = self.proj_out(self.transformer_blocks[0](y, batch, frames))
        return x + out.view(x.shape)


class Downsample(nn.Module):
    """Half the height and width, by a strided convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = FrameConv(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, H / 2, W / 2, C)."""
        out: torch.Tensor = self.op(x)
        return out


class Upsample(nn.Module):
    """Twice the height and width: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = FrameConv(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, 2 H, 2 W, C)."""
        out: torch.Tensor = self.conv(upsample(x))
        return out


def _head(channels: int, out: int) -> nn.Sequential:
    return nn.Sequential(FrameNorm(_GROUPS, channels, 1e-5), nn.SiLU(), zero(FrameConv(channels, out, 3, padding=1)))


class UNet(nn.Module):
    """Predicts v of T = memory + chunk latent frames of `latent` channels, from 3 * latent + 7 input channels.

    Input channels: noisy or memory latent, condition latent, mask (1), action-map latent, ray direction (3), ray origin (3).
    """

    def __init__(self, config: UNetConfig, latent: int) -> None:
        super().__init__()
        self.config, self.latent = config, latent
        width, embedding, heads_of = config.model_channels, 4 * config.model_channels, config.num_head_channels

        def embed() -> nn.Sequential:
            return nn.Sequential(nn.Linear(width, embedding), nn.SiLU(), nn.Linear(embedding, embedding))

        self.time_embed, self.fps_embedding = embed(), embed()
        self.domain_embedding = nn.Embedding(config.domains, embedding)
        self.recompute = False
        """Keep only what enters each layer for the backward pass, and compute the rest again there (gradient checkpointing)."""
        self._blocks = 0

        def residual(channels_in: int, channels: int) -> ResBlock:
            return ResBlock(channels_in, channels, embedding, config.dropout)

        def attention(channels: int) -> list[nn.Module]:
            heads = channels // heads_of
            spatial = SpatialTransformer(channels, heads, config.context_dim, self._blocks)
            self._blocks += 1
            return [spatial, TemporalTransformer(channels, heads, channels)]

        inner = config.init_heads * heads_of
        self.input_blocks = nn.ModuleList([nn.ModuleList([FrameConv(3 * latent + 7, width, 3, padding=1)])])
        self.init_attn = nn.ModuleList([TemporalTransformer(width, config.init_heads, inner, pointwise=True)])
        skips, channels, rate = [width], width, 1
        for level, mult in enumerate(config.channel_mult):
            for _ in range(config.num_res_blocks):
                layers: list[nn.Module] = [residual(channels, mult * width)]
                channels = mult * width
                layers += attention(channels) if rate in config.attention_resolutions else []
                self.input_blocks.append(nn.ModuleList(layers))
                skips.append(channels)
            if level + 1 < len(config.channel_mult):
                self.input_blocks.append(nn.ModuleList([Downsample(channels)]))
                skips.append(channels)
                rate *= 2
        self.middle_block = nn.ModuleList([residual(channels, channels), *attention(channels), residual(channels, channels)])
        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(config.channel_mult))):
            for i in range(config.num_res_blocks + 1):
                layers = [residual(channels + skips.pop(), mult * width)]
                channels = mult * width
                layers += attention(channels) if rate in config.attention_resolutions else []
                if level and i == config.num_res_blocks:
                    layers.append(Upsample(channels))
                    rate //= 2
                self.output_blocks.append(nn.ModuleList(layers))
        self.out = _head(channels, latent)
        # looked up once: to walk through all layers takes as long as what a chunk asks of these
        self._residuals = [module for module in self.modules() if isinstance(module, ResBlock)]
        self._attentions = [module for module in self.modules() if isinstance(module, SpatialTransformer)]
        self._widths = [last.out_features for block in self._residuals if isinstance(last := block.emb_layers[-1], nn.Linear)]
        channels_last(self)

    def time_rows(self, timesteps: torch.Tensor, fps: torch.Tensor, domain: torch.Tensor) -> torch.Tensor:
        """What all residual blocks add at `timesteps` (N,): (N, sum of their C), in the order of the blocks; `fps`, `domain` (N,) int64.

        Constant over frames and pixels, so a sampler computes it once for its levels and for level 0, that of memory frames.
        """
        weight = self.domain_embedding.weight

        def sinusoids(values: torch.Tensor) -> torch.Tensor:
            return timestep_embedding(values, self.config.model_channels).to(weight.dtype)

        embedding = self.time_embed(sinusoids(timesteps)) + self.fps_embedding(sinusoids(fps)) + self.domain_embedding(domain)
        return torch.cat([block.emb_layers(embedding) for block in self._residuals], dim=-1)

    def keys_values(self, image: torch.Tensor, action: torch.Tensor) -> list[KeysValues]:
        """Keys and values of every attention block, of `image` (B, L, context) and `action` (B, M, context) tokens.

        Constant over denoising steps and frames.
        """
        return [block.keys_values(image, action) for block in self._attentions]

    def denoise(
        self,
        x: torch.Tensor,
        memory_row: torch.Tensor,
        chunk_row: torch.Tensor,
        pairs: Sequence[KeysValues],
        memory: int,
    ) -> torch.Tensor:
        """v (B, latent, T, H, W) of `x` (B, 3 latent + 7, T, H, W), whose first `memory` frames are memory.

        `memory_row`, `chunk_row` (B or 1, .) from `time_rows`; `pairs` from `keys_values`.
        """
        batch, _, frames, _, _ = x.shape
        counts = ((memory_row, memory), (chunk_row, frames - memory))
        embedding = torch.cat([row.expand(batch, -1)[:, None].expand(-1, count, -1) for row, count in counts], dim=1)
        ends = itertools.accumulate(self._widths)
        embeddings = iter([embedding[:, :, None, None, end - width : end] for end, width in zip(ends, self._widths, strict=True)])
        views = iter(pairs)

        def run(layers: nn.Module, h: torch.Tensor) -> torch.Tensor:
            assert isinstance(layers, nn.ModuleList)
            for layer in layers:
                given: tuple[torch.Tensor | KeysValues, ...] = ()
                if isinstance(layer, ResBlock):
                    given = (next(embeddings),)
                elif isinstance(layer, SpatialTransformer):
                    given = (next(views),)
                h = checkpoint(layer, h, *given, use_reentrant=False) if self.recompute and torch.is_grad_enabled() else layer(h, *given)
            return h

        h, skips = x.permute(0, 2, 3, 4, 1).contiguous(), []
        for number, block in enumerate(self.input_blocks):
            h = run(block, h)
            if number == 0:
                h = run(self.init_attn, h)
            skips.append(h)
        h = run(self.middle_block, h)
        for block in self.output_blocks:
            h = run(block, torch.cat([h, skips.pop()], dim=-1))
        out: torch.Tensor = self.out(h)
        return out.permute(0, 4, 1, 2, 3)

    def forward(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        image: torch.Tensor,
        action: torch.Tensor,
        fps: torch.Tensor,
        domain: torch.Tensor,
        memory: int,
    ) -> torch.Tensor:
        """v (B, latent, T, H, W) of `x` (B, 3 latent + 7, T, H, W), everything computed anew: what training and tests call.

        `timesteps` (B,) is the noise level of the chunk frames, one per sample; memory frames are at level 0. `image` (B, L, context)
        and `action` (B, M, context) are tokens; `fps` and `domain` (B,) int64. Raises ValueError where channels or frames do not fit.
        """
        if x.dim() != 5 or x.shape[1] != 3 * self.latent + 7 or not 0 <= memory < x.shape[2]:
            raise ValueError(f"UNet: x {tuple(x.shape)}, memory={memory}: want (B, {3 * self.latent + 7}, T, H, W) and memory < T")
        at_rest = torch.zeros_like(timesteps)
        rows = self.time_rows(torch.cat([at_rest, timesteps]), fps.repeat(2), domain.repeat(2))
        memory_row, chunk_row = rows.chunk(2)
        return self.denoise(x, memory_row, chunk_row, self.keys_values(image, action), memory)

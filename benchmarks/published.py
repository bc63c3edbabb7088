"""The baseline: EVAC as its public code runs it, in plain eager PyTorch: nothing is hoisted, fused or laid out for the machine.

The network is that of worldenv.simulator.unet with the same parameter names, so a state dict of ours loads; it has the 64 matrices too
that no block reads. In every step, for every frame: the context is repeated, keys and values are computed, the time, fps and domain
embeddings are computed and projected; causal convolutions pad a float32 copy; activations change their layout between the blocks.
In every chunk: image tokens are made anew, the maps of memory frames are encoded (and multiplied by zero), two pictures at a time;
memory frames are decoded too, one frame at a time. The first chunk encodes a whole clip of first frames.
Left out, so that the baseline is not worse than it need be: cache emptying in every step, random numbers drawn on the CPU, the history
of latents on the CPU, checkpoint wrappers, softmax without a fused kernel.
Source: EnerVerse-AC (arXiv:2505.09723) and its public code's order of work, written anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from worldenv.config import SimulatorConfig, UNetConfig, VAEConfig
from worldenv.nouns import ActionMap
from worldenv.simulator.evac import Evac, memory_indices
from worldenv.simulator.schedule import latent_scales
from worldenv.simulator.unet import UNet, timestep_embedding
from worldenv.simulator.vae import VAE

Network = TypeVar("Network", bound=nn.Module)
_ENCODED_AT_ONCE = 2


class _CausalConv(nn.Conv3d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, T, H, W)."""
        padded = F.pad(x.float(), (0, 0, 0, 0, 2, 0), mode="replicate").to(x.dtype)
        return super().forward(padded)


class _TemporalConvs(nn.Module):
    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        for number in range(1, 5):
            drop = [] if number == 1 else [nn.Dropout(dropout)]
            layers = [nn.GroupNorm(32, channels), nn.SiLU(), *drop, _CausalConv(channels, channels, (3, 1, 1))]
            self.add_module(f"conv{number}", nn.Sequential(*layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, T, H, W)."""
        y = x
        for block in self.children():
            y = block(y)
        return x + y


class _Residual(nn.Module):
    def __init__(self, channels_in: int, channels: int, embedding: int, dropout: float) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(32, channels_in), nn.SiLU(), nn.Conv2d(channels_in, channels, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, channels))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, channels), nn.SiLU(), nn.Dropout(dropout), nn.Conv2d(channels, channels, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if channels_in == channels else nn.Conv2d(channels_in, channels, 1)
        self.temopral_conv = _TemporalConvs(channels, dropout)

    def forward(self, x: torch.Tensor, embedding: torch.Tensor, batch: int) -> torch.Tensor:
        """(B T, C, H, W) of `embedding` (B T, E)."""
        y = self.in_layers(x) + self.emb_layers(embedding)[:, :, None, None]
        y = self.skip_connection(x) + self.out_layers(y)
        clip = torch.unflatten(y, 0, (batch, -1)).transpose(1, 2).contiguous()
        out: torch.Tensor = self.temopral_conv(clip).transpose(1, 2).flatten(0, 1)
        return out


class _Attention(nn.Module):
    def __init__(self, channels: int, heads: int, context: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k, self.to_v = (nn.Linear(context or channels, channels, bias=False) for _ in range(2))
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """(N, L, C) of queries, keys and values (N, ., C)."""
        q, k, v = (torch.unflatten(x, -1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        out: torch.Tensor = self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Self-attention of (N, L, C)."""
        return self.attend(self.to_q(x), self.to_k(x), self.to_v(x))


class _ContextAttention(_Attention):
    """Keys and values of image and action tokens have their own matrices; a block uses one pair, and never `to_k` and `to_v`."""

    def __init__(self, channels: int, heads: int, context: int, even: bool) -> None:
        super().__init__(channels, heads, context)
        self.even = even
        self.to_k_ip, self.to_v_ip, self.to_k_tp, self.to_v_tp = (nn.Linear(context, channels, bias=False) for _ in range(4))

    def of(self, x: torch.Tensor, context: torch.Tensor, actions: int) -> torch.Tensor:
        """(N, L, C) of `x` attending to `context` (N, M, context), the last `actions` of whose tokens are those of the actions."""
        if self.even:
            tokens = context[:, -actions:]
            return self.attend(self.to_q(x), self.to_k_tp(tokens), self.to_v_tp(tokens))
        tokens = context[:, :-actions]
        return self.attend(self.to_q(x), self.to_k_ip(tokens), self.to_v_ip(tokens))


class _Gate(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 8 * channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        out: torch.Tensor = value * F.gelu(gate)
        return out


class _FeedForward(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.Sequential(_Gate(channels), nn.Identity(), nn.Linear(4 * channels, channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.net(x)
        return out


class _Block(nn.Module):
    """Self-attention, then attention to the context or, without one, to itself again, then the feed-forward layers."""

    def __init__(self, channels: int, heads: int, attn2: _Attention) -> None:
        super().__init__()
        self.attn1, self.attn2, self.ff = _Attention(channels, heads), attn2, _FeedForward(channels)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None, actions: int = 0) -> torch.Tensor:
        """(N, L, C)."""
        x = self.attn1(self.norm1(x)) + x
        y = self.norm2(x)
        x = (self.attn2.of(y, context, actions) if isinstance(self.attn2, _ContextAttention) and context is not None else self.attn2(y)) + x
        out: torch.Tensor = self.ff(self.norm3(x)) + x
        return out


class _Spatial(nn.Module):
    def __init__(self, channels: int, heads: int, context: int, even: bool) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, 1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList([_Block(channels, heads, _ContextAttention(channels, heads, context, even))])
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x: torch.Tensor, context: torch.Tensor, actions: int) -> torch.Tensor:
        """(B T, C, H, W) of `context` (B T, M, context)."""
        tokens = self.proj_in(self.norm(x).flatten(2).transpose(1, 2).contiguous())
        tokens = self.proj_out(self.transformer_blocks[0](tokens, context, actions))
        out: torch.Tensor = tokens.transpose(1, 2).reshape(x.shape).contiguous() + x
        return out


class _Temporal(nn.Module):
    def __init__(self, channels: int, heads: int, inner: int, pointwise: bool) -> None:
        super().__init__()
        self.pointwise = pointwise
        self.norm = nn.GroupNorm(32, channels, 1e-6)
        self.proj_in: nn.Module = nn.Conv1d(channels, inner, 1) if pointwise else nn.Linear(channels, inner)
        self.transformer_blocks = nn.ModuleList([_Block(inner, heads, _Attention(inner, heads))])
        self.proj_out: nn.Module = nn.Conv1d(inner, channels, 1) if pointwise else nn.Linear(inner, channels)

    def forward(self, x: torch.Tensor, batch: int) -> torch.Tensor:
        """(B T, C, H, W)."""
        clip = torch.unflatten(x, 0, (batch, -1)).transpose(1, 2).contiguous()
        _, channels, frames, height, width = clip.shape
        series = self.norm(clip).permute(0, 3, 4, 1, 2).reshape(-1, channels, frames)  # (B H W, C, T)
        if self.pointwise:
            tokens = self.transformer_blocks[0](self.proj_in(series).transpose(1, 2).contiguous())
            series = self.proj_out(tokens.transpose(1, 2).contiguous())
        else:
            tokens = self.transformer_blocks[0](self.proj_in(series.transpose(1, 2).contiguous()))
            series = self.proj_out(tokens).transpose(1, 2)
        made = series.view(batch, height, width, channels, frames) if self.pointwise else torch.unflatten(series, 0, (batch, height, width))
        return (made.permute(0, 3, 4, 1, 2).contiguous() + clip).transpose(1, 2).flatten(0, 1)


class _Down(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.op(x)
        return out


class _Up(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
        return out


class PublishedUNet(nn.Module):
    """The denoising network, everything computed in every call."""

    def __init__(self, config: UNetConfig, latent: int) -> None:
        super().__init__()
        self.config = config
        width, embedding, head = config.model_channels, 4 * config.model_channels, config.num_head_channels
        self.time_embed, self.fps_embedding = (
            nn.Sequential(nn.Linear(width, embedding), nn.SiLU(), nn.Linear(embedding, embedding)) for _ in range(2)
        )
        self.domain_embedding = nn.Embedding(config.domains, embedding)
        blocks = 0

        def residual(channels_in: int, channels: int) -> nn.Module:
            return _Residual(channels_in, channels, embedding, config.dropout)

        def attention(channels: int) -> list[nn.Module]:
            nonlocal blocks
            heads, blocks = channels // head, blocks + 1
            return [_Spatial(channels, heads, config.context_dim, blocks % 2 == 1), _Temporal(channels, heads, channels, pointwise=False)]

        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(3 * latent + 7, width, 3, padding=1)])])
        self.init_attn = nn.ModuleList([_Temporal(width, config.init_heads, config.init_heads * head, pointwise=True)])
        skips, channels, last = [width], width, len(config.channel_mult) - 1
        for level, mult in enumerate(config.channel_mult):
            attends = 2**level in config.attention_resolutions
            for _ in range(config.num_res_blocks):
                layers = [residual(channels, mult * width), *(attention(mult * width) if attends else [])]
                self.input_blocks.append(nn.ModuleList(layers))
                channels = mult * width
                skips.append(channels)
            if level < last:
                self.input_blocks.append(nn.ModuleList([_Down(channels)]))
                skips.append(channels)
        self.middle_block = nn.ModuleList([residual(channels, channels), *attention(channels), residual(channels, channels)])
        self.output_blocks = nn.ModuleList()
        for level in range(last, -1, -1):
            attends, mult = 2**level in config.attention_resolutions, config.channel_mult[level]
            for number in range(config.num_res_blocks + 1):
                layers = [residual(channels + skips.pop(), mult * width), *(attention(mult * width) if attends else [])]
                channels = mult * width
                if level and number == config.num_res_blocks:
                    layers.append(_Up(channels))
                self.output_blocks.append(nn.ModuleList(layers))
        self.out = nn.Sequential(nn.GroupNorm(32, channels), nn.SiLU(), nn.Conv2d(channels, latent, 3, padding=1))

    def forward(
        self, x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor, fps: torch.Tensor, domain: torch.Tensor, memory: int, actions: int
    ) -> torch.Tensor:
        """v (B, latent, T, H, W) of `x` (B, 3 latent + 7, T, H, W) whose first `memory` frames are memory.

        `timesteps`, `fps`, `domain` (B,); `context` (B, image tokens + `actions`, context).
        """
        batch, _, frames = x.shape[:3]
        levels = timesteps[:, None].repeat(1, frames)
        levels[:, :memory] = 0
        width = self.config.model_channels
        embedding = self.time_embed(timestep_embedding(levels.flatten(), width).to(x.dtype))
        embedding = embedding + self.fps_embedding(timestep_embedding(fps, width).to(x.dtype)).repeat_interleave(frames, dim=0)
        embedding = embedding + self.domain_embedding(domain).repeat_interleave(frames, dim=0)
        context = context.repeat_interleave(frames, dim=0)

        def run(layers: nn.Module, h: torch.Tensor) -> torch.Tensor:
            for layer in layers.children():
                if isinstance(layer, _Residual):
                    h = layer(h, embedding, batch)
                elif isinstance(layer, _Spatial):
                    h = layer(h, context, actions)
                elif isinstance(layer, _Temporal):
                    h = layer(h, batch)
                else:
                    h = layer(h)
            return h

        h, skips = x.transpose(1, 2).flatten(0, 1).contiguous(), []
        for number, block in enumerate(self.input_blocks):
            h = run(block, h)
            if number == 0:
                h = run(self.init_attn, h)
            skips.append(h)
        h = run(self.middle_block, h)
        for block in self.output_blocks:
            h = run(block, torch.cat([h, skips.pop()], dim=1))
        v: torch.Tensor = self.out(h)
        return torch.unflatten(v, 0, (batch, frames)).transpose(1, 2)


class _Resnet(nn.Module):
    def __init__(self, channels_in: int, channels: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(groups, channels_in, 1e-6), nn.GroupNorm(groups, channels, 1e-6)
        self.conv1, self.conv2 = nn.Conv2d(channels_in, channels, 3, padding=1), nn.Conv2d(channels, channels, 3, padding=1)
        self.nin_shortcut = nn.Identity() if channels_in == channels else nn.Conv2d(channels_in, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        out: torch.Tensor = self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(y)))
        return out


class _PixelAttention(nn.Module):
    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, 1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        q, k, v = (layer(y).flatten(2).transpose(1, 2).unsqueeze(1) for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2).reshape(x.shape)
        out: torch.Tensor = x + self.proj_out(y)
        return out


class _Shrink(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class _Stage(nn.Module):
    def __init__(self, channels_in: int, channels: int, blocks: int, groups: int, change: tuple[str, nn.Module] | None) -> None:
        super().__init__()
        self.block = nn.ModuleList([_Resnet(channels if i else channels_in, channels, groups) for i in range(blocks)])
        if change is not None:
            self.add_module(*change)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.block:
            x = layer(x)
        for change in list(self.children())[1:]:
            x = change(x)
        return x


class _Middle(nn.Module):
    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.block_1, self.block_2 = (_Resnet(channels, channels, groups) for _ in range(2))
        self.attn_1 = _PixelAttention(channels, groups)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.block_2(self.attn_1(self.block_1(x)))
        return out


class _Encoder(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths, groups = [config.channels * mult for mult in config.channel_mult], config.norm_groups
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1)
        self.down = nn.ModuleList(
            _Stage(before, width, config.num_res_blocks, groups, ("downsample", _Shrink(width)) if level + 1 < len(widths) else None)
            for level, (before, width) in enumerate(zip([config.channels, *widths], widths, strict=False))
        )
        self.mid = _Middle(widths[-1], groups)
        self.norm_out, self.conv_out = nn.GroupNorm(groups, widths[-1], 1e-6), nn.Conv2d(widths[-1], 2 * config.z_channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv_in(x)
        for stage in self.down:
            h = stage(h)
        out: torch.Tensor = self.conv_out(F.silu(self.norm_out(self.mid(h))))
        return out


class _Decoder(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths, groups = [config.channels * mult for mult in config.channel_mult], config.norm_groups
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = _Middle(widths[-1], groups)
        self.up = nn.ModuleList(
            _Stage(after, width, config.num_res_blocks + 1, groups, ("upsample", _Up(width)) if level else None)
            for level, (width, after) in enumerate(zip(widths, [*widths[1:], widths[-1]], strict=True))
        )
        self.norm_out, self.conv_out = nn.GroupNorm(groups, widths[0], 1e-6), nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        h = self.mid(self.conv_in(z))
        for stage in reversed(self.up):
            h = stage(h)
        out: torch.Tensor = self.conv_out(F.silu(self.norm_out(h)))
        return out


class PublishedVAE(nn.Module):
    """The autoencoder over (N, C, H, W)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.encoder, self.decoder = _Encoder(config), _Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.z_channels, 2 * config.z_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.z_channels, config.z_channels, 1)

    def encode(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation (N, z, h, w) of `pictures` (N, 3, H, W) in [-1, 1], two at a time."""
        moments = torch.cat([self.quant_conv(self.encoder(some)) for some in torch.split(pictures, _ENCODED_AT_ONCE)])
        mean, logvar = moments.chunk(2, dim=1)
        return mean, torch.exp(0.5 * logvar.clamp(-30.0, 20.0))

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) of unscaled `latents` (N, z, h, w), one at a time."""
        return torch.cat([self.decoder(self.post_quant_conv(one)) for one in torch.split(latents, 1)])


def unet_like(ours: UNet, dtype: torch.dtype | None = None) -> PublishedUNet:
    """The baseline with our weights, in `dtype` (ours, if None), on our device; matrices that nothing reads are zero."""
    return _filled(PublishedUNet, (ours.config, ours.latent), ours, dtype)


def vae_like(ours: VAE, dtype: torch.dtype | None = None) -> PublishedVAE:
    """The baseline with our weights, in `dtype` (ours, if None), on our device."""
    return _filled(PublishedVAE, (ours.config,), ours, dtype)


def _filled(kind: type[Network], arguments: tuple[object, ...], ours: nn.Module, dtype: torch.dtype | None) -> Network:
    given = ours.state_dict()
    first = next(iter(given.values()))
    with torch.device("meta"):
        network = kind(*arguments).to(dtype or first.dtype)
    network.to_empty(device=first.device)
    for name, value in network.state_dict().items():
        value.copy_(given[name]) if name in given else value.zero_()
    if strange := given.keys() - network.state_dict().keys():
        raise ValueError(f"{kind.__name__} lacks {sorted(strange)[:3]}")
    return network.eval()


@dataclass
class _Rollout:
    """What the published loop carries from chunk to chunk."""

    picture: torch.Tensor
    """(B, 3, H, W) in [-1, 1]: the first frame, after the first chunk its decoded latent."""
    latents: torch.Tensor | None
    """(B, z, n, h, w), scaled."""
    maps: torch.Tensor | None
    """(B, n, 3, H, W) in [-1, 1]: the action map of every frame so far."""


class PublishedLoop:
    """The chunk loop in the published order of work, with the weights of `simulator`; without guidance."""

    def __init__(self, simulator: Evac, unet: PublishedUNet, vae: PublishedVAE) -> None:
        if simulator.config.guidance != 1.0:
            raise ValueError(f"guidance={simulator.config.guidance}: the baseline is written without; use 1")
        self.simulator, self.unet, self.vae = simulator, unet, vae

    @property
    def config(self) -> SimulatorConfig:
        """Of the simulator."""
        return self.simulator.config

    @torch.no_grad()
    def rollout(self, frame: torch.Tensor, action_maps: Sequence[ActionMap], noise: Sequence[torch.Tensor]) -> torch.Tensor:
        """(B, chunks K, H, W, 3) uint8 from `frame` (B, H, W, 3) uint8 on, with a map and noise for each chunk as `Evac.imagine` takes them."""
        state, frames = _Rollout(self.simulator.picture(frame), None, None), []
        for action_map, drawn in zip(action_maps, noise, strict=True):
            frames.append(self._chunk(state, action_map, drawn))
        return torch.cat(frames, dim=1)

    def _chunk(self, state: _Rollout, action_map: ActionMap, noise: torch.Tensor) -> torch.Tensor:
        config, simulator, scale = self.config, self.simulator, self.simulator.latent_scale
        batch, chunk, memory = len(noise), config.chunk, config.memory
        frames = memory + chunk
        context = torch.cat(
            [simulator.image_tokens(state.picture), simulator.action_tokens(simulator.normalise(action_map.delta))], dim=1
        )  # fmt: skip
        sampled = config.posterior == "sample"
        if state.latents is None:
            clip = state.picture[:, None].repeat(1, frames, 1, 1, 1)
            mean, deviation = (torch.unflatten(x, 0, (batch, frames)).transpose(1, 2) * scale for x in self.vae.encode(clip.flatten(0, 1)))
            state.latents = (mean[:, :, :memory] + deviation[:, :, :memory] * noise[:, -1, :, :memory]) if sampled else mean[:, :, :memory]
        pictures = torch.unflatten(simulator.picture(action_map.picture.flatten(0, 1)), 0, (batch, chunk))
        if state.maps is None:
            state.maps = pictures[:, :1].repeat(1, memory, 1, 1, 1)
        chosen = memory_indices(state.latents.shape[2], memory)
        remembered = state.latents[:, :, chosen]
        drawn = torch.cat([state.maps[:, chosen], pictures], dim=1)
        mean, deviation = (torch.unflatten(x, 0, (batch, frames)).transpose(1, 2) * scale for x in self.vae.encode(drawn.flatten(0, 1)))
        maps = mean.clone()
        if sampled:
            maps[:, :, memory:] += deviation[:, :, memory:] * noise[:, -2]
        maps[:, :, :memory] *= 0.0
        latent = torch.cat([remembered, remembered[:, :, -1:].repeat(1, 1, chunk, 1, 1)], dim=2)
        rays = action_map.rays[:, :, None].repeat(1, 1, frames, 1, 1)
        fixed = torch.cat([latent, torch.ones_like(latent[:, :1]), maps, rays], dim=1)
        x = self._denoise(remembered, fixed, context, noise)
        whole = torch.cat([remembered, x], dim=2)
        decoded = self.vae.decode((whole / scale).transpose(1, 2).flatten(0, 1).to(next(self.vae.parameters()).dtype))
        decoded = torch.unflatten(decoded.float(), 0, (batch, frames))
        if state.latents.shape[2] == memory and config.first_tokens == "decoded":
            state.picture = decoded[:, 0].clamp(-1.0, 1.0)
        state.latents, state.maps = torch.cat([state.latents, x], dim=2), torch.cat([state.maps, pictures], dim=1)
        shown = ((decoded[:, memory:] + 1.0) / 2.0).clamp(0.0, 1.0)
        return (shown * 255.0).round().to(torch.uint8).permute(0, 1, 3, 4, 2)

    def _denoise(self, remembered: torch.Tensor, fixed: torch.Tensor, context: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        config, sampler, batch, memory = self.config, self.simulator.sampler, len(noise), self.config.memory
        fps, domain = (torch.full((batch,), value, device=noise.device) for value in (config.fps_token, config.domain))
        actions, scales = config.action_resampler.queries, latent_scales(config.scale_memory)
        dtype = next(self.unet.parameters()).dtype
        context, x, x_0 = context.to(dtype), noise[:, 0], noise[:, 0]
        for executed, index in enumerate(reversed(range(len(sampler)))):
            level = int(sampler.timesteps[index])
            given = torch.cat([torch.cat([remembered * float(scales[level]), x], dim=2), fixed], dim=1).to(dtype)
            v = self.unet(given, torch.full((batch,), level, device=noise.device), context, fps, domain, memory, actions)[:, :, memory:]
            added = noise[:, 1 + executed] if config.eta > 0 else None
            x, x_0 = sampler.step(x, v, torch.full((batch,), index, device=noise.device), added)
        return x_0 if config.final == "pred_x0" else x

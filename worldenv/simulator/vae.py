"""The latent autoencoder of Stable Diffusion (KL-regularised), with the parameter names of latent-diffusion checkpoints.

Each level but the last halves the picture. Attention lies in the middle only. Pictures are (N, 3, H, W) in [-1, 1], latents
(N, z, H / f, W / f), not scaled: whoever diffuses them scales them.
Source: Rombach et al. 2022 (arXiv:2112.10752) app. E.2, G; equals diffusers' AutoencoderKL by test.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from worldenv.config import VAEConfig
from worldenv.simulator.layers import FrameConv, FrameNorm, UpsampleConv, channels_last

_EPS = 1e-6
_LOGVAR_MIN, _LOGVAR_MAX = -30.0, 20.0


@dataclass(frozen=True)
class Posterior:
    """A diagonal Gaussian over latents."""

    mean: torch.Tensor
    """(N, z, h, w)."""
    logvar: torch.Tensor
    """(N, z, h, w), within -30 .. 20."""

    def sample(self, noise: torch.Tensor) -> torch.Tensor:
        """The latent at standard normal `noise` (N, z, h, w)."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def kl(self) -> torch.Tensor:
        """(N,) divergence from the standard normal [nats]."""
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1.0 - self.logvar).flatten(1).sum(1)


class _Residual(nn.Module):
    def __init__(self, channels_in: int, channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = FrameNorm(groups, channels_in, _EPS)
        self.conv1 = FrameConv(channels_in, channels, 3, padding=1)
        self.norm2 = FrameNorm(groups, channels, _EPS)
        self.conv2 = FrameConv(channels, channels, 3, padding=1)
        if channels_in != channels:
            self.nin_shortcut = FrameConv(channels_in, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return torch.add(y, self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class _Attention(nn.Module):
    """One head over all pixels of a picture; its 1x1 convolutions are linear layers."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = FrameNorm(groups, channels, _EPS)
        self.q, self.k, self.v, self.proj_out = (FrameConv(channels, channels, 1) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        q, k, v = (layer(y).flatten(1, 2)[:, None] for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v)[:, 0].reshape(x.shape)
        out: torch.Tensor = self.proj_out(y)
        return x + out


class _Middle(nn.Module):
    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.block_1 = _Residual(channels, channels, groups)
        self.attn_1 = _Attention(channels, groups)
        self.block_2 = _Residual(channels, channels, groups)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.block_2(self.attn_1(self.block_1(x)))
        return out


class _Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = FrameConv(channels, channels, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.conv(F.pad(x, (0, 0, 0, 1, 0, 1)))  # zeros below and on the right only
        return out


class _Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = UpsampleConv(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.conv(x)
        return out


class _Level(nn.Module):
    """Residual blocks of one width, then a change of size where one is set."""

    def __init__(self, channels_in: int, channels: int, blocks: int, groups: int) -> None:
        super().__init__()
        self.block = nn.ModuleList([_Residual(channels if i else channels_in, channels, groups) for i in range(blocks)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.block:
            x = layer(x)
        for name in ("downsample", "upsample"):
            x = getattr(self, name)(x) if hasattr(self, name) else x
        return x


class Encoder(nn.Module):
    """Pictures to moments."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths, groups = [config.channels * mult for mult in config.channel_mult], config.norm_groups
        self.conv_in = FrameConv(3, config.channels, 3, padding=1)
        self.down = nn.ModuleList()
        for level, width in enumerate(widths):
            stage = _Level(widths[level - 1] if level else config.channels, width, config.num_res_blocks, groups)
            if level + 1 < len(widths):
                stage.downsample = _Downsample(width)
            self.down.append(stage)
        self.mid = _Middle(widths[-1], groups)
        self.norm_out = FrameNorm(groups, widths[-1], _EPS)
        self.conv_out = FrameConv(widths[-1], 2 * config.z_channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, h, w, 2 z) of (N, H, W, 3)."""
        h = self.conv_in(x)
        for stage in self.down:
            h = stage(h)
        out: torch.Tensor = self.conv_out(F.silu(self.norm_out(self.mid(h))))
        return out


class Decoder(nn.Module):
    """Latents to pictures."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths, groups = [config.channels * mult for mult in config.channel_mult], config.norm_groups
        self.conv_in = FrameConv(config.z_channels, widths[-1], 3, padding=1)
        self.mid = _Middle(widths[-1], groups)
        stages = []
        for level in reversed(range(len(widths))):
            stage = _Level(widths[min(level + 1, len(widths) - 1)], widths[level], config.num_res_blocks + 1, groups)
            if level:
                stage.upsample = _Upsample(widths[level])
            stages.append(stage)
        self.up = nn.ModuleList(reversed(stages))  # numbered by level, run from the coarsest
        self.norm_out = FrameNorm(groups, widths[0], _EPS)
        self.conv_out = FrameConv(widths[0], 3, 3, padding=1)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """(N, H, W, 3) of (N, h, w, z)."""
        h = self.mid(self.conv_in(z))
        for stage in reversed(self.up):
            h = stage(h)
        out: torch.Tensor = self.conv_out(F.silu(self.norm_out(h)))
        return out


class VAE(nn.Module):
    """Encoder, decoder and the two 1x1 convolutions around the latent."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = FrameConv(2 * config.z_channels, 2 * config.z_channels, 1)
        self.post_quant_conv = FrameConv(config.z_channels, config.z_channels, 1)
        channels_last(self)

    def encode(self, pictures: torch.Tensor) -> Posterior:
        """The posterior of `pictures` (N, 3, H, W) in [-1, 1]; ValueError where a side is no multiple of the factor."""
        if pictures.shape[-2] % self.config.factor or pictures.shape[-1] % self.config.factor:
            raise ValueError(f"VAE: pictures {tuple(pictures.shape)}, want sides in multiples of {self.config.factor} px")
        moments = self.quant_conv(self.encoder(pictures.permute(0, 2, 3, 1).contiguous()))
        moments, latent = moments.permute(0, 3, 1, 2), self.config.z_channels
        mean, logvar = moments[:, :latent], moments[:, latent:]  # slices: what chunk() becomes in a graph hides its shapes from a runtime
        return Posterior(mean, logvar.clamp(_LOGVAR_MIN, _LOGVAR_MAX))

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) in about [-1, 1], not clamped, of unscaled `latents` (N, z, h, w)."""
        pictures: torch.Tensor = self.decoder(self.post_quant_conv(latents.permute(0, 2, 3, 1).contiguous()))
        return pictures.permute(0, 3, 1, 2)

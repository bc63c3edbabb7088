"""What the simulator's two convolutional networks are made of. Activations have their channels last in memory: (..., H, W, C)."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from worldenv.kernels.group_norm import group_norm

Layer = TypeVar("Layer", bound=nn.Module)


class FrameConv(nn.Conv2d):
    """A 2-D convolution of every picture of (..., H, W, C)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., H', W', C_out)."""
        pictures = x if x.dim() == 4 else x.reshape(-1, *x.shape[-3:])
        y = super().forward(pictures.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # channels-last views
        return y if x.dim() == 4 else y.reshape(*x.shape[:-3], *y.shape[1:])


class FrameNorm(nn.GroupNorm):
    """GroupNorm of (..., H, W, C), statistics over each picture."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Like `x`."""
        if torch.compiler.is_exporting() and x.dim() == 4:  # a runtime whose channels come first then turns nothing round between two convolutions
            return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        height, width, channels = x.shape[-3:]
        return group_norm(x.reshape(-1, height * width, channels), self.num_groups, self.weight, self.bias, self.eps).view(x.shape)


class ClipNorm(nn.GroupNorm):
    """GroupNorm of (B, T, H, W, C), statistics over all T pictures of a clip together."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Like `x`."""
        return group_norm(x.flatten(1, 3), self.num_groups, self.weight, self.bias, self.eps).view(x.shape)


def upsample(x: torch.Tensor) -> torch.Tensor:
    """Nearest neighbour: (..., H, W, C) -> (..., 2 H, 2 W, C)."""
    *lead, height, width, channels = x.shape
    wide = x[..., :, None, :, None, :].expand(*lead, height, 2, width, 2, channels)
    return wide.reshape(*lead, 2 * height, 2 * width, channels)


class UpsampleConv(nn.Conv2d):
    """Nearest neighbour to twice the height and width, then a 3x3 convolution, of (..., H, W, C): as the one transposed convolution that it is.

    Each output pixel sees 2 x 2 different input pixels, so 4 products do for 9, and the large picture is never made.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., 2 H, 2 W, C)."""
        taps = F.pad(self.weight, (1, 1, 1, 1))
        rows = taps[:, :, 1:] + taps[:, :, :-1]
        kernel = (rows[..., 1:] + rows[..., :-1]).flip(2, 3).transpose(0, 1)  # 3x3 taps spread by the 2x2 pixels of nearest neighbour
        pictures = x.reshape(-1, *x.shape[-3:]).permute(0, 3, 1, 2)
        y = F.conv_transpose2d(pictures, kernel, self.bias, stride=2, padding=1).permute(0, 2, 3, 1)
        return y.reshape(*x.shape[:-3], *y.shape[1:])


def zero(layer: Layer) -> Layer:
    """`layer` with all its parameters 0: a residual branch that begins as nothing."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def channels_last(network: nn.Module) -> None:
    """Lay the convolution weights of `network` out as its activations are, so that no call has to reorder them."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            layout = torch.channels_last if isinstance(module, nn.Conv2d) else torch.channels_last_3d
            module.weight.data = module.weight.data.contiguous(memory_format=layout)

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
        if torch.compiler.is_exporting() and x.dim() == 4:  # pictures alone, whose channels a compiler lays out as their convolutions want them
            return _of_pictures(self, x)
        height, width, channels = x.shape[-3:]
        return group_norm(x.reshape(-1, height * width, channels), self.num_groups, self.weight, self.bias, self.eps).view(x.shape)

    def channels_first(self) -> nn.Module:
        """The same function for a runtime whose convolutions have their channels first (`engines.export.to_onnx`)."""
        return _ChannelsFirst(self, 0)


class ClipNorm(nn.GroupNorm):
    """GroupNorm of (B, T, H, W, C) or (B, T, P, C), statistics over all T pictures of a clip together."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Like `x`."""
        return group_norm(x.flatten(1, -2), self.num_groups, self.weight, self.bias, self.eps).view(x.shape)

    def channels_first(self) -> nn.Module:
        """As of `FrameNorm`."""
        return _ChannelsFirst(self, 2)


class _ChannelsFirst(nn.GroupNorm):
    """Of (N, A, B, C), statistics over A and B: so that nothing is turned round between convolutions. Of five axes, `merged` and the next are one."""

    def __init__(self, norm: nn.GroupNorm, merged: int) -> None:
        super().__init__(norm.num_groups, norm.num_channels, norm.eps)
        self.weight, self.bias, self.merged = norm.weight, norm.bias, merged

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pictures = x if x.dim() == 4 else x.flatten(self.merged, self.merged + 1)  # nothing can be moved across a view, not even one of the whole
        y = _of_pictures(self, pictures)
        return y if x.dim() == 4 else y.view(x.shape)


def _of_pictures(norm: nn.GroupNorm, x: torch.Tensor) -> torch.Tensor:
    """torch's own group norm of (N, A, B, C)."""
    return F.group_norm(x.permute(0, 3, 1, 2), norm.num_groups, norm.weight, norm.bias, norm.eps).permute(0, 2, 3, 1)


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

    def kernel(self) -> torch.Tensor:
        """(C, C, 4, 4) of the transposed convolution: 3x3 taps spread by the 2x2 pixels of nearest neighbour."""
        taps = F.pad(self.weight, (1, 1, 1, 1))
        rows = taps[:, :, 1:] + taps[:, :, :-1]
        return (rows[..., 1:] + rows[..., :-1]).flip(2, 3).transpose(0, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., 2 H, 2 W, C)."""
        pictures = x.reshape(-1, *x.shape[-3:]).permute(0, 3, 1, 2)
        y = F.conv_transpose2d(pictures, self.kernel(), self.bias, stride=2, padding=1).permute(0, 2, 3, 1)
        return y.reshape(*x.shape[:-3], *y.shape[1:])

    def folded(self) -> nn.Module:
        """The same function for a compiler of graphs (`engines.export.prepared`), as a plain convolution, which every runtime has in every type."""
        return _Phases(self)


class _Phases(nn.Conv2d):
    """An `UpsampleConv`: the 2 x 2 pixels between four input pixels are each a 2x2 convolution of these, and all four are computed as one."""

    def __init__(self, conv: UpsampleConv) -> None:
        super().__init__(conv.in_channels, 4 * conv.out_channels, 2, padding=1)
        assert conv.bias is not None
        kernel = conv.kernel()
        phases = [kernel[:, :, [3 - down, 1 - down]][..., [3 - right, 1 - right]] for down in (1, 0) for right in (1, 0)]
        self.weight.data = torch.cat(phases, dim=1).transpose(0, 1).detach().contiguous(memory_format=torch.channels_last)
        self.bias.data = conv.bias.detach().repeat(4)  # type: ignore[union-attr]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        height, width, channels = x.shape[-3:]
        y = self.phases(x)
        rows = []
        for down in range(2):
            pixels = []
            for right in range(2):
                first = (2 * (1 - down) + 1 - right) * channels
                pixels.append(y[:, down : down + height, right : right + width, first : first + channels])
            rows.append(torch.stack(pixels, dim=3).flatten(2, 3))
        return torch.stack(rows, dim=2).reshape(*x.shape[:-3], 2 * height, 2 * width, channels)

    def phases(self, x: torch.Tensor) -> torch.Tensor:
        """(N, H + 1, W + 1, 4 C): of each four neighbouring pixels."""
        return super().forward(x.reshape(-1, *x.shape[-3:]).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def channels_first(self) -> nn.Module:
        """As of `FrameNorm`."""
        return _Interleaved(self)


class _Interleaved(_Phases):
    """`_Phases` put in their places by one transpose of pairs of pixels, which a runtime that fuses nothing does faster than sixteen pieces."""

    def __init__(self, phases: _Phases) -> None:
        nn.Conv2d.__init__(self, phases.in_channels, phases.out_channels, 2, padding=1)
        self.weight, self.bias = phases.weight, phases.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        height, width, channels = x.shape[-3:]
        y = self.phases(x).reshape(-1, height + 1, width + 1, 2, 2 * channels).transpose(2, 3)
        pixels = y.reshape(-1, 2 * height + 2, 2 * width + 2, channels)[:, 1 : 2 * height + 1, 1 : 2 * width + 1]  # one too many on each side
        return pixels.reshape(*x.shape[:-3], 2 * height, 2 * width, channels)


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

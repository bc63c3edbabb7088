"""Pictures changed at random while a policy learns to imitate. Draws are given, so that a batch is a function of its step.

    shift        a small policy from scratch: the whole picture moves by a few pixels, its colours change a little
    published    OpenVLA-OFT's: a random crop where the centre crop stands later, then brightness, contrast, saturation and hue

An action says where to go from here, and all that is seen moves together: the target stays.
"""

from __future__ import annotations

import torch

BRIGHTNESS, CONTRAST, SATURATION, HUE = 0.2, 0.2, 0.2, 0.05
"""The published ranges: up to +- this, of the full range, of 1, of 1, of a turn."""
DRAWS = {"shift": 5, "published": 6}
"""Uniform numbers that one picture needs."""


def shift(frames: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """Frames (B, H, W, 3) moved by `offset` (B, 2) int64 [px, down and right]; what comes in repeats the edge."""
    height, width = frames.shape[1:3]
    rows = (torch.arange(height) - offset[:, :1]).clamp(0, height - 1)
    columns = (torch.arange(width) - offset[:, 1:]).clamp(0, width - 1)
    return frames[torch.arange(len(frames))[:, None, None], rows[:, :, None], columns[:, None, :]]


def recolour(frames: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """Frames (B, H, W, 3) uint8 with brightness, contrast and saturation multiplied by 1 + `change` (B, 3)."""
    brightness, contrast, saturation = (1.0 + change).float()[:, :, None, None, None].unbind(1)
    wide = frames.float()
    grey = wide.mean(dim=3, keepdim=True)
    mean = wide.mean(dim=(1, 2, 3), keepdim=True)
    return (((wide - grey) * saturation + grey - mean) * contrast + mean * brightness).round().clamp(0, 255).to(torch.uint8)


def crop(frames: torch.Tensor, area: float, at: torch.Tensor) -> torch.Tensor:
    """`area` of each picture (B, S, S, 3) uint8 back at size S, bilinear; `at` (B, 2) in [0, 1] says where: 0 first row and column, 1 last."""
    size, side = frames.shape[1], area**0.5
    where = (at[:, :, None].double() * (1.0 - side) * (size - 1) + torch.arange(size, device=at.device) * side).to(frames.device)
    floor = where.floor().long().clamp(0, size - 1)
    after, share = (floor + 1).clamp_max(size - 1), (where - floor).float()
    wide, batch = frames.float(), torch.arange(len(frames), device=frames.device)[:, None]
    rows, columns = share[:, 0, :, None, None], share[:, 1, None, :, None]
    tall = wide[batch, floor[:, 0]] * (1 - rows) + wide[batch, after[:, 0]] * rows
    turned = tall.transpose(1, 2)
    both = turned[batch, floor[:, 1]].transpose(1, 2) * (1 - columns) + turned[batch, after[:, 1]].transpose(1, 2) * columns
    turned_back: torch.Tensor = both.round().clamp(0, 255).to(torch.uint8)
    return turned_back


def published(frames: torch.Tensor, area: float, draw: torch.Tensor) -> torch.Tensor:
    """Pictures (B, S, S, 3) uint8 changed as the published fine-tuning does; `draw` (B, 6) uniform in (0, 1).

    Brightness is added; contrast is about the mean of each channel; saturation and hue are those of HSV; clipped after each.
    """
    draw = draw.to(frames.device)
    unit = crop(frames, area, draw[:, :2]).float() / 255.0
    brightness, contrast, saturation, hue = (2.0 * draw[:, 2:].float() - 1.0)[:, :, None, None, None].unbind(1)
    unit = (unit + BRIGHTNESS * brightness).clamp(0, 1)
    mean = unit.mean(dim=(1, 2), keepdim=True)
    unit = ((unit - mean) * (1.0 + CONTRAST * contrast) + mean).clamp(0, 1)
    return (_hsv(unit, 1.0 + SATURATION * saturation[..., 0], HUE * hue[..., 0]) * 255.0).round().clamp(0, 255).to(torch.uint8)


def _hsv(unit: torch.Tensor, saturation: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Colours (..., 3) in [0, 1] with HSV's saturation multiplied and its hue turned [turns]; both (..., ) like a channel."""
    value, least = unit.amax(-1), unit.amin(-1)
    chroma = value - least
    red, green, blue = unit.unbind(-1)
    safe = chroma.clamp_min(1e-12)
    sixth = torch.where(value == red, (green - blue) / safe, torch.where(value == green, 2.0 + (blue - red) / safe, 4.0 + (red - green) / safe))
    sixth = torch.where(chroma > 0, sixth, 0.0) + 6.0 * turn
    full = (chroma / value.clamp_min(1e-12) * saturation).clamp(0, 1) * value
    near = [(sixth + n) % 6.0 for n in (5.0, 3.0, 1.0)]
    return torch.stack([value - full * torch.minimum(k, 4.0 - k).clamp(0, 1) for k in near], dim=-1)

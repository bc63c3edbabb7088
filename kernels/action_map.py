"""kernels/action_map.py: an action map from pixel positions: discs first, then the axes' lines over them, arm after arm.

A pixel (x, y) is in the disc of radius r around (u, v) where (x - u)^2 + (y - v)^2 <= r^2. It is in a line of width w from p to q
where it is in a disc of radius w / 2 around p or q, or in the body between them: with L = |q - p|, c = max(|dx|, |dy|) / L, distance
d from the line and position s along it from p,  |d| <= w / 2 + c / 2  and  -c / 2 <= s <= L + c / 2.
What is painted later hides what was painted before. An arm whose origin is off the canvas is not painted at all; axis tips may be off.

OpenCV draws it on the CPU: its discs are these exactly, its lines differ in at most 0.5 % of a picture's pixels, all at the edges.
Source: the maps of EnerVerse-AC (arXiv:2505.09723), drawn with cv2.circle and cv2.line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

_FARTHEST_PX = 2**24  # tips of an arm in the camera's plane are infinitely far; OpenCV's fixed-point lines must not overflow


@dataclass(frozen=True)
class Brush:
    """How one arm is painted."""

    radius: int
    """Of the disc [px]."""
    thickness: int
    """Of the lines [px]."""
    axes: tuple[tuple[int, int, int], ...]
    """RGB of the x, y and z axis."""


def paint_ref(
    pixels: NDArray[np.int64], colours: NDArray[np.uint8], brushes: Sequence[Brush], size: tuple[int, int], background: int
) -> torch.Tensor:
    """The definition, pixel by pixel, in float64; arguments and result as those of `paint`."""
    height, width = size
    y, x = torch.meshgrid(torch.arange(height, dtype=torch.float64), torch.arange(width, dtype=torch.float64), indexing="ij")

    def disc(u: float, v: float, radius: float) -> torch.Tensor:
        return torch.le((x - u) ** 2 + (y - v) ** 2, radius**2)

    def line(start: NDArray[np.int64], end: NDArray[np.int64], thickness: float) -> torch.Tensor:
        (u, v), (du, dv) = (float(n) for n in start), (float(n) for n in end - start)
        ends = disc(u, v, thickness / 2) | disc(u + du, v + dv, thickness / 2)
        length = float(np.hypot(du, dv))
        if length == 0:
            return ends
        margin = max(abs(du), abs(dv)) / length / 2
        along, across = ((x - u) * du + (y - v) * dv) / length, ((x - u) * dv - (y - v) * du) / length
        return ends | ((across.abs() <= thickness / 2 + margin) & (along >= -margin) & (along <= length + margin))

    out = torch.full((len(pixels), height, width, 3), background, dtype=torch.uint8)
    for picture, points, fills in zip(out, pixels, colours, strict=True):
        shown = [i for i, ((u, v), *_) in enumerate(points) if 0 <= u < width and 0 <= v < height]
        for i in shown:
            picture[disc(float(points[i, 0, 0]), float(points[i, 0, 1]), brushes[i].radius)] = torch.from_numpy(fills[i])
        for i in shown:
            for tip, colour in zip(points[i, 1:], brushes[i].axes, strict=True):
                picture[line(points[i, 0], tip, brushes[i].thickness)] = torch.tensor(colour, dtype=torch.uint8)
    return out


def paint(
    pixels: NDArray[np.int64], colours: NDArray[np.uint8], brushes: Sequence[Brush], size: tuple[int, int], background: int
) -> torch.Tensor:
    """N action maps (N, H, W, 3) uint8 of A arms.

    `pixels` (N, A, 4, 2): x, y [px] of each arm's origin and of its axes' tips; `colours` (N, A, 3): of its disc; `brushes`: A of them;
    `size` (H, W) [px]; `background` 0 .. 255. Raises ValueError where shapes do not fit.
    """
    height, width = size
    if pixels.shape != (*colours.shape[:2], 4, 2) or colours.shape[1:] != (len(brushes), 3):
        raise ValueError(f"paint: pixels {pixels.shape}, colours {colours.shape}, {len(brushes)} brushes: want (N, A, 4, 2), (N, A, 3), A")
    out = np.full((len(pixels), height, width, 3), background, np.uint8)
    near = np.clip(pixels, -_FARTHEST_PX, _FARTHEST_PX).tolist()
    fill = colours.tolist()
    for picture, points, fills in zip(out, near, fill, strict=True):
        shown = [i for i, ((u, v), *_) in enumerate(points) if 0 <= u < width and 0 <= v < height]
        for i in shown:
            cv2.circle(picture, points[i][0], brushes[i].radius, fills[i], thickness=-1)
        for i in shown:
            for tip, colour in zip(points[i][1:], brushes[i].axes, strict=True):
                cv2.line(picture, points[i][0], tip, colour, brushes[i].thickness)
    return torch.from_numpy(out)

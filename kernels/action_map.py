"""kernels/action_map.py: an action map from pixel positions: discs first, then the axes' lines over them, arm after arm.

A pixel (x, y) is in the disc of radius r around (u, v) where (x - u)^2 + (y - v)^2 <= r^2. It is in a line of width w from p to q
where it is in a disc of radius w / 2 around p or q, or in the body between them: with L = |q - p|, c = max(|dx|, |dy|) / L, distance
d from the line and position s along it from p,  |d| <= w / 2 + c / 2  and  -c / 2 <= s <= L + c / 2.
What is painted later hides what was painted before. An arm whose origin is off the canvas is not painted at all; axis tips may be off.

OpenCV draws it on the CPU: its discs are these exactly, its lines differ in at most 0.5 % of a picture's pixels, all at the edges. The kernel draws
the definition, in integers, a block of bytes per program: a picture that is being written is never read, and most blocks have nothing on them.
Poses become pixels on the host (`worldenv.action_map`), where kinematics leaves them: a few numbers per picture go to the GPU, no picture does.
The ray map holds, per latent pixel, the unit direction of the ray through its centre and the place that it starts from, both in the world.
Source: the maps of EnerVerse-AC (arXiv:2505.09723), drawn with cv2.circle and cv2.line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

from worldenv.kernels.backend import Build, launch, uses_kernel

_BLOCK, _RAY_BLOCK = 2048, 256
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


def rays_ref(intrinsics: NDArray[np.float64], camera_to_world: NDArray[np.float64], mirrored: bool, latent: tuple[int, int]) -> torch.Tensor:
    """The definition, in float64; arguments and result as those of `rays`."""
    height, width = latent
    u, v = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    # In the picture u' = W - 1 - u of pixel indices is W - u of pixel centres, which count from the edge; so at latent size.
    u = width - u if mirrored else u
    local = np.stack([(u - intrinsics[0, 2]) / intrinsics[0, 0], (v - intrinsics[1, 2]) / intrinsics[1, 1], np.ones_like(u)], axis=-1)
    world = local @ camera_to_world[:3, :3].T
    world /= np.linalg.norm(world, axis=-1, keepdims=True)
    origin = np.broadcast_to(camera_to_world[:3, 3], world.shape)
    return torch.from_numpy(np.concatenate([world, origin], axis=-1).transpose(2, 0, 1).astype(np.float32))


def paint_opencv(
    pixels: NDArray[np.int64], colours: NDArray[np.uint8], brushes: Sequence[Brush], size: tuple[int, int], background: int
) -> torch.Tensor:
    """`paint` on the CPU."""
    import cv2  # a bare GPU machine has none, and needs none

    height, width = size
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


# The kernels


@triton.jit
def _paint_kernel(
    out_ptr, pixels_ptr, colours_ptr, brushes_ptr, arms, height, width, background, BLOCK: tl.constexpr
):
    size = height * width * 3
    blocks = tl.cdiv(size, BLOCK)
    zero = tl.full([], 0, tl.int64)
    picture, start = (tl.program_id(0) // blocks).to(tl.int64), (tl.program_id(0) % blocks) * BLOCK
    at = start + tl.arange(0, BLOCK)  # one picture stays below 2^31 bytes
    place, channel = at // 3, (at % 3).to(tl.int64)
    y, x = place // width, place % width
    top, bottom = start // 3 // width, (start + BLOCK - 1) // 3 // width
    value = tl.zeros_like(at) + background
    for arm in range(arms):
        point = pixels_ptr + (picture * arms + arm) * 8
        u, v = tl.load(point), tl.load(point + 1)
        shown = (u >= 0) & (u < width) & (v >= 0) & (v < height)
        radius = tl.load(brushes_ptr + (zero + arm) * 11)
        if shown & (v - radius <= bottom) & (v + radius >= top):
            dx, dy = x - u.to(tl.int32), y - v.to(tl.int32)
            colour = tl.load(colours_ptr + (picture * arms + arm) * 3 + channel).to(tl.int32)
            value = tl.where(dx * dx + dy * dy <= radius * radius, colour, value)
    for arm in range(arms):
        point, brush = pixels_ptr + (picture * arms + arm) * 8, brushes_ptr + (zero + arm) * 11
        u, v = tl.load(point), tl.load(point + 1)
        shown = (u >= 0) & (u < width) & (v >= 0) & (v < height)
        thickness = tl.load(brush + 1).to(tl.int64)
        for axis in range(3):
            tip_u, tip_v = tl.load(point + (zero + axis) * 2 + 2), tl.load(point + (zero + axis) * 2 + 3)
            if shown & (tl.minimum(v, tip_v) - thickness - 1 <= bottom) & (tl.maximum(v, tip_v) + thickness + 1 >= top):
                du, dv = tip_u - u, tip_v - v
                dx, dy = x - u, y - v
                squared = du * du + dv * dv
                longest = tl.maximum(tl.abs(du), tl.abs(dv))
                widest = (thickness.to(tl.float64) * tl.sqrt(squared.to(tl.float64)) + longest.to(tl.float64)).to(tl.int64)
                across, along = tl.abs(dx * dv - dy * du) * 2, (dx * du + dy * dv) * 2
                body = (squared > 0) & (across <= widest) & (along >= -longest) & (along <= squared * 2 + longest)
                ends = (dx * dx + dy * dy) * 4 <= thickness * thickness
                ends |= ((dx - du) * (dx - du) + (dy - dv) * (dy - dv)) * 4 <= thickness * thickness
                colour = tl.load(brush + 2 + (zero + axis) * 3 + channel)
                value = tl.where(body | ends, colour, value)
    tl.store(out_ptr + picture * size + at.to(tl.int64), value.to(tl.uint8), mask=at < size)


@triton.jit
def _rays_kernel(out_ptr, camera_ptr, height, width, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    pixels = tl.full([], 0, tl.int64) + height * width
    u, v = (at % width).to(tl.float64) + 0.5, (at // width).to(tl.float64) + 0.5
    u = tl.where(tl.load(camera_ptr + 16) != 0, width - u, u)
    x, y = (u - tl.load(camera_ptr + 2)) / tl.load(camera_ptr), (v - tl.load(camera_ptr + 3)) / tl.load(camera_ptr + 1)
    to_world = camera_ptr + 4
    a = tl.load(to_world) * x + tl.load(to_world + 1) * y + tl.load(to_world + 2)
    b = tl.load(to_world + 4) * x + tl.load(to_world + 5) * y + tl.load(to_world + 6)
    c = tl.load(to_world + 8) * x + tl.load(to_world + 9) * y + tl.load(to_world + 10)
    length = tl.sqrt(a * a + b * b + c * c)
    inside = at < pixels
    tl.store(out_ptr + at, (a / length).to(tl.float32), mask=inside)
    tl.store(out_ptr + pixels + at, (b / length).to(tl.float32), mask=inside)
    tl.store(out_ptr + 2 * pixels + at, (c / length).to(tl.float32), mask=inside)
    nothing = tl.zeros([BLOCK], tl.float32)
    for axis in tl.static_range(3):
        tl.store(out_ptr + (3 + axis) * pixels + at, nothing + tl.load(to_world + 3 + 4 * axis).to(tl.float32), mask=inside)


def paint_triton(
    pixels: NDArray[np.int64], colours: NDArray[np.uint8], brushes: Sequence[Brush], size: tuple[int, int], background: int, device: torch.device
) -> torch.Tensor:
    """`paint` by the kernel, in one launch."""
    height, width = size
    out = torch.empty(len(pixels), height, width, 3, dtype=torch.uint8, device=device)
    table = [[brush.radius, brush.thickness, *(level for rgb in brush.axes for level in rgb)] for brush in brushes]
    if out.numel():
        arguments = {
            "out_ptr": out, "pixels_ptr": torch.from_numpy(np.ascontiguousarray(pixels)).to(device),
            "colours_ptr": torch.from_numpy(np.ascontiguousarray(colours)).to(device),
            "brushes_ptr": torch.tensor(table, dtype=torch.int32, device=device), "arms": len(brushes), "height": height, "width": width,
            "background": background,
        }  # fmt: skip
        launch(_paint_kernel, len(pixels) * triton.cdiv(height * width * 3, _BLOCK), arguments, {"BLOCK": _BLOCK}, warps=8, contract=False)
    return out


def rays_triton(
    intrinsics: NDArray[np.float64], camera_to_world: NDArray[np.float64], mirrored: bool, latent: tuple[int, int], device: torch.device
) -> torch.Tensor:
    """`rays` by the kernel."""
    height, width = latent
    out = torch.empty(6, height, width, dtype=torch.float32, device=device)
    camera = [intrinsics[0, 0], intrinsics[1, 1], intrinsics[0, 2], intrinsics[1, 2], *camera_to_world[:3].ravel(), float(mirrored)]
    arguments = {"out_ptr": out, "camera_ptr": torch.tensor(camera, dtype=torch.float64, device=device), "height": height, "width": width}
    launch(_rays_kernel, triton.cdiv(height * width, _RAY_BLOCK), arguments, {"BLOCK": _RAY_BLOCK}, contract=False)
    return out


# The ways in


def paint(
    pixels: NDArray[np.int64],
    colours: NDArray[np.uint8],
    brushes: Sequence[Brush],
    size: tuple[int, int],
    background: int,
    device: torch.device | None = None,
) -> torch.Tensor:
    """N action maps (N, H, W, 3) uint8 of A arms, on `device` (default: the CPU).

    `pixels` (N, A, 4, 2): x, y [px] of each arm's origin and of its axes' tips, within +-1e9; `colours` (N, A, 3): of its disc; `brushes`: A of
    them; `size` (H, W) [px]; `background` 0 .. 255. Raises ValueError where shapes do not fit.
    """
    if pixels.shape != (*colours.shape[:2], 4, 2) or colours.shape[1:] != (len(brushes), 3):
        raise ValueError(f"paint: pixels {pixels.shape}, colours {colours.shape}, {len(brushes)} brushes: want (N, A, 4, 2), (N, A, 3), A")
    if device is not None and uses_kernel(device):
        return paint_triton(pixels, colours, brushes, size, background, device)
    return paint_opencv(pixels, colours, brushes, size, background).to(device or "cpu")


def rays(
    intrinsics: NDArray[np.float64],
    camera_to_world: NDArray[np.float64],
    mirrored: bool,
    latent: tuple[int, int],
    device: torch.device | None = None,
) -> torch.Tensor:
    """(6, h, w) float32 on `device` (default: the CPU): direction in the world, then place [m], of the ray through each latent pixel's centre.

    `intrinsics` (3, 3) [px] at the size `latent` (h, w); `camera_to_world` (4, 4) [m]; `mirrored` as in `nouns.Camera`.
    """
    if device is not None and uses_kernel(device):
        return rays_triton(intrinsics, camera_to_world, mirrored, latent, device)
    return rays_ref(intrinsics, camera_to_world, mirrored, latent).to(device or "cpu")


BUILDS = (
    Build(
        _paint_kernel,
        {
            "out_ptr": "*u8", "pixels_ptr": "*i64", "colours_ptr": "*u8", "brushes_ptr": "*i32", "arms": "i32", "height": "i32", "width": "i32",
            "background": "i32",
        },
        {"BLOCK": _BLOCK}, warps=8, contract=False,
    ),
    Build(_rays_kernel, {"out_ptr": "*fp32", "camera_ptr": "*fp64", "height": "i32", "width": "i32"}, {"BLOCK": _RAY_BLOCK}, contract=False),
)  # fmt: skip

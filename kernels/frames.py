"""kernels/frames.py: uint8 frames (N, H, W, 3) as each network takes them, and its pictures as frames: one pass over memory each.

    policy      TensorFlow's antialiased lanczos3, rounded to 8 bits; a central crop, bilinear, to 8 bits; less mean, by deviation, 6 channels
    reflector   the largest central square; Pillow's bicubic with antialias, rounded to 8 bits; to [-1, 1]
    VAE         bilinear with antialias where sizes differ; to [-1, 1], channels last in memory, as its convolutions read them
    back        [-1, 1], cut off there, rounded to the nearest of 256 levels

Every resize is a sum over few pixels per axis. On the CPU it is torch's, or a product with its matrix; the kernel takes the same weights as a table
of first pixel and taps per output pixel, and computes again, per output pixel, what the crop needs of the resized picture. Mirroring or cropping
before a resize is another table and nothing else.
Sources: the published evaluation of OpenVLA-OFT on LIBERO (arXiv:2502.19645); LLaVA-OneVision (arXiv:2408.03326) and SigLIP (arXiv:2303.15343);
EnerVerse-AC (arXiv:2505.09723).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from numpy.typing import NDArray

from worldenv.kernels.backend import Build, launch, uses_kernel

_BLOCK, _BYTES = 128, 2048
_HALF = (0.5, 0.5, 0.5)


# The definitions


@lru_cache(maxsize=16)
def _lanczos3_matrix(inputs: int, outputs: int) -> NDArray[np.float32]:
    """(outputs, inputs): each row the weights of one output pixel, sum 1; the kernel widens when shrinking (antialias)."""
    step = inputs / outputs
    stretch = max(step, 1.0)
    centre = (np.arange(outputs) + 0.5) * step - 0.5
    u = (np.arange(inputs)[None, :] - centre[:, None]) / stretch
    weight = np.where(np.abs(u) < 3.0, np.sinc(u) * np.sinc(u / 3.0), 0.0)
    matrix: NDArray[np.float32] = (weight / weight.sum(axis=1, keepdims=True)).astype(np.float32)
    return matrix


def resize_lanczos3(frames: torch.Tensor, size: int) -> torch.Tensor:
    """(B, H, W, 3) uint8 to (B, size, size, 3) uint8 as TensorFlow's antialiased lanczos3 does: both passes in float, one rounding."""
    if frames.shape[1:3] == (size, size):
        return frames
    rows, columns = (torch.from_numpy(_lanczos3_matrix(n, size)).to(frames.device) for n in frames.shape[1:3])
    tall = torch.einsum("oh,bhwc->bowc", rows, frames.float())
    return torch.einsum("pw,bowc->bopc", columns, tall).round().clamp(0, 255).to(torch.uint8)


@lru_cache(maxsize=16)
def _crop_matrix(inputs: int, outputs: int, side: float) -> NDArray[np.float32]:
    """(outputs, inputs): bilinear samples of the central `side` of the axis, first and last on its edges (crop_and_resize)."""
    low = np.float32((1.0 - side) / 2.0)
    high = np.float32(low + np.float32(side))
    at = low * np.float32(inputs - 1) + np.arange(outputs, dtype=np.float32) * (
        (high - low) * np.float32(inputs - 1) / np.float32(outputs - 1)
    )
    matrix = np.zeros((outputs, inputs), np.float32)
    floor = np.floor(at).astype(int)
    matrix[np.arange(outputs), floor] += 1.0 - (at - floor)
    matrix[np.arange(outputs), np.minimum(floor + 1, inputs - 1)] += at - floor
    return matrix


def centre_crop(frames: torch.Tensor, area: float) -> torch.Tensor:
    """(B, S, S, 3) uint8: the central `area` of each picture, back at size S. 1 changes nothing; ValueError unless 0 < area <= 1."""
    if not 0.0 < area <= 1.0:
        raise ValueError(f"centre_crop: area {area}, want a share in (0, 1]")
    if area == 1.0:
        return frames
    matrix = torch.from_numpy(_crop_matrix(frames.shape[1], frames.shape[1], float(np.sqrt(np.float32(area))))).to(frames.device)
    wide = torch.einsum("pw,bhwc->bhpc", matrix, frames.float() / 255.0)
    cropped = torch.einsum("oh,bhpc->bopc", matrix, wide).clamp(0.0, 1.0)
    return (cropped * 255.5).to(torch.uint8)  # TensorFlow's convert_image_dtype: truncation of x * (255 + 1/2)


def normalise_pixels(pictures: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """(B, S, S, 3) uint8 to (B, 6, S, S) float32: channels 0..2 for DINOv2 (minus `mean`, by `std`), 3..5 for SigLIP ([-1, 1])."""
    unit = pictures.permute(0, 3, 1, 2).float() / 255.0
    low, spread = (torch.tensor(tuple(three), device=unit.device)[:, None, None] for three in (mean, std))
    return torch.cat([(unit - low) / spread, (unit - 0.5) / 0.5], dim=1)


def for_policy_ref(frames: torch.Tensor, size: int, crop_area: float, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """The definition; arguments and result as those of `for_policy`."""
    return normalise_pixels(centre_crop(resize_lanczos3(frames, size), crop_area), mean, std)


def for_reflector_ref(frames: torch.Tensor, size: int) -> torch.Tensor:
    """The definition; arguments and result as those of `for_reflector`."""
    side = min(frames.shape[1:3])
    top, left = (frames.shape[1] - side) // 2, (frames.shape[2] - side) // 2
    pixels = frames[:, top : top + side, left : left + side].permute(0, 3, 1, 2).float()
    if side != size:
        pixels = F.interpolate(pixels, size=(size, size), mode="bicubic", antialias=True).round().clamp(0, 255)
    return pixels / 127.5 - 1


def for_vae_ref(frames: torch.Tensor, size: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """The definition; arguments and result as those of `for_vae`."""
    pictures = frames.permute(0, 3, 1, 2).to(dtype) / 255.0
    if pictures.shape[-2:] != size:
        pictures = F.interpolate(pictures, size, mode="bilinear", antialias=True)
    return pictures * 2.0 - 1.0


def to_frames_ref(pictures: torch.Tensor) -> torch.Tensor:
    """The definition; argument and result as those of `to_frames`."""
    unit = ((pictures + 1.0) / 2.0).clamp(0.0, 1.0)
    return (unit * 255.0).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


# The kernels


@triton.jit
def _nearest(x):
    """To the nearest integer, ties to even, of |x| < 2^22: adding 1.5 * 2^23 leaves no fraction."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _resized(frame_ptr, y, x, rows_ptr, row_weights_ptr, columns_ptr, column_weights_ptr, height, width, TALL: tl.constexpr, WIDE: tl.constexpr):
    """Three channels of the pixels (y, x) of the resized picture."""
    top, left = tl.load(rows_ptr + y), tl.load(columns_ptr + x)
    red, green, blue = tl.zeros(y.shape, tl.float32), tl.zeros(y.shape, tl.float32), tl.zeros(y.shape, tl.float32)
    for i in range(TALL):
        row = frame_ptr + tl.minimum(top + i, height - 1).to(tl.int64) * width * 3
        down = tl.load(row_weights_ptr + (y * TALL + i))
        for j in range(WIDE):
            at = row + tl.minimum(left + j, width - 1).to(tl.int64) * 3
            weight = down * tl.load(column_weights_ptr + (x * WIDE + j))
            red += weight * tl.load(at).to(tl.float32)
            green += weight * tl.load(at + 1).to(tl.float32)
            blue += weight * tl.load(at + 2).to(tl.float32)
    return red, green, blue


@triton.jit
def _to_level(x):
    return tl.minimum(tl.maximum(_nearest(x), 0.0), 255.0)


@triton.jit
def _pixels_kernel(
    frames_ptr, out_ptr, norm_ptr, rows_ptr, row_weights_ptr, columns_ptr, column_weights_ptr, crop_ptr, crop_weights_ptr,
    height, width, tall, wide, out_n, out_c, out_p,
    TALL: tl.constexpr, WIDE: tl.constexpr, LEVELS: tl.constexpr, CROP: tl.constexpr, SETS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pixels = tall * wide
    blocks = tl.cdiv(pixels, BLOCK)
    picture, at = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = at < pixels
    y, x = tl.where(inside, at // wide, 0).to(tl.int64), tl.where(inside, at % wide, 0).to(tl.int64)
    frame = frames_ptr + picture * height * width * 3
    if CROP:
        red, green, blue = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        top, left = tl.load(crop_ptr + y), tl.load(crop_ptr + x)
        for corner in range(4):
            i, j = corner // 2, corner % 2
            near_y, near_x = tl.minimum(top + i, tall - 1).to(tl.int64), tl.minimum(left + j, wide - 1).to(tl.int64)
            r, g, b = _resized(frame, near_y, near_x, rows_ptr, row_weights_ptr, columns_ptr, column_weights_ptr, height, width, TALL, WIDE)
            weight = tl.load(crop_weights_ptr + (y * 2 + i)) * tl.load(crop_weights_ptr + (x * 2 + j))
            red += weight * (_to_level(r) / 255.0)
            green += weight * (_to_level(g) / 255.0)
            blue += weight * (_to_level(b) / 255.0)
        red = tl.floor(tl.minimum(tl.maximum(red, 0.0), 1.0) * 255.5)
        green = tl.floor(tl.minimum(tl.maximum(green, 0.0), 1.0) * 255.5)
        blue = tl.floor(tl.minimum(tl.maximum(blue, 0.0), 1.0) * 255.5)
    else:
        red, green, blue = _resized(frame, y, x, rows_ptr, row_weights_ptr, columns_ptr, column_weights_ptr, height, width, TALL, WIDE)
        if LEVELS:
            red, green, blue = _to_level(red), _to_level(green), _to_level(blue)
    red, green, blue = red / 255.0, green / 255.0, blue / 255.0
    channel = tl.full([], 0, tl.int64) + out_c
    for set in tl.static_range(SETS):
        norm = norm_ptr + set * 6
        out = out_ptr + picture * out_n + set * 3 * channel + at.to(tl.int64) * out_p
        tl.store(out, (red - tl.load(norm)) / tl.load(norm + 3), mask=inside)
        tl.store(out + channel, (green - tl.load(norm + 1)) / tl.load(norm + 4), mask=inside)
        tl.store(out + 2 * channel, (blue - tl.load(norm + 2)) / tl.load(norm + 5), mask=inside)


@triton.jit
def _to_frames_kernel(pictures_ptr, out_ptr, pixels, in_n, in_c, in_p, BLOCK: tl.constexpr):
    size = pixels * 3
    blocks = tl.cdiv(size, BLOCK)
    picture, at = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    place, channel = (at // 3).to(tl.int64), (at % 3).to(tl.int64)
    value = tl.load(pictures_ptr + picture * in_n + channel * in_c + place * in_p, mask=at < size, other=0.0).to(tl.float32)
    unit = tl.minimum(tl.maximum((value + 1.0) * 0.5, 0.0), 1.0)
    tl.store(out_ptr + picture * size + at.to(tl.int64), _nearest(unit * 255.0).to(tl.uint8), mask=at < size)


@dataclass(frozen=True)
class Taps:
    """One axis of a resize, on a device."""

    first: torch.Tensor
    """(outputs,) int32: the first input pixel."""
    weights: torch.Tensor
    """(outputs, taps) float32; 0 behind the last input pixel."""


def taps(matrix: NDArray[np.float32], device: torch.device) -> Taps:
    """The rows of `matrix` (outputs, inputs) without the zeros around them."""
    used = matrix != 0
    first = used.argmax(axis=1)
    count = int((matrix.shape[1] - used[:, ::-1].argmax(axis=1) - first).max())
    places = first[:, None] + np.arange(count)
    weights = np.take_along_axis(matrix, np.minimum(places, matrix.shape[1] - 1), axis=1) * (places < matrix.shape[1])
    return Taps(torch.from_numpy(first.astype(np.int32)).to(device), torch.from_numpy(weights.astype(np.float32)).to(device))


@lru_cache(maxsize=32)
def _identity(count: int, device: torch.device) -> Taps:
    return taps(np.eye(count, dtype=np.float32), device)


@lru_cache(maxsize=32)
def _lanczos3(inputs: int, outputs: int, device: torch.device) -> Taps:
    return _identity(inputs, device) if inputs == outputs else taps(_lanczos3_matrix(inputs, outputs), device)


@lru_cache(maxsize=32)
def _crop(side: int, area: float, device: torch.device) -> Taps:
    return taps(_crop_matrix(side, side, float(np.sqrt(np.float32(area)))), device)


@lru_cache(maxsize=32)
def _interpolated(inputs: int, first: int, count: int, outputs: int, mode: str, device: torch.device) -> Taps:
    """torch's antialiased `mode`, of `count` pixels from `first` on to `outputs`: its answer to each single pixel is that pixel's weight."""
    matrix = np.zeros((outputs, inputs), np.float32)
    pixels = torch.eye(count, dtype=torch.float64)[None, None]
    same = count == outputs
    matrix[:, first : first + count] = pixels[0, 0] if same else F.interpolate(pixels, (outputs, count), mode=mode, antialias=True)[0, 0]
    return taps(matrix, device)


@lru_cache(maxsize=32)
def _on(norms: tuple[tuple[float, ...], ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(norms, dtype=torch.float32, device=device)


def _pixels_triton(
    frames: torch.Tensor, rows: Taps, columns: Taps, crop: Taps | None, norms: tuple[tuple[float, ...], ...], levels: bool, dtype: torch.dtype,
    channels_last: bool,
) -> torch.Tensor:  # fmt: skip
    """(N, 3 or 6, H', W') of `frames` (N, H, W, 3) uint8; each of `norms` three means and three deviations."""
    count, height, width, _ = frames.shape
    tall, wide, channels = len(rows.first), len(columns.first), 3 * len(norms)
    if channels_last:
        out = torch.empty(count, tall, wide, channels, dtype=dtype, device=frames.device).permute(0, 3, 1, 2)
    else:
        out = torch.empty(count, channels, tall, wide, dtype=dtype, device=frames.device)
    cropped = rows if crop is None else crop
    arguments = {
        "frames_ptr": frames.contiguous(), "out_ptr": out, "norm_ptr": _on(norms, frames.device),
        "rows_ptr": rows.first, "row_weights_ptr": rows.weights, "columns_ptr": columns.first, "column_weights_ptr": columns.weights,
        "crop_ptr": cropped.first, "crop_weights_ptr": cropped.weights, "height": height, "width": width, "tall": tall, "wide": wide,
        "out_n": out.stride(0), "out_c": out.stride(1), "out_p": out.stride(3),
    }  # fmt: skip
    constants = {
        "TALL": rows.weights.shape[1], "WIDE": columns.weights.shape[1], "LEVELS": levels, "CROP": crop is not None, "SETS": len(norms),
        "BLOCK": _BLOCK,
    }  # fmt: skip
    if out.numel():
        launch(_pixels_kernel, count * triton.cdiv(tall * wide, _BLOCK), arguments, constants, contract=False)
    return out


def for_policy_triton(frames: torch.Tensor, size: int, crop_area: float, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """`for_policy` by the kernel."""
    rows, columns = (_lanczos3(n, size, frames.device) for n in frames.shape[1:3])
    crop = None if crop_area == 1.0 else _crop(size, crop_area, frames.device)
    return _pixels_triton(frames, rows, columns, crop, ((*mean, *std), _HALF * 2), True, torch.float32, False)


def for_reflector_triton(frames: torch.Tensor, size: int) -> torch.Tensor:
    """`for_reflector` by the kernel."""
    side = min(frames.shape[1:3])
    rows, columns = (_interpolated(n, (n - side) // 2, side, size, "bicubic", frames.device) for n in frames.shape[1:3])
    return _pixels_triton(frames, rows, columns, None, (_HALF * 2,), True, torch.float32, False)


def for_vae_triton(frames: torch.Tensor, size: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """`for_vae` by the kernel."""
    rows, columns = (_interpolated(n, 0, n, wanted, "bilinear", frames.device) for n, wanted in zip(frames.shape[1:3], size, strict=True))
    return _pixels_triton(frames, rows, columns, None, (_HALF * 2,), False, dtype, True)


def to_frames_triton(pictures: torch.Tensor) -> torch.Tensor:
    """`to_frames` by the kernel."""
    if pictures.stride(2) != pictures.shape[3] * pictures.stride(3):
        pictures = pictures.contiguous()
    count, _, height, width = pictures.shape
    out = torch.empty(count, height, width, 3, dtype=torch.uint8, device=pictures.device)
    arguments = {
        "pictures_ptr": pictures, "out_ptr": out, "pixels": height * width, "in_n": pictures.stride(0), "in_c": pictures.stride(1),
        "in_p": pictures.stride(3),
    }  # fmt: skip
    if out.numel():
        launch(_to_frames_kernel, count * triton.cdiv(height * width * 3, _BYTES), arguments, {"BLOCK": _BYTES}, contract=False)
    return out


# The ways in


def _check(frames: torch.Tensor) -> None:
    if frames.dim() != 4 or frames.shape[-1] != 3 or frames.dtype != torch.uint8 or math.prod(frames.shape[1:]) >= 2**31:
        raise ValueError(f"frames {tuple(frames.shape)} {frames.dtype}, want (N, H, W, 3) uint8, each below 2^31 bytes")


def for_policy(frames: torch.Tensor, size: int, crop_area: float, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """(B, 6, size, size) float32 of `frames` (B, H, W, 3) uint8, behind the JPEG round trip where there is one.

    Channels 0 .. 2 less `mean`, by `std` (DINOv2's), 3 .. 5 in [-1, 1] (SigLIP's). ValueError unless 0 < `crop_area` <= 1, or for what is no frame.
    """
    if not 0.0 < crop_area <= 1.0:
        raise ValueError(f"centre_crop: area {crop_area}, want a share in (0, 1]")
    _check(frames)
    return (for_policy_triton if uses_kernel(frames) else for_policy_ref)(frames, size, crop_area, mean, std)


def for_reflector(frames: torch.Tensor, size: int) -> torch.Tensor:
    """(N, 3, size, size) float32 in [-1, 1] of `frames` (N, H, W, 3) uint8; ValueError for what is no frame."""
    _check(frames)
    return (for_reflector_triton if uses_kernel(frames) else for_reflector_ref)(frames, size)


def for_vae(frames: torch.Tensor, size: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """(N, 3, *size) of `dtype` in [-1, 1] of `frames` (N, H, W, 3) uint8; ValueError for what is no frame."""
    _check(frames)
    return (for_vae_triton if uses_kernel(frames) else for_vae_ref)(frames, size, dtype)


def to_frames(pictures: torch.Tensor) -> torch.Tensor:
    """Frames (N, H, W, 3) uint8 of `pictures` (N, 3, H, W) in about [-1, 1], in any strides; ValueError where there are not three channels."""
    if pictures.dim() != 4 or pictures.shape[1] != 3:
        raise ValueError(f"pictures {tuple(pictures.shape)}, want (N, 3, H, W)")
    return to_frames_triton(pictures) if uses_kernel(pictures) else to_frames_ref(pictures)


_TABLES = {"rows_ptr": "*i32", "row_weights_ptr": "*fp32", "columns_ptr": "*i32", "column_weights_ptr": "*fp32", "crop_ptr": "*i32"}
_SIZES = dict.fromkeys(("height", "width", "tall", "wide", "out_n", "out_c", "out_p"), "i32")
BUILDS = (
    *(
        Build(
            _pixels_kernel,
            {"frames_ptr": "*u8", "out_ptr": out, "norm_ptr": "*fp32", **_TABLES, "crop_weights_ptr": "*fp32", **_SIZES},
            {"TALL": tall, "WIDE": wide, "LEVELS": levels, "CROP": crop, "SETS": sets, "BLOCK": _BLOCK}, contract=False,
        )
        for out, tall, wide, levels, crop, sets in (
            ("*fp32", 7, 7, True, True, 2),  # policy, from 256 x 256
            ("*fp32", 9, 14, True, True, 2),  # policy, from 320 x 512
            ("*fp32", 1, 1, True, False, 2),  # policy, at its own size without crop
            ("*fp32", 4, 4, True, False, 1),  # reflector, to more pixels
            ("*fp32", 1, 1, True, False, 1),  # reflector, at its own size
            ("*fp32", 1, 1, False, False, 1),  # VAE
            ("*bf16", 1, 1, False, False, 1),
            ("*fp32", 2, 2, False, False, 1),  # VAE, to more pixels
        )
    ),
    *(
        Build(
            _to_frames_kernel,
            {"pictures_ptr": dtype, "out_ptr": "*u8", "pixels": "i32", "in_n": "i32", "in_c": "i32", "in_p": "i32"}, {"BLOCK": _BYTES},
            contract=False,
        )
        for dtype in ("*fp32", "*bf16")
    ),
)  # fmt: skip

"""What a picture looks like after TensorFlow wrote it as JPEG and read it back: quality 95, 4:2:0, decoded with the fast integer IDCT.

OpenVLA-OFT's training pictures went this way, so the published evaluation sends every picture through it. The fast IDCT matters: an
accurate decoder gives red and blue about one grey level more. Entropy coding loses nothing, so none is done: what remains is integer
arithmetic, batched, on any device, bit-equal everywhere. The transforms are those of the Independent JPEG Group's library, written from
their definition: colour and chroma by 16-bit fixed point, forward DCT of Loeffler, Ligtenberg and Moschytz 1989 (13-bit constants), inverse
DCT of Arai, Agui and Nakajima 1988 (8-bit constants, truncating), chroma up by the 3:1 triangle.
"""

from __future__ import annotations

from functools import lru_cache

import torch

_LUMA = (
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51, 87, 80, 62,
    18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92, 49, 64, 78, 87, 103, 121, 120, 101,
    72, 92, 95, 98, 112, 100, 103, 99,
)  # fmt: skip
_CHROMA = (
    17, 18, 24, 47, 99, 99, 99, 99, 18, 21, 26, 66, 99, 99, 99, 99, 24, 26, 56, 99, 99, 99, 99, 99, 47, 66, 99, 99, 99, 99, 99, 99,
    *(99,) * 32,
)  # fmt: skip
_QUALITY = 95
_AAN = torch.tensor([1.0, *((2.0**0.5) * torch.cos(torch.arange(1, 8, dtype=torch.float64) * torch.pi / 16)).tolist()], dtype=torch.float64)


@lru_cache(maxsize=8)
def _tables(device: torch.device) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """For luma and chroma: the quantiser (8, 8), and the factor (8, 8) of the inverse transform, which has the AAN scales in it [2^-2]."""
    out = []
    for base in (_LUMA, _CHROMA):
        quantiser = ((torch.tensor(base) * (200 - 2 * _QUALITY) + 50) // 100).clamp(1, 255).reshape(8, 8)
        scales = (16384.0 * _AAN[:, None] * _AAN[None, :]).round().long()
        out.append((quantiser.int().to(device), ((quantiser * scales + (1 << 11)) >> 12).int().to(device)))
    return out[0], out[1]


def _fix(constant: float) -> int:
    return round(constant * 8192)


def _forward_pass(d: list[torch.Tensor], even_shift: int, shift: int) -> list[torch.Tensor]:
    """Eight samples to eight coefficients along a list; 0 and 4 are shifted by `even_shift` (left where negative), the rest by `shift`."""

    def descale(x: torch.Tensor, bits: int) -> torch.Tensor:
        return (x + (1 << (bits - 1))) >> bits

    s, t = [d[i] + d[7 - i] for i in range(4)], [d[3 - i] - d[4 + i] for i in range(4)]  # t: d3-d4, d2-d5, d1-d6, d0-d7
    a, b, c, e = s[0] + s[3], s[1] + s[2], s[1] - s[2], s[0] - s[3]
    outer = [a + b, a - b]
    outer = [x << -even_shift if even_shift < 0 else descale(x, even_shift) for x in outer]
    z = (c + e) * _fix(0.541196100)
    two, six = z + e * _fix(0.765366865), z - c * _fix(1.847759065)
    z5 = (t[0] + t[2] + t[1] + t[3]) * _fix(1.175875602)
    z1, z2 = (t[0] + t[3]) * -_fix(0.899976223), (t[1] + t[2]) * -_fix(2.562915447)
    z3, z4 = (t[0] + t[2]) * -_fix(1.961570560) + z5, (t[1] + t[3]) * -_fix(0.390180644) + z5
    seven, five = t[0] * _fix(0.298631336) + z1 + z3, t[1] * _fix(2.053119869) + z2 + z4
    three, one = t[2] * _fix(3.072711026) + z2 + z3, t[3] * _fix(1.501321110) + z1 + z4
    one, two, three, five, six, seven = (descale(x, shift) for x in (one, two, three, five, six, seven))
    return [outer[0], one, two, three, outer[1], five, six, seven]


def _inverse_pass(c: list[torch.Tensor]) -> list[torch.Tensor]:
    """Eight scaled coefficients to eight samples along a list."""

    def times(x: torch.Tensor, constant: int) -> torch.Tensor:
        return (x * constant) >> 8

    a, b, d = c[0] + c[4], c[0] - c[4], c[2] + c[6]
    e = times(c[2] - c[6], 362) - d
    even = [a + d, b + e, b - e, a - d]
    z13, z10, z11, z12 = c[5] + c[3], c[5] - c[3], c[1] + c[7], c[1] - c[7]
    seven = z11 + z13
    z5 = times(z10 + z12, 473)
    six = times(z10, -669) + z5 - seven
    five = times(z11 - z13, 362) - six
    four = times(z12, 277) - z5 + five
    return [even[0] + seven, even[1] + six, even[2] + five, even[3] - four, even[3] + four, even[2] - five, even[1] - six, even[0] - seven]


def _round_trip_plane(plane: torch.Tensor, quantiser: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """One plane (B, 8 m, 8 n) int32 of 0 .. 255: forward transform, quantise, inverse transform."""
    batch, height, width = plane.shape
    blocks = plane.reshape(batch, height // 8, 8, width // 8, 8).transpose(2, 3) - 128  # (B, m, n, row, column)
    rows = torch.stack(_forward_pass(list(blocks.unbind(-1)), -2, 11), dim=-1)
    coefficients = torch.stack(_forward_pass(list(rows.unbind(-2)), 2, 15), dim=-2)
    step = quantiser * 8
    level = coefficients.sign() * ((coefficients.abs() + step // 2) // step)
    columns = torch.stack(_inverse_pass(list((level * factor).unbind(-2))), dim=-2)
    samples = (torch.stack(_inverse_pass(list(columns.unbind(-1))), dim=-1) >> 5) + 128
    return samples.clamp(0, 255).transpose(2, 3).reshape(batch, height, width)


def _pad(plane: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(B, h, w) enlarged by repeating its last row and column."""
    rows = torch.arange(height, device=plane.device).clamp_max(plane.shape[1] - 1)
    columns = torch.arange(width, device=plane.device).clamp_max(plane.shape[2] - 1)
    return plane[:, rows][:, :, columns]


def _up(multiple: int, n: int) -> int:
    return -(-n // multiple) * multiple


def _enlarge(plane: torch.Tensor) -> torch.Tensor:
    """(B, h, w) to (B, 2 h, 2 w): each sample 3 parts the nearest and 1 part the next, in both directions."""
    above, below = torch.cat([plane[:, :1], plane[:, :-1]], dim=1), torch.cat([plane[:, 1:], plane[:, -1:]], dim=1)
    tall = torch.stack([3 * plane + above, 3 * plane + below], dim=2).flatten(1, 2)
    left, right = torch.cat([tall[..., :1], tall[..., :-1]], dim=-1), torch.cat([tall[..., 1:], tall[..., -1:]], dim=-1)
    return torch.stack([(3 * tall + left + 8) >> 4, (3 * tall + right + 7) >> 4], dim=-1).flatten(2)


def jpeg_round_trip(frames: torch.Tensor) -> torch.Tensor:
    """(B, H, W, 3) uint8 RGB, H and W at least 6, as they are after JPEG; see the module. ValueError for another shape or dtype."""
    if frames.dim() != 4 or frames.shape[3] != 3 or frames.dtype != torch.uint8 or min(frames.shape[1:3]) < 6:
        raise ValueError(f"jpeg_round_trip: frames {tuple(frames.shape)} {frames.dtype}, want (B, H >= 6, W >= 6, 3) uint8")
    _, height, width, _ = frames.shape
    luma, chroma = _tables(frames.device)
    r, g, b = frames.int().unbind(-1)
    y = (19595 * r + 38470 * g + 7471 * b + 32768) >> 16
    cb = (-11059 * r - 21709 * g + 32768 * b + (128 << 16) + 32767) >> 16
    cr = (32768 * r - 27439 * g - 5329 * b + (128 << 16) + 32767) >> 16

    y = _round_trip_plane(_pad(y, _up(16, height), _up(16, width)), *luma)[:, :height, :width]
    up = []
    for plane in (cb, cr):
        full = _pad(plane, _up(2, height), _up(16, width))
        four = full[:, 0::2, 0::2] + full[:, 0::2, 1::2] + full[:, 1::2, 0::2] + full[:, 1::2, 1::2]
        bias = 1 + torch.arange(four.shape[2], device=frames.device, dtype=torch.int32) % 2  # 1, 2, 1, 2: no drift
        half = _round_trip_plane(_pad((four + bias) >> 2, _up(8, four.shape[1]), four.shape[2]), *chroma)
        up.append(_enlarge(half[:, : -(-height // 2), : -(-width // 2)])[:, :height, :width] - 128)
    blue, red = up
    rgb = [
        y + ((91881 * red + 32768) >> 16),
        y + ((-22554 * blue - 46802 * red + 32768) >> 16),
        y + ((116130 * blue + 32768) >> 16),
    ]
    return torch.stack(rgb, dim=-1).clamp(0, 255).to(torch.uint8)

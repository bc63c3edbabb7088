"""kernels/philox.py: the counter RNG of noise.py and csrc/core/philox on a GPU, bit for bit.

The definitions are those of noise.py. Words are integer arithmetic. Uniforms and normals are float64 sums, products, quotients and roots in the
order that noise.py writes down: these are compiled without contraction, so that IEEE 754 leaves one result.
Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", Philox4x32-10.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from numpy.typing import ArrayLike

from worldenv import noise
from worldenv.kernels.backend import Build, launch, uses_kernel

_BLOCK = 256
_KINDS = {"bits": 0, "uniform": 1, "normal": 2}
_TYPES = {"bits": torch.int32, "uniform": torch.float64, "normal": torch.float32}

_LOG_SERIES = tl.constexpr(tuple(1.0 / (2 * k + 1) for k in range(11)))
_SIN_SERIES = tl.constexpr(tuple((-1.0) ** k / math.factorial(2 * k + 1) for k in range(9)))
_COS_SERIES = tl.constexpr(tuple((-1.0) ** k / math.factorial(2 * k) for k in range(9)))
_LN2 = tl.constexpr(math.log(2.0))
_HALF_SQRT2 = tl.constexpr(math.sqrt(0.5))
_ANGLE = tl.constexpr(2.0 * math.pi / 2**32)


@dataclass(frozen=True)
class Draw:
    """B draws of the counter RNG, each with an address of its own."""

    words: torch.Tensor
    """(B, 5) int64, each 0 .. 2^32 - 1: seed, rollout, chunk, step, stream (`noise`)."""

    @classmethod
    def of(
        cls, seed: int, rollout: ArrayLike, chunk: ArrayLike, step: ArrayLike, stream: int, device: torch.device | str = "cpu"
    ) -> Draw:
        """Arguments and ValueError as in `noise.bits`; integers alone are one draw."""
        seed, rollouts, chunks, steps, stream, _ = noise.address(seed, rollout, chunk, step, stream, 0)
        words = torch.stack([torch.from_numpy(part.astype("int64")) for part in (rollouts, chunks, steps)], dim=1)
        ends = torch.tensor([seed, stream], dtype=torch.int64).expand(len(words), 2)
        return cls(torch.cat([ends[:, :1], words, ends[:, 1:]], dim=1).to(device))

    def at(self, step: torch.Tensor) -> Draw:
        """The same draws at `step` (B,) int64 instead."""
        words = self.words.clone()
        words[:, 3] = step
        return Draw(words)


@triton.jit
def philox_block(k0, k1, c0, c1, c2, c3):
    """Four words (uint32) of the block at counter (c0, c1, c2, c3) under key (k0, k1), all uint32 and alike in shape."""
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, 0xD2511F53), c0 * 0xD2511F53
        high1, low1 = tl.umulhi(c2, 0xCD9E8D57), c2 * 0xCD9E8D57
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def philox_words(words_ptr, row, step, block):
    """Four words of each of the uint32 element counters `block` of draw number `row` of `Draw.words`, at `step` instead of its own."""
    at = words_ptr + row * 5
    zero = tl.zeros_like(block)
    seed, rollout, chunk = tl.load(at).to(tl.uint32), tl.load(at + 1).to(tl.uint32), tl.load(at + 2).to(tl.uint32)
    stream = tl.load(at + 4).to(tl.uint32)
    return philox_block(zero + seed, zero + rollout, zero + chunk, zero + step.to(tl.uint32), zero + stream, block)


@triton.jit
def in_order(a, b, c, d):
    """a[0], b[0], c[0], d[0], a[1], ..."""
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def unit(word):
    """(w + 1/2) / 2^32, float64."""
    return (word.to(tl.float64) + 0.5) * 2.3283064365386963e-10


@triton.jit
def _horner(z, SERIES: tl.constexpr, LAST: tl.constexpr):
    total = tl.zeros_like(z) + SERIES[LAST]
    for k in tl.static_range(LAST):
        total = total * z + SERIES[LAST - 1 - k]
    return total


@triton.jit
def _log_unit(u):
    bits = u.to(tl.int64, bitcast=True)
    exponent = ((bits >> 52) - 1022).to(tl.float64)
    mantissa = ((bits & 0x000FFFFFFFFFFFFF) | 0x3FE0000000000000).to(tl.float64, bitcast=True)
    low = mantissa < _HALF_SQRT2
    mantissa = tl.where(low, mantissa * 2.0, mantissa)
    exponent = tl.where(low, exponent - 1.0, exponent)
    s = (mantissa - 1.0) / (mantissa + 1.0)
    return exponent * _LN2 + s * 2.0 * _horner(s * s, _LOG_SERIES, 10)


@triton.jit
def box_muller(first, second):
    """The two normals (float32) of one pair of words."""
    radius = tl.sqrt(_log_unit(unit(first)) * -2.0)
    word = second.to(tl.int64)
    quarter = (word + 536870912) >> 30
    x = ((word - (quarter << 30)).to(tl.float64) + 0.5) * _ANGLE
    z = x * x
    sin, cos = x * _horner(z, _SIN_SERIES, 8), _horner(z, _COS_SERIES, 8)
    odd = (quarter & 1) != 0
    along, across = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    along = tl.where(((quarter + 1) & 2) != 0, -along, along)
    across = tl.where((quarter & 2) != 0, -across, across)
    return (radius * along).to(tl.float32), (radius * across).to(tl.float32)


@triton.jit
def philox_normals(words_ptr, row, first, step, BLOCK: tl.constexpr):
    """BLOCK normals (float32) of draw `row` at `step`, from element `first` on, a multiple of 4. To be compiled without contraction."""
    block = (first // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    a, b, c, d = philox_words(words_ptr, row, step, block)
    n0, n1 = box_muller(a, b)
    n2, n3 = box_muller(c, d)
    return in_order(n0, n1, n2, n3)


@triton.jit
def _fill_kernel(words_ptr, out_ptr, count, KIND: tl.constexpr, BLOCK: tl.constexpr):
    per_row = tl.cdiv(count, BLOCK)
    row = (tl.program_id(0) // per_row).to(tl.int64)
    first = (tl.program_id(0) % per_row).to(tl.int64) * BLOCK
    step = tl.load(words_ptr + row * 5 + 3)
    if KIND == 2:
        values = philox_normals(words_ptr, row, first, step, BLOCK)
    else:
        a, b, c, d = philox_words(words_ptr, row, step, (first // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32))
        values = in_order(unit(a), unit(b), unit(c), unit(d)) if KIND == 1 else in_order(a, b, c, d).to(tl.int32, bitcast=True)
    at = first + tl.arange(0, BLOCK)
    tl.store(out_ptr + row * count + at, values, mask=at < count)


def fill_triton(kind: str, draw: Draw, shape: Sequence[int]) -> torch.Tensor:
    """`kind` ("bits" as int32, "uniform", "normal") of each draw, (B, *shape), by the kernel."""
    out = torch.empty(len(draw.words), *shape, dtype=_TYPES[kind], device=draw.words.device)
    count = math.prod(shape)
    if out.numel():
        arguments = {"words_ptr": draw.words.contiguous(), "out_ptr": out, "count": count}
        launch(_fill_kernel, len(out) * triton.cdiv(count, _BLOCK), arguments, {"KIND": _KINDS[kind], "BLOCK": _BLOCK}, contract=False)
    return out


def fill_ref(kind: str, draw: Draw, shape: Sequence[int]) -> torch.Tensor:
    """The definition: noise.py's, draw by draw where seeds or streams differ."""
    words, count = draw.words.cpu().numpy(), math.prod(shape)
    if not len(words):
        return torch.empty(0, *shape, dtype=_TYPES[kind])
    if (words[:, [0, 4]] != words[0, [0, 4]]).any():
        return torch.cat([fill_ref(kind, Draw(one[None]), shape) for one in draw.words])
    at = (int(words[0, 0]), words[:, 1], words[:, 2], words[:, 3], int(words[0, 4]))
    if kind == "bits":
        return torch.from_numpy(noise.bits(*at, count).view("int32")).view(-1, *shape)
    return torch.from_numpy(noise.uniform(*at, shape) if kind == "uniform" else noise.normal(*at, shape))


def normal(draw: Draw, shape: Sequence[int]) -> torch.Tensor:
    """Standard normals (B, *shape) float32 on the draws' device: `noise.normal`'s bits, which need not travel there."""
    return fill_triton("normal", draw, shape) if uses_kernel(draw.words) else fill_ref("normal", draw, shape)


BUILDS = tuple(
    Build(_fill_kernel, {"words_ptr": "*i64", "out_ptr": out, "count": "i32"}, {"KIND": _KINDS[kind], "BLOCK": _BLOCK}, contract=False)
    for kind, out in {"bits": "*i32", "uniform": "*fp64", "normal": "*fp32"}.items()
)

"""The counter RNG: every random number is a function of what it is for, never of when, where or in which batch it is drawn.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"). One block is four 32-bit words:

    key      (seed, rollout)                              2 x 32 bit
    counter  (chunk, step, stream, element counter)       4 x 32 bit, in this order, word 0 first

Element e of a draw is word e % 4 of the block whose element counter is e // 4, so a longer draw begins with the shorter one.
`chunk` is the query of the rollout, `step` a step inside it (or an optimiser step), `stream` what the number is for.

    uniform   u = (w + 1/2) / 2^32, in float64: exact, never 0 or 1
    normal    Box-Muller in float64 on the words (2p, 2p + 1), cast to float32:
              r = sqrt(-2 ln u), elements (2p, 2p + 1) = r cos(2 pi v), r sin(2 pi v)

ln, sin and cos are written out in additions, products, quotients and roots, which IEEE 754 fixes to the last bit: libraries' own
differ between machines. The definitions below (`*_definition`) judge the fast path in csrc/core/philox, which is bit-equal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

from worldenv import _core

_WORD = 2**32
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


class Stream(IntEnum):
    """What a number is for. A value is never used again for something else: old runs could not be replayed."""

    POLICY = 1
    """The action that a query draws: uniform, (K, 7), by (rollout, chunk)."""
    SIMULATOR = 2
    """Noise of the denoising loop: normal, by (rollout, chunk, denoising step)."""
    REFLECTOR = 3
    """Whatever a reflector draws."""
    SCENE = 4
    """Fixed initial states of an environment: chunk = number of the state, step = attempt."""
    DEMOS = 5
    """Scripted demonstrations: rollout = number of the demonstration."""
    EXPLORE = 6
    """Choices of the exploration stage."""
    CONTEXT = 7
    """Which start states an iteration takes."""
    HOLD_OUT = 8
    """Which episodes are held out."""
    WEIGHTS = 9
    """Initial weights, by `torch_seed`; step = number of the network."""
    BATCH = 10
    """Batches of a stage that has no stream of its own."""
    SFT = 11
    """Batches of stage sft."""
    SCALE = 12
    """Batches of stage scale."""
    VAE = 13
    """Batches of the autoencoder."""
    VAE_NOISE = 14
    """The autoencoder's posterior samples in training."""
    WORLD = 15
    """Batches of the simulator's training."""
    WORLD_NOISE = 16
    """Diffusion noise in the simulator's training."""
    WORLD_TIME = 17
    """Diffusion times in the simulator's training."""
    WORLD_MEMORY = 18
    """Memory-noise augmentation in the simulator's training."""
    WORLD_DROPOUT = 19
    """Condition dropout in the simulator's training."""
    BACKBONE = 20
    """Batches of the reflector's backbone."""
    REWARD = 21
    """Batches of the reward head."""
    EMBEDDING = 22
    """Which frames are embedded for the reward head."""
    LOOP = 23
    """Order of rollouts in a LOOP update."""
    EVALUATION = 24
    """Choices of evaluation."""
    REPORT = 25
    """Which rollouts the report replays and shows."""
    SHUFFLE = 26
    """Permutation of the advantages in the shuffle control, by iteration and by which run of the control it is."""


def philox(counter: NDArray[np.uint32], key: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Philox4x32-10: blocks (..., 4) of `counter` (..., 4) under `key` (..., 2), all uint32 words."""
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = (key[..., i].astype(np.uint64) for i in range(2))
    mask, half = np.uint64(_WORD - 1), np.uint64(32)
    for _ in range(_ROUNDS):
        product0, product1 = np.uint64(_MULTIPLIERS[0]) * c0, np.uint64(_MULTIPLIERS[1]) * c2
        c0, c1, c2, c3 = (product1 >> half) ^ c1 ^ k0, product1 & mask, (product0 >> half) ^ c3 ^ k1, product0 & mask
        k0, k1 = (k0 + np.uint64(_WEYL[0])) & mask, (k1 + np.uint64(_WEYL[1])) & mask
    return np.stack(np.broadcast_arrays(c0, c1, c2, c3), axis=-1).astype(np.uint32)


def _word(name: str, value: int) -> int:
    """`value` as one 32-bit word, or ValueError."""
    if not isinstance(value, int | np.integer) or not 0 <= value < _WORD:
        raise ValueError(f"noise: {name}={value!r}, want an integer in 0 .. 2^32 - 1")
    return int(value)


def _words(name: str, value: ArrayLike) -> NDArray[np.uint32]:
    """`value`, an integer or a 1-D array of them, as 32-bit words; ValueError where one does not fit."""
    array = np.asarray(value)
    if array.dtype.kind not in "iu" or array.ndim > 1 or (array.size and not (int(array.min()) >= 0 and int(array.max()) < _WORD)):
        raise ValueError(f"noise: {name}={value!r}, want integers in 0 .. 2^32 - 1, one or a 1-D array")
    return array.astype(np.uint32)


def address(
    seed: int, rollout: ArrayLike, chunk: ArrayLike, step: ArrayLike, stream: int, count: int
) -> tuple[int, NDArray[np.uint32], NDArray[np.uint32], NDArray[np.uint32], int, bool]:
    """Checked words: seed, then rollout, chunk and step (B,) alike, then stream; and whether any of the three was an array."""
    seed, stream = _word("seed", seed), _word("stream", stream)
    if not 0 <= count <= 4 * _WORD:
        raise ValueError(f"noise: a draw of {count} elements, want 0 .. 2^34")
    parts = [_words("rollout", rollout), _words("chunk", chunk), _words("step", step)]
    lengths = {part.shape[0] for part in parts if part.ndim}
    if len(lengths) > 1:
        raise ValueError(f"noise: rollout, chunk, step of {', '.join(str(part.shape) for part in parts)}: want equal lengths")
    many = bool(lengths)
    size = lengths.pop() if many else 1
    a, b, c = (np.ascontiguousarray(np.broadcast_to(part, (size,))) for part in parts)
    return seed, a, b, c, stream, many


def bits_definition(seed: int, rollout: ArrayLike, chunk: ArrayLike, step: ArrayLike, stream: int, count: int) -> NDArray[np.uint32]:
    """What `bits` is, in plain numpy."""
    seed, rollouts, chunks, steps, stream, many = address(seed, rollout, chunk, step, stream, count)
    blocks = -(-count // 4)
    counter = np.empty((len(rollouts), blocks, 4), np.uint32)
    counter[..., 0], counter[..., 1], counter[..., 2] = chunks[:, None], steps[:, None], stream
    counter[..., 3] = np.arange(blocks, dtype=np.uint32)
    key = np.empty((len(rollouts), 1, 2), np.uint32)
    key[..., 0], key[..., 1] = seed, rollouts[:, None]
    words = philox(counter, key).reshape(len(rollouts), 4 * blocks)[:, :count]
    return words if many else words[0]


def uniform_definition(words: NDArray[np.uint32]) -> NDArray[np.float64]:
    """(w + 1/2) / 2^32, like `words` in shape."""
    unit: NDArray[np.float64] = (words.astype(np.float64) + 0.5) / _WORD
    return unit


def _horner(z: NDArray[np.float64], coefficients: Sequence[float]) -> NDArray[np.float64]:
    """sum of coefficients[k] z^k, from the highest power down."""
    total = np.full_like(z, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total = total * z + coefficient
    return total


_LOG_SERIES = [1.0 / (2 * k + 1) for k in range(11)]  # atanh(s) / s in s^2, |s| <= 0.172: the rest is below 1e-18
_SIN_SERIES = [(-1.0) ** k / math.factorial(2 * k + 1) for k in range(9)]  # sin(x) / x in x^2, |x| <= pi / 4: below 1e-19
_COS_SERIES = [(-1.0) ** k / math.factorial(2 * k) for k in range(9)]  # cos(x) in x^2: below 1e-17


def _log(u: NDArray[np.float64]) -> NDArray[np.float64]:
    """ln u for u in (0, 1): u = 2^e m with m in sqrt(1/2) .. sqrt(2), ln m = 2 atanh((m - 1) / (m + 1))."""
    mantissa, exponent = np.frexp(u)
    low = mantissa < math.sqrt(0.5)
    mantissa, exponent = np.where(low, 2.0 * mantissa, mantissa), exponent.astype(np.float64) - low
    s = (mantissa - 1.0) / (mantissa + 1.0)
    result: NDArray[np.float64] = exponent * math.log(2.0) + 2.0 * s * _horner(s * s, _LOG_SERIES)
    return result


def normal_definition(words: NDArray[np.uint32]) -> NDArray[np.float32]:
    """Standard normals of `words` (..., even): Box-Muller on pairs of words, like `words` in shape."""
    first, second = words[..., 0::2], words[..., 1::2].astype(np.int64)
    radius = np.sqrt(-2.0 * _log(uniform_definition(first)))
    quarter = (second + 2**29) >> 30  # nearest quarter turn, in integers: the rest of the angle is exact before one rounding
    x = ((second - (quarter << 30)).astype(np.float64) + 0.5) * (2.0 * math.pi / _WORD)
    z = x * x
    sin, cos = x * _horner(z, _SIN_SERIES), _horner(z, _COS_SERIES)
    turn = quarter & 3
    out = np.empty(words.shape, np.float32)
    out[..., 0::2] = radius * np.select([turn == 0, turn == 1, turn == 2], [cos, -sin, -cos], sin)
    out[..., 1::2] = radius * np.select([turn == 0, turn == 1, turn == 2], [sin, cos, -sin], -cos)
    return out


def bits(seed: int, rollout: ArrayLike, chunk: ArrayLike, step: ArrayLike, stream: int, count: int) -> NDArray[np.uint32]:
    """`count` 32-bit words of one draw: uint32 (count,).

    `rollout`, `chunk` and `step` are integers or 1-D arrays (B,) of equal length (an integer goes with every row): with an
    array, the result is (B, count), and row b is what the b-th numbers alone give. ValueError where a value is negative or
    does not fit 32 bits, or where lengths differ.
    """
    seed, rollouts, chunks, steps, stream, many = address(seed, rollout, chunk, step, stream, count)
    words = _core.philox_bits(seed, rollouts, chunks, steps, stream, count)
    return words if many else words[0]


def uniform(seed: int, rollout: ArrayLike, chunk: ArrayLike, step: ArrayLike, stream: int, shape: Sequence[int]) -> NDArray[np.float64]:
    """Uniform float64 in (0, 1), `shape`, or (B, *shape) as in `bits`; C order of `shape` counts the elements."""
    seed, rollouts, chunks, steps, stream, many = address(seed, rollout, chunk, step, stream, math.prod(shape))
    unit = _core.philox_uniform(seed, rollouts, chunks, steps, stream, math.prod(shape))
    return unit.reshape((*unit.shape[: 1 if many else 0], *shape))


def normal(seed: int, rollout: ArrayLike, chunk: ArrayLike, step: ArrayLike, stream: int, shape: Sequence[int]) -> NDArray[np.float32]:
    """Standard normal float32, `shape`, or (B, *shape) as in `bits`; C order of `shape` counts the elements."""
    seed, rollouts, chunks, steps, stream, many = address(seed, rollout, chunk, step, stream, math.prod(shape))
    values = _core.philox_normal(seed, rollouts, chunks, steps, stream, math.prod(shape))
    return values.reshape((*values.shape[: 1 if many else 0], *shape))


def integers(seed: int, stage: int, step: int, high: int, count: int) -> NDArray[np.int64]:
    """`count` integers in 0 .. high - 1, int64 (count,): a batch as a function of (seed, stage, step).

    `stage` is a `Stream`, `step` an optimiser step. floor(x * high / 2^64) of 64-bit x (words 2i, 2i + 1, high word first): no
    value is likelier than another by more than 2^-32 of its chance. ValueError unless 1 <= high <= 2^32.
    """
    if not 1 <= high <= _WORD:
        raise ValueError(f"noise: high={high}, want 1 .. 2^32: there is nothing to choose from, or too much for two words")
    words = bits(seed, 0, 0, step, stage, 2 * count).astype(np.uint64)
    top, rest, half = words[0::2], words[1::2], np.uint64(32)
    product = (top * np.uint64(high)) + ((rest * np.uint64(high)) >> half)  # at most 2^64 - 1: (2^32 - 1) 2^32 + 2^32 - 1
    return (product >> half).astype(np.int64)


def torch_seed(seed: int, stream: int, step: int = 0) -> int:
    """A seed for `torch.manual_seed` at weight initialisation: 63 bits of one draw."""
    words = bits(seed, 0, 0, step, stream, 2)
    return (int(words[0]) << 32 | int(words[1])) >> 1

"""The counter RNG: published vectors, addresses of words, the fast path against the definition, and what is refused."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from worldenv import _core, noise
from worldenv.noise import Stream

# Random123's kat_vectors, philox4x32 with 10 rounds: counter, key, block
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
WORD = st.integers(0, 2**32 - 1)


def words(text: str) -> np.ndarray:
    return np.array([int(word, 16) for word in text.split()], np.uint32)


@pytest.mark.parametrize(("counter", "key", "block"), KNOWN_ANSWERS)
def test_philox_gives_the_published_blocks(counter: str, key: str, block: str) -> None:
    np.testing.assert_array_equal(noise.philox(words(counter), words(key)), words(block))


def test_a_draw_reads_key_and_counter_in_the_documented_order() -> None:
    for element in (0, 1, 5):
        block = noise.philox(np.array([30, 40, 50, element], np.uint32), np.array([10, 20], np.uint32))
        got = noise.bits(seed=10, rollout=20, chunk=30, step=40, stream=50, count=24)
        np.testing.assert_array_equal(got[4 * element : 4 * element + 4], block)


@given(WORD, WORD, WORD, WORD, WORD, st.integers(0, 67))
def test_fast_path_is_the_definition(seed: int, rollout: int, chunk: int, step: int, stream: int, count: int) -> None:
    address = (seed, rollout, chunk, step, stream)
    want = noise.bits_definition(*address, count)
    got = noise.bits(*address, count)
    assert got.dtype == want.dtype == np.uint32
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(noise.uniform(*address, (count,)), noise.uniform_definition(want))
    even = noise.bits_definition(*address, count + count % 2)
    np.testing.assert_array_equal(noise.normal(*address, (count,)), noise.normal_definition(even)[:count])


def test_fast_normals_are_bit_equal_over_many_words() -> None:
    rollouts = np.arange(16)
    got = noise.normal(11, rollouts, 3, 4, Stream.SIMULATOR, (100_000,))
    want = noise.normal_definition(noise.bits_definition(11, rollouts, 3, 4, Stream.SIMULATOR, 100_000))
    np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))


@pytest.mark.slow
def test_fast_normals_are_bit_equal_over_a_hundred_million_words() -> None:
    """Float32 hides most slips of float64: only about one in 10^8 values shows a different last bit."""
    for rollout in range(100):
        got = noise.normal(12, rollout, 0, 0, Stream.SIMULATOR, (1_000_000,))
        want = noise.normal_definition(noise.bits(12, rollout, 0, 0, Stream.SIMULATOR, 1_000_000))
        assert np.array_equal(got.view(np.uint32), want.view(np.uint32)), rollout


def test_a_row_is_what_its_numbers_alone_give() -> None:
    rollouts, chunks, steps = np.array([0, 7, 2**32 - 1]), np.array([0, 3, 1]), np.array([2, 2, 0])
    batch = noise.normal(5, rollouts, chunks, steps, Stream.POLICY, (8, 7))
    assert batch.shape == (3, 8, 7)
    for row, address in zip(batch, zip(rollouts, chunks, steps, strict=True), strict=True):
        np.testing.assert_array_equal(row, noise.normal(5, *(int(part) for part in address), Stream.POLICY, (8, 7)))
    np.testing.assert_array_equal(noise.bits(5, rollouts, 3, 2, 1, 9)[1], noise.bits(5, 7, 3, 2, 1, 9))


def test_a_longer_draw_begins_with_the_shorter() -> None:
    for count in range(13):
        np.testing.assert_array_equal(noise.bits(1, 2, 3, 4, 5, 13)[:count], noise.bits(1, 2, 3, 4, 5, count))
        np.testing.assert_array_equal(noise.normal(1, 2, 3, 4, 5, (13,))[:count], noise.normal(1, 2, 3, 4, 5, (count,)))


def test_every_part_of_the_address_counts() -> None:
    base = [1, 2, 3, 4, 5]
    draws = [tuple(noise.bits(*base, 4))]
    for i in range(5):
        other = list(base)
        other[i] += 1
        draws.append(tuple(noise.bits(*other, 4)))
    draws += [tuple(noise.bits(*order, 4)) for order in itertools.islice(itertools.permutations(base), 1, 24)]
    assert len(set(draws)) == len(draws)


def test_shapes_and_types() -> None:
    assert noise.normal(0, 0, 0, 0, 1, ()).shape == ()
    assert noise.normal(0, [1, 2], 0, 0, 1, ()).shape == (2,)
    assert noise.uniform(0, [1], 0, 0, 1, (3, 0)).shape == (1, 3, 0)
    assert noise.uniform(0, np.array([], np.int64), 0, 0, 1, (3,)).shape == (0, 3)
    assert noise.uniform(0, 1, 0, 0, 1, (3,)).dtype == np.float64
    assert noise.normal(0, 1, 0, 0, 1, (3,)).dtype == np.float32
    assert noise.integers(0, 1, 0, 9, 3).dtype == np.int64


def test_uniform_is_open_at_both_ends() -> None:
    ends = noise.uniform_definition(np.array([0, 2**31, 2**32 - 1], np.uint32))
    assert ends.tolist() == [2.0**-33, 0.5 + 2.0**-33, 1.0 - 2.0**-33]


def test_normal_is_box_muller() -> None:
    """Against the library's logarithm, sine and cosine, which may differ in the last bit of float64 and so rarely of float32."""
    drawn = noise.bits(3, 1, 0, 0, 1, 200_000)
    drawn[:8] = [0, 0, 2**32 - 1, 2**32 - 1, 0, 2**29, 1, 2**31]  # the ends, and borders between quarters of a turn
    u, v = noise.uniform_definition(drawn[0::2]), noise.uniform_definition(drawn[1::2])
    radius = np.sqrt(-2 * np.log(u))
    want = np.stack([radius * np.cos(2 * np.pi * v), radius * np.sin(2 * np.pi * v)], axis=1).reshape(-1)
    np.testing.assert_allclose(noise.normal_definition(drawn), want, rtol=2.0**-23, atol=1e-14)


def test_normal_has_the_moments_and_tails_of_one() -> None:
    x = noise.normal(0, np.arange(8), 0, 0, Stream.SIMULATOR, (250_000,)).astype(np.float64).reshape(-1)
    n = x.size
    assert abs(x.mean()) < 4 / math.sqrt(n)
    assert abs(x.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((x**3).mean()) < 4 * math.sqrt(15 / n)
    assert abs((x**4).mean() - 3) < 4 * math.sqrt(96 / n)
    for z, tail in ((1, 0.31731), (2, 0.0455003), (3, 0.0026998)):
        assert abs((np.abs(x) > z).mean() - tail) < 4 * math.sqrt(tail / n)
    pairs = np.corrcoef(x[0::2], x[1::2])[0, 1], np.corrcoef(x[:-1], x[1:])[0, 1], np.corrcoef(x[0::2] ** 2, x[1::2] ** 2)[0, 1]
    assert max(map(abs, pairs)) < 4 / math.sqrt(n / 2)


def test_integers_are_spread_evenly_and_are_a_function_of_stage_and_step() -> None:
    drawn = noise.integers(3, Stream.SFT, 5, 7, 70_000)
    counts = np.bincount(drawn, minlength=7)
    assert counts.size == 7
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 22.5  # chi-square with 6 degrees of freedom: 0.001 above it
    np.testing.assert_array_equal(drawn, noise.integers(3, Stream.SFT, 5, 7, 70_000))
    for other in ((4, Stream.SFT, 5), (3, Stream.SCALE, 5), (3, Stream.SFT, 6)):
        assert (noise.integers(*other, 7, 100) != drawn[:100]).any()
    assert (noise.integers(3, Stream.SFT, 5, 1, 10) == 0).all()


@pytest.mark.parametrize("high", [1, 3, 7, 2**16 + 1, 2**31, 2**32 - 1, 2**32])
def test_integers_are_the_high_part_of_the_product(high: int) -> None:
    drawn = noise.bits(8, 0, 0, 2, Stream.LOOP, 200).astype(object)
    want = [((int(a) << 32 | int(b)) * high) >> 64 for a, b in zip(drawn[0::2], drawn[1::2], strict=True)]
    assert noise.integers(8, Stream.LOOP, 2, high, 100).tolist() == want


def test_torch_seed_differs_by_network_and_is_accepted() -> None:
    import torch

    seeds = {noise.torch_seed(seed, Stream.WEIGHTS, step) for seed in range(4) for step in range(16)}
    assert len(seeds) == 64
    high, low = (int(word) for word in noise.bits(3, 0, 0, 5, Stream.WEIGHTS, 2))
    assert noise.torch_seed(3, Stream.WEIGHTS, 5) == (high * 2**32 + low) // 2
    for seed in seeds:
        assert 0 <= seed < 2**63
        torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("bad", [-1, 2**32, 1.0, "1", None, np.array([0, -1]), np.array([0.5]), np.zeros((1, 1), int)], ids=repr)
@pytest.mark.parametrize("where", range(5))
def test_a_number_that_does_not_fit_its_word_is_refused(bad: object, where: int) -> None:
    address: list[object] = [0, 0, 0, 0, 1]
    address[where] = bad
    with pytest.raises(ValueError, match=("seed", "rollout", "chunk", "step", "stream")[where]):
        noise.bits(*address, 4)


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match="equal lengths"):
        noise.bits(0, np.arange(3), np.arange(2), 0, 1, 4)
    for count in (-1, 2**34 + 1):
        with pytest.raises(ValueError, match="elements"):
            noise.bits(0, 0, 0, 0, 1, count)
    for high in (0, -3, 2**32 + 1):
        with pytest.raises(ValueError, match="high"):
            noise.integers(0, 1, 0, high, 4)


def test_core_refuses_what_it_would_have_to_convert() -> None:
    good = np.zeros(2, np.uint32)
    for bad in (good.astype(np.int64), np.zeros(4, np.uint32)[::2], good.tolist()):
        with pytest.raises(TypeError):
            _core.philox_bits(0, bad, good, good, 1, 4)  # type: ignore[arg-type]
    for bad in (np.zeros(3, np.uint32), np.zeros((2, 1), np.uint32)):
        with pytest.raises(ValueError, match="equal length"):
            _core.philox_bits(0, bad, good, good, 1, 4)


def test_streams_keep_their_values() -> None:
    """A stream's value is part of every old run: add to this table, never change it."""
    values = {
        "POLICY": 1,
        "SIMULATOR": 2,
        "REFLECTOR": 3,
        "SCENE": 4,
        "DEMOS": 5,
        "EXPLORE": 6,
        "CONTEXT": 7,
        "HOLD_OUT": 8,
        "WEIGHTS": 9,
        "BATCH": 10,
        "SFT": 11,
        "SCALE": 12,
        "VAE": 13,
        "VAE_NOISE": 14,
        "WORLD": 15,
        "WORLD_NOISE": 16,
        "WORLD_TIME": 17,
        "WORLD_MEMORY": 18,
        "WORLD_DROPOUT": 19,
        "BACKBONE": 20,
        "REWARD": 21,
        "EMBEDDING": 22,
        "LOOP": 23,
        "EVALUATION": 24,
        "REPORT": 25,
        "SHUFFLE": 26,
    }
    assert {name: stream.value for name, stream in Stream.__members__.items()} == values
    assert len(Stream) == len(values)  # no two streams share a value

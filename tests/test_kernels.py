"""Each Triton kernel against its definition, in the interpreter or on a GPU; wrong kernels, each found; what is compiled for GPUs elsewhere.

Every check is a function of a kernel's module, so that a wrong version of the module can be put in its place. What kernels write is poisoned before
(nan, or the largest integer), so that what they leave out is seen.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from worldenv import noise
from worldenv.benchmarks import cases, compile_kernels
from worldenv.benchmarks.harness import ROOT, Setting
from worldenv.devices import ARCHITECTURES
from worldenv.kernels import action_map, backend, ddim_step, frames, laplace, philox

Check = Callable[[ModuleType, torch.device], None]
DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = {
    # (atol, rtol) to the definition in float64, of the same inputs. All arithmetic is in float32, so that the type of the inputs does not matter.
    "draw": (2e-6, 2e-6),  # a logarithm and an exponential, each within 2 ulp; actions of size 1
    "log_prob": (4e-6, 1e-6),  # a sum of 7 terms of size 1 to 10
    "gradient float32": (4e-6, 1e-6),
    "gradient bfloat16": (2**-8, 2**-7),  # 1 ulp of the result: the interpreter cuts off where a GPU rounds
    "surrogate": (1e-6, 2e-6),
    "ddim_step": (3e-6, 2e-6),  # products and sums of numbers of size 1; deviations from sums of a thousand
    "level": (1.001, 0.0),  # of 256: sums of many products may fall on either side of a half
    "vae float32": (2e-6, 0.0),
    "vae bfloat16": (2**-7, 0.0),
}


def close(got: torch.Tensor, want: torch.Tensor, name: str) -> None:
    atol, rtol = TOLERANCE[name]
    assert got.shape == want.shape
    torch.testing.assert_close(got.double().cpu(), want.double().cpu(), atol=atol, rtol=rtol, equal_nan=False)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(noise.normal(seed, 0, 0, 0, noise.Stream.BATCH, shape))


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def where(request: pytest.FixtureRequest) -> torch.device:
    """Where kernels run in this test."""
    if request.param == "interpreter" and torch.cuda.is_available():
        pytest.skip("kernels are compiled in this process")
    return torch.device("cpu" if request.param == "interpreter" else "cuda")


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Memory that nobody wrote is nan, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


# The checks


def philox_equals_noise(module: ModuleType, device: torch.device) -> None:
    seed, rollout, chunk, step = 2**32 - 1, [1, 3_000_000_000, 7], [0, 5, 2**32 - 1], [9, 0, 2]
    draw = module.Draw.of(seed, rollout, chunk, step, 11, device)
    for count in (1, 7, 301):
        at = (seed, rollout, chunk, step, 11)
        wanted = {"bits": noise.bits(*at, count).view("int32"), "uniform": noise.uniform(*at, (count,)), "normal": noise.normal(*at, (count,))}
        for kind, want in wanted.items():
            assert np.array_equal(module.fill_triton(kind, draw, (count,)).cpu().numpy(), want), (kind, count)


def density(dtype: torch.dtype, device: torch.device, rows: int = 11) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    action, mu, log_scale = normal(1, rows, 3, 7), normal(2, rows, 3, 7), normal(3, rows, 3, 7) - 1.0
    mu[0, 0] = action[0, 0] = 0.5  # the density's edge, where it has no gradient to mu
    return action.to(device), mu.to(device, dtype), log_scale.to(device, dtype)


def draws_are_the_inverse_cdf(module: ModuleType, device: torch.device) -> None:
    addresses = philox.Draw.of(5, range(11), range(3, 14), 0, noise.Stream.POLICY, device)
    uniform = torch.from_numpy(noise.uniform(5, range(11), range(3, 14), 0, noise.Stream.POLICY, (3, 7))).to(device)
    edges = uniform.clone()
    edges[0, 0] = torch.tensor([0.5, 1e-9, 1 - 1e-9, 2.0**-33, 1 - 2.0**-33, 0.25, 0.75])
    for dtype, (source, stands_for) in itertools.product(DTYPES, ((addresses, uniform), (uniform, uniform), (edges, edges))):
        _, mu, log_scale = density(dtype, device)
        given = module.Draw(source.words) if isinstance(source, philox.Draw) else source
        action, log_prob = module.draw_triton(mu, log_scale, given)
        close(action, laplace.sample(mu.double(), log_scale.double(), stands_for), "draw")
        close(log_prob, laplace.log_prob_ref(action.double(), mu.double(), log_scale.double()), "log_prob")


def scores_and_gradients_are_the_definitions(module: ModuleType, device: torch.device) -> None:
    for dtype in DTYPES:
        given = density(dtype, device)
        leaves, wide = [one.clone().requires_grad_() for one in given], [one.double().requires_grad_() for one in given]
        got, want = module.log_prob_triton(*leaves), laplace.log_prob_ref(*wide)
        close(got, want, "log_prob")
        upstream = normal(4, *got.shape).to(device)
        pairs = zip(leaves, torch.autograd.grad(got, leaves, upstream), torch.autograd.grad(want, wide, upstream.double()), strict=True)
        for leaf, ours, theirs in pairs:
            assert ours.dtype == leaf.dtype
            scale = max(1.0, float(theirs.abs().max()))
            narrow = torch.bfloat16 if dtype == torch.bfloat16 else leaf.dtype  # the action's gradient is that of mu
            close(ours.double() / scale, theirs / scale, f"gradient {str(narrow).removeprefix('torch.')}")


def surrogate_and_its_gradient_are_the_definitions(module: ModuleType, device: torch.device) -> None:
    """Ragged rows: what was not executed is nan, and stays where it is."""
    rows, steps = 53, 5
    live = torch.arange(steps) < (torch.arange(rows) % (steps + 1))[:, None]
    new, old, advantage = 0.3 * normal(6, rows, steps), 0.3 * normal(7, rows, steps), normal(8, rows)
    advantage[3] = 0.0
    new, old = (torch.where(live, one, float("nan")).to(device) for one in (new, old))
    live, advantage = live.to(device), advantage.to(device)
    for dtype in DTYPES:
        leaf, wide = new.to(dtype).requires_grad_(), new.to(dtype).double().requires_grad_()
        gain, _, ratio, clipped, kl = module.clipped_triton(leaf, old, advantage, live, 0.2)
        want = laplace.clipped_ref(wide, old.double(), advantage.double(), live, 0.2)
        for ours, theirs in ((gain, want.gain), (ratio, want.ratio), (kl, want.kl)):
            close(ours, theirs, "surrogate")
        assert torch.equal(clipped, want.clipped)
        assert 0 < int(clipped.sum()) < int(live.sum())
        weight = normal(9, rows, steps).to(device)
        (ours,) = torch.autograd.grad(gain, leaf, weight)
        (theirs,) = torch.autograd.grad(want.gain, wide, weight.double())
        close(ours, torch.where(live, theirs, 0.0), "gradient bfloat16" if dtype == torch.bfloat16 else "surrogate")


def a_step_is_the_definition(module: ModuleType, device: torch.device) -> None:
    """Samples at levels of their own, answers in the network's strides, odd sizes, more elements than a block."""
    batch, z, remembered, chunk, steps = 3, 3, 2, 5, 4
    latent = (13, 17)
    x, memory = normal(1, batch, z, remembered + chunk, *latent).to(device), normal(2, batch, z, remembered, *latent).to(device)
    table = (0.2 + torch.rand(steps, 6, generator=torch.Generator().manual_seed(3))).to(device)
    scales, index = torch.tensor([0.9, 0.8, 0.7, 0.6]).to(device), torch.tensor([0, 3, 1]).to(device)
    drawn = normal(4, batch, 1 + steps, z, chunk, *latent).to(device)
    address = philox.Draw.of(2**31 + 5, [4, 5, 6], [0, 1, 2], 0, noise.Stream.SIMULATOR, device)
    by_counter = philox.fill_ref("normal", philox.Draw(address.at(steps - index).words.cpu()), (z, chunk, *latent)).to(device)
    for dtype, guided, kind in itertools.product(DTYPES, (False, True), ("none", "given", "counter")):
        v = (0.5 + normal(5, batch, remembered + chunk, *latent, z)).to(device, dtype).permute(0, 4, 1, 2, 3)
        other = normal(6, batch, z, remembered + chunk, *latent).to(device, dtype) if guided else None
        source = {"none": None, "given": drawn, "counter": module.Draw(address.words)}[kind]
        plain = {"none": None, "given": drawn, "counter": by_counter[:, None].expand(-1, 1 + steps, -1, -1, -1, -1)}[kind]
        got = module.ddim_step_triton(x, v, other, memory, table, scales, index, source, 3.0, 0.7)
        wide = [None if one is None else one.double() for one in (x, v, other, memory, table, scales)]
        want = ddim_step.ddim_step_ref(*wide, index, None if plain is None else plain.double(), 3.0, 0.7)
        for ours, theirs in zip(got, want, strict=True):
            assert ours.dtype == torch.float32
            close(ours, theirs, "ddim_step")
    silent = torch.zeros_like(x)  # an untrained network's answer has no deviation that guidance could match
    for one in (module.ddim_step_triton, ddim_step.ddim_step_ref):
        assert all(bool(said.isfinite().all()) for said in one(x, silent, silent, memory, table, scales, index, None, 3.0, 0.7))


AXES = ((0, 0, 255), (255, 255, 0), (0, 255, 255))


def maps_are_the_definition(module: ModuleType, device: torch.device) -> None:
    """Every byte: two arms over each other, lines of any slope, of no length and of a billion pixels, an arm that is off the canvas."""
    generator = np.random.default_rng(0)
    for size in ((33, 47), (64, 64)):
        pixels = generator.integers(-20, 80, (3, 2, 4, 2))
        pixels[0, 0] = [[20, 20], [23, 24], [20, 20], [20, 5]]
        pixels[0, 1] = [[26, 24], [10**9, -(10**9)], [-(10**9), 17], [41, 31]]
        pixels[1, 0, 0] = [-1, 5]
        pixels[2, :, 0] = [[0, 0], [46, 32]]
        colours = generator.integers(0, 256, (3, 2, 3)).astype(np.uint8)
        brushes = [module.Brush(9, 4, AXES), module.Brush(5, 1, AXES[::-1])]
        got = module.paint_triton(pixels, colours, brushes, size, 50, device)
        assert torch.equal(got.cpu(), action_map.paint_ref(pixels, colours, brushes, size, 50))


def rays_are_the_definition(module: ModuleType, device: torch.device) -> None:
    intrinsics = np.array([[50.0, 0, 20.3], [0, 60.0, 15.1], [0, 0, 1]])
    pose = np.linalg.qr(np.random.default_rng(1).normal(size=(4, 4)))[0]
    for mirrored, latent in itertools.product((False, True), ((7, 9), (17, 16))):
        got = module.rays_triton(intrinsics, pose, mirrored, latent, device)
        torch.testing.assert_close(got.cpu(), action_map.rays_ref(intrinsics, pose, mirrored, latent), rtol=2e-7, atol=1e-9)


def pictures(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def policy_sees_the_definition(module: ModuleType, device: torch.device) -> None:
    """Smaller and larger, with a crop and without; a level off in at most one value of fifty."""
    mean, std = (0.4, 0.5, 0.3), (0.2, 0.25, 0.3)
    spread = torch.tensor([*std, 0.5, 0.5, 0.5]).view(6, 1, 1) * 255.0
    for height, width, size, area in ((9, 13, 6, 0.8), (9, 5, 13, 0.9), (9, 13, 6, 1.0), (12, 12, 12, 0.9)):
        seen = pictures(2, height, width, 3).to(device)
        got, want = module.for_policy_triton(seen, size, area, mean, std).cpu(), frames.for_policy_ref(seen, size, area, mean, std).cpu()
        close(got * spread, want * spread, "level")
        assert float(((got - want) * spread).abs().gt(0.01).float().mean()) < 0.02


def reflector_sees_the_definition(module: ModuleType, device: torch.device) -> None:
    for height, width, size in ((9, 13, 6), (11, 9, 9), (7, 9, 13)):
        seen = pictures(2, height, width, 3).to(device)
        got, want = module.for_reflector_triton(seen, size).cpu(), frames.for_reflector_ref(seen, size).cpu()
        close(127.5 * got, 127.5 * want, "level")
        assert float((got - want).abs().gt(0.001).float().mean()) < 0.02


def autoencoder_sees_the_definition(module: ModuleType, device: torch.device) -> None:
    for dtype, size in itertools.product(DTYPES, ((9, 13), (6, 17))):
        seen = pictures(2, 9, 13, 3).to(device)
        got = module.for_vae_triton(seen, size, dtype)
        assert got.dtype == dtype
        assert got.permute(0, 2, 3, 1).is_contiguous(), "as the first convolution reads it"
        close(got, frames.for_vae_ref(seen, size, torch.float64), f"vae {str(dtype).removeprefix('torch.')}")


def pictures_come_back(module: ModuleType, device: torch.device) -> None:
    levels = (torch.arange(1026, dtype=torch.float32) / 512.0 - 1.001).view(3, 3, 6, 19).to(device)
    levels[0, 0, 0, :2] = torch.tensor([-1.4, 1.4])
    last = levels.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    for given in (levels, last, levels.bfloat16()):
        assert torch.equal(module.to_frames_triton(given), frames.to_frames_ref(given.float()))


CHECKS: list[tuple[ModuleType, Check, set[str]]] = [
    (philox, philox_equals_noise, {"_fill_kernel"}),
    (laplace, draws_are_the_inverse_cdf, {"_draw_kernel"}),
    (laplace, scores_and_gradients_are_the_definitions, {"_log_prob_kernel", "_log_prob_backward_kernel"}),
    (laplace, surrogate_and_its_gradient_are_the_definitions, {"_clipped_kernel"}),
    (ddim_step, a_step_is_the_definition, {"_step_kernel", "_moments_kernel"}),
    (action_map, maps_are_the_definition, {"_paint_kernel"}),
    (action_map, rays_are_the_definition, {"_rays_kernel"}),
    (frames, policy_sees_the_definition, {"_pixels_kernel"}),
    (frames, reflector_sees_the_definition, {"_pixels_kernel"}),
    (frames, autoencoder_sees_the_definition, {"_pixels_kernel"}),
    (frames, pictures_come_back, {"_to_frames_kernel"}),
]
"""A module, what it must hold, and the kernels that this starts."""


_TRITON = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float64: "*fp64", torch.int64: "*i64", torch.int32: "*i32", torch.int8: "*i8",
    torch.uint8: "*u8",
}  # fmt: skip
_BY_SHAPE = {"PARTS", "TALL", "WIDE", "DIMS"}
"""Constants that follow sizes: those that are compiled ahead are the working ones."""


def started(kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any], warps: int, contract: bool) -> str:
    fixed = {name: value for name, value in constants.items() if name not in _BY_SHAPE}
    return f"{kernel.__name__} {sorted(types.items())} {sorted(fixed.items())} {warps} {contract}"


@pytest.mark.parametrize(("module", "check", "names"), CHECKS, ids=[check.__name__ for _, check, _ in CHECKS])
def test_kernels_equal_their_definitions(
    module: ModuleType, check: Check, names: set[str], where: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is started (types, constants, warps, contraction) is what is compiled ahead of time."""
    seen: set[str] = set()

    def noted(
        kernel: Any, grid: int, arguments: Mapping[str, Any], constants: Mapping[str, Any], warps: int = 4, contract: bool = True
    ) -> None:
        types = {
            name: _TRITON[value.dtype] if isinstance(value, torch.Tensor) else "fp32" if isinstance(value, float) else "i32"
            for name, value in arguments.items()
        }
        seen.add(started(kernel, types, constants, warps, contract))
        backend.launch(kernel, grid, arguments, constants, warps, contract)

    monkeypatch.setattr(module, "launch", noted)
    check(module, where)
    ahead = {started(one.kernel, one.types, one.constants, one.warps, one.contract) for _, one in compile_kernels.builds()}
    assert sorted(seen - ahead) == []
    assert {one.split()[0] for one in seen} == names


def test_every_kernel_is_checked() -> None:
    assert {one.kernel.__name__ for _, one in compile_kernels.builds()} == set().union(*(names for _, _, names in CHECKS))


@triton.jit
def _vectors_kernel(words_ptr, out_ptr):
    at = words_ptr + tl.arange(0, 1)
    k0, k1, c0 = tl.load(at).to(tl.uint32), tl.load(at + 1).to(tl.uint32), tl.load(at + 2).to(tl.uint32)
    c1, c2, c3 = tl.load(at + 3).to(tl.uint32), tl.load(at + 4).to(tl.uint32), tl.load(at + 5).to(tl.uint32)
    a, b, c, d = philox.philox_block(k0, k1, c0, c1, c2, c3)
    out = out_ptr + tl.arange(0, 1)
    tl.store(out, a.to(tl.int32, bitcast=True))
    tl.store(out + 1, b.to(tl.int32, bitcast=True))
    tl.store(out + 2, c.to(tl.int32, bitcast=True))
    tl.store(out + 3, d.to(tl.int32, bitcast=True))


@pytest.mark.parametrize(
    ("counter", "key", "want"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_published_vectors(counter: str, key: str, want: str, where: torch.device) -> None:
    """Those of Random123 for philox4x32-10."""
    out = torch.empty(4, dtype=torch.int32, device=where)
    words = torch.tensor([int(word, 16) for word in (key + " " + counter).split()], dtype=torch.int64, device=where)
    _vectors_kernel[(1,)](words, out)
    assert [f"{value & 0xFFFFFFFF:08x}" for value in out.tolist()] == want.split()


# Wrong versions

WRONG: dict[str, tuple[ModuleType, str, str, Check]] = {
    "philox: nine rounds": (philox, "tl.static_range(10)", "tl.static_range(9)", philox_equals_noise),
    "philox: multipliers swapped": (
        philox, "tl.umulhi(c0, 0xD2511F53), c0 * 0xD2511F53",
        "tl.umulhi(c0, 0xCD9E8D57), c0 * 0xCD9E8D57", philox_equals_noise),
    "philox: keys stay": (philox, "k0 + 0x9E3779B9, k1 + 0xBB67AE85", "k0, k1", philox_equals_noise),
    "philox: words out of order": (
        philox, "tl.interleave(tl.interleave(a, c), tl.interleave(b, d))",
        "tl.interleave(tl.interleave(a, b), tl.interleave(c, d))", philox_equals_noise),
    "philox: seed and rollout swapped": (philox, "zero + seed, zero + rollout", "zero + rollout, zero + seed", philox_equals_noise),
    "philox: every row the first": (philox, "row = (tl.program_id(0) // per_row)", "row = (tl.program_id(0) // per_row * 0)", philox_equals_noise),
    "philox: last element lost": (philox, "mask=at < count)", "mask=at < count - 1)", philox_equals_noise),
    "philox: no half": (philox, "(word.to(tl.float64) + 0.5) * 2.3", "word.to(tl.float64) * 2.3", philox_equals_noise),
    "philox: normals in float32": (
        philox, "s = (mantissa - 1.0) / (mantissa + 1.0)",
        "s = ((mantissa - 1.0) / (mantissa + 1.0)).to(tl.float32).to(tl.float64)", philox_equals_noise),
    "philox: sine for cosine": (
        philox, "tl.where(odd, sin, cos), tl.where(odd, cos, sin)",
        "tl.where(odd, cos, sin), tl.where(odd, sin, cos)", philox_equals_noise),
    "draw: the wrong side": (laplace, "tl.where(above, mu + away, mu - away)", "tl.where(above, mu - away, mu + away)", draws_are_the_inverse_cdf),
    "draw: scale for log-scale": (laplace, "away = -tl.exp(log_scale) * tl.log(tail)", "away = -log_scale * tl.log(tail)", draws_are_the_inverse_cdf),
    "draw: uniforms of 16 bits": (
        laplace, "least = tl.where(above, 4294967295 - word, word)",
        "least = tl.where(above, 4294967295 - word, word) >> 16 << 16", draws_are_the_inverse_cdf),
    "draw: elements count over the batch": (laplace, "element = (row % steps)[:, None]", "element = row[:, None]", draws_are_the_inverse_cdf),
    "draw: one word for four": (laplace, "tl.where(lane == 0, a, b)", "tl.where(lane == 0, a, a)", draws_are_the_inverse_cdf),
    "draw: scored before it is drawn": (
        laplace, "density = -tl.abs(action - mu) * tl.exp(-log_scale) - log_scale - _LN2\n    tl.store(action_ptr",
        "density = -tl.abs(action) * tl.exp(-log_scale) - log_scale - _LN2\n    tl.store(action_ptr", draws_are_the_inverse_cdf),
    "score: without log 2": (
        laplace, "log_scale - _LN2\n    tl.store(out_ptr",
        "log_scale\n    tl.store(out_ptr", scores_and_gradients_are_the_definitions),
    "score: normal density": (
        laplace, "density = -tl.abs(action - mu) * tl.exp(-log_scale) - log_scale - _LN2\n    tl.store(out_ptr",
        "density = -(action - mu) * (action - mu) * tl.exp(-log_scale) - log_scale - _LN2\n    tl.store(out_ptr",
        scores_and_gradients_are_the_definitions),
    "score: padding counts": (
        laplace, "tl.store(out_ptr + row, tl.sum(tl.where(held, density, 0.0), axis=1)",
        "tl.store(out_ptr + row, tl.sum(density, axis=1)", scores_and_gradients_are_the_definitions),
    "gradient: of the other sign": (
        laplace, "side = tl.where(away > 0.0, 1.0, tl.where(away < 0.0, -1.0, 0.0))",
        "side = tl.where(away > 0.0, -1.0, tl.where(away < 0.0, 1.0, 0.0))", scores_and_gradients_are_the_definitions),
    "gradient: at the edge too": (
        laplace, "side = tl.where(away > 0.0, 1.0,",
        "side = tl.where(away >= 0.0, 1.0,", scores_and_gradients_are_the_definitions),
    "gradient: log-scale without its own term": (
        laplace, "(tl.abs(away) * inverse - 1.0)",
        "(tl.abs(away) * inverse)", scores_and_gradients_are_the_definitions),
    "gradient: of one upstream": (
        laplace, "upstream = tl.load(upstream_ptr + row,",
        "upstream = tl.load(upstream_ptr + row * 0,", scores_and_gradients_are_the_definitions),
    "gradient: action as mu": (laplace, "return -d_mu.to(action.dtype)", "return d_mu.to(action.dtype)", scores_and_gradients_are_the_definitions),
    "surrogate: not clipped below": (
        laplace, "tl.where(ratio < low, low,",
        "tl.where(ratio < 0.0, low,", surrogate_and_its_gradient_are_the_definitions),
    "surrogate: the larger": (
        laplace, "tl.where(live, tl.where(held < gain, held, gain), 0.0)",
        "tl.where(live, tl.where(held < gain, gain, held), 0.0)", surrogate_and_its_gradient_are_the_definitions),
    "surrogate: gradient where clipped": (
        laplace, "tl.where(live & (held >= gain), gain, 0.0)",
        "tl.where(live, gain, 0.0)", surrogate_and_its_gradient_are_the_definitions),
    "surrogate: an advantage per step": (
        laplace, "advantage_ptr + at // steps",
        "advantage_ptr + at % steps", surrogate_and_its_gradient_are_the_definitions),
    "surrogate: what was not executed": (
        laplace, "mask=live, other=0.0).to(tl.float32)  # what",
        "mask=inside, other=0.0).to(tl.float32)  # what", surrogate_and_its_gradient_are_the_definitions),
    "surrogate: slope of the gain alone": (laplace, "(upstream * slope)", "slope", surrogate_and_its_gradient_are_the_definitions),
    "surrogate: last block lost": (
        laplace, "launch(_clipped_kernel, triton.cdiv(new.numel(), _BLOCK)",
        "launch(_clipped_kernel, new.numel() // _BLOCK", surrogate_and_its_gradient_are_the_definitions),
    "step: noise prediction for v": (
        ddim_step, "x_0 = (signal * x - rest * v) * rescale\n        x_prev",
        "x_0 = (x - rest * v) / signal * rescale\n        x_prev", a_step_is_the_definition),
    "step: no dynamic rescale": (
        ddim_step, "(signal * x - rest * v) * rescale\n        x_prev",
        "(signal * x - rest * v)\n        x_prev", a_step_is_the_definition),
    "step: one level for all": (ddim_step, "index = tl.load(index_ptr + sample)", "index = tl.load(index_ptr)", a_step_is_the_definition),
    "step: memory at this level": (
        ddim_step, "tl.load(scales_ptr + tl.maximum(index - 1, 0))",
        "tl.load(scales_ptr + index)", a_step_is_the_definition),
    "step: memory not put back": (
        ddim_step, "memory = tl.load(memory_ptr + sample * kept",
        "memory = tl.load(x_ptr + sample * kept", a_step_is_the_definition),
    "step: the step's own noise number": (
        ddim_step, "drawn = sample * draws + steps - index",
        "drawn = sample * draws + index", a_step_is_the_definition),
    "step: counter of the table's row": (
        ddim_step, "(part * BLOCK).to(tl.int64), steps - index, BLOCK)",
        "(part * BLOCK).to(tl.int64), index, BLOCK)", a_step_is_the_definition),
    "step: counter begins anew in each block": (
        ddim_step, "philox_normals(noise_ptr, sample, (part * BLOCK).to(tl.int64)",
        "philox_normals(noise_ptr, sample, (part * 0).to(tl.int64)", a_step_is_the_definition),
    "step: guidance the other way": (
        ddim_step, "v = (other + guidance * (v - other)) * (share",
        "v = (v + guidance * (other - v)) * (share", a_step_is_the_definition),
    "step: shares swapped": (ddim_step, "(share * ratio + (1.0 - share))", "((1.0 - share) * ratio + share)", a_step_is_the_definition),
    "step: deviations about zero": (
        ddim_step, "off_v, off_g = tl.where(inside, v - mean_v, 0.0)",
        "off_v, off_g = tl.where(inside, v, 0.0)", a_step_is_the_definition),
    "step: blocks' means forgotten": (
        ddim_step, "squares + count * (mean - common) * (mean - common)",
        "squares + 0.0 * count * (mean - common)", a_step_is_the_definition),
    "step: strides of the conditional answer": (
        ddim_step, "zip(_STRIDES, (*v_strides, *other_strides)",
        "zip(_STRIDES, (*v_strides, *v_strides)", a_step_is_the_definition),
    "step: frames not shifted by memory": (
        ddim_step, "(at // pixels % chunk + remembered).to(tl.int64)",
        "(at // pixels % chunk).to(tl.int64)", a_step_is_the_definition),
    "map: open discs": (action_map, "dx * dx + dy * dy <= radius * radius", "dx * dx + dy * dy < radius * radius", maps_are_the_definition),
    "map: arms off the canvas too": (action_map, "if shown & (v - radius", "if (v - radius", maps_are_the_definition),
    "map: lines cut short": (action_map, "(along <= squared * 2 + longest)", "(along <= squared)", maps_are_the_definition),
    "map: lines without ends": (action_map, "tl.where(body | ends, colour, value)", "tl.where(body, colour, value)", maps_are_the_definition),
    "map: a point is a line everywhere": (action_map, "body = (squared > 0) & ", "body = ", maps_are_the_definition),
    "map: far blocks skipped too early": (
        action_map, "(tl.minimum(v, tip_v) - thickness - 1 <= bottom)",
        "(tl.minimum(v, tip_v) <= top)", maps_are_the_definition),
    "map: x and y swapped": (action_map, "y, x = place // width, place % width", "x, y = place // width, place % width", maps_are_the_definition),
    "map: blue for red": (
        action_map, "place, channel = at // 3, (at % 3).to(tl.int64)",
        "place, channel = at // 3, (2 - at % 3).to(tl.int64)", maps_are_the_definition),
    "map: one arm's brush for all": (
        action_map, "brushes_ptr + (zero + arm) * 11\n        u, v",
        "brushes_ptr + zero * arm\n        u, v", maps_are_the_definition),
    "map: last block lost": (
        action_map, "triton.cdiv(height * width * 3, _BLOCK), arguments",
        "(height * width * 3 // _BLOCK), arguments", maps_are_the_definition),
    "rays: through corners": (
        action_map, "u, v = (at % width).to(tl.float64) + 0.5, ",
        "u, v = (at % width).to(tl.float64), ", rays_are_the_definition),
    "rays: not mirrored": (action_map, "!= 0, width - u, u)", "!= 0, u, u)", rays_are_the_definition),
    "rays: of any length": (action_map, "length = tl.sqrt(a * a + b * b + c * c)", "length = tl.sqrt(a * a + b * b)", rays_are_the_definition),
    "rays: world to camera": (action_map, "tl.load(to_world + 1) * y", "tl.load(to_world + 4) * y", rays_are_the_definition),
    "rays: from the origin": (action_map, "tl.load(to_world + 3 + 4 * axis)", "tl.load(to_world + 3 + axis)", rays_are_the_definition),
    "frames: resized picture not rounded": (frames, "weight * (_to_level(g) / 255.0)", "weight * (g / 255.0)", policy_sees_the_definition),
    "frames: crop rounded to the nearest": (
        frames, "tl.floor(tl.minimum(tl.maximum(red, 0.0), 1.0) * 255.5)",
        "tl.floor(tl.minimum(tl.maximum(red, 0.0), 1.0) * 254.0)", policy_sees_the_definition),
    "frames: DINOv2's mean for SigLIP": (frames, "norm = norm_ptr + set * 6", "norm = norm_ptr + set * 0", policy_sees_the_definition),
    "frames: nearest corner of the crop": (frames, "tl.minimum(left + j, wide - 1)", "tl.minimum(left, wide - 1)", policy_sees_the_definition),
    "frames: channels turned round": (frames, "red += weight * tl.load(at)", "red += weight * tl.load(at + 2)", policy_sees_the_definition),
    "frames: beyond a picture's edge": (
        frames, "top + i, height - 1).to(tl.int64) * width * 3",
        "top + i, height - 1).to(tl.int64) * height * 3", policy_sees_the_definition),
    "reflector: a square at the corner": (
        frames, "_interpolated(n, (n - side) // 2, side, size,",
        "_interpolated(n, 0, side, size,", reflector_sees_the_definition),
    "reflector: bilinear": (frames, '"bicubic", frames.device) for n', '"bilinear", frames.device) for n', reflector_sees_the_definition),
    "reflector: overshoot kept": (
        frames, "return tl.minimum(tl.maximum(_nearest(x), 0.0), 255.0)",
        "return _nearest(x)", reflector_sees_the_definition),
    "VAE: rounded to levels": (frames, "(_HALF * 2,), False, dtype, True)", "(_HALF * 2,), True, dtype, True)", autoencoder_sees_the_definition),
    "VAE: channels first": (frames, "(_HALF * 2,), False, dtype, True)", "(_HALF * 2,), False, dtype, False)", autoencoder_sees_the_definition),
    "back: cut off, not rounded": (frames, "_nearest(unit * 255.0).to", "(unit * 255.0).to", pictures_come_back),
    "back: not clamped": (frames, "tl.minimum(tl.maximum((value + 1.0) * 0.5, 0.0), 1.0)", "((value + 1.0) * 0.5)", pictures_come_back),
    "back: channel planes as pixels": (frames, "channel * in_c + place * in_p, mask", "channel + place * 3, mask", pictures_come_back),
}  # fmt: skip


def wrong_version(module: ModuleType, old: str, new: str, folder: Path) -> ModuleType:
    """`module` with `old`, which must stand in its source once, replaced by `new`; its operations of torch get names of their own."""
    assert module.__file__ is not None
    source = Path(module.__file__).read_text()
    assert source.count(old) == 1, f"{source.count(old)} times in {module.__file__}: {old}"
    name = f"wrong_{abs(hash((old, new)))}"
    path = folder / f"{name}.py"
    path.write_text(source.replace(old, new).replace('"worldenv::', f'"{name}::'))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[name] = made  # dataclasses look their module up
    spec.loader.exec_module(made)
    return made


@pytest.mark.skipif(torch.cuda.is_available(), reason="each would be compiled")
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_kernels_are_found(wrong: str, tmp_path: Path) -> None:
    module, old, new, check = WRONG[wrong]
    made = wrong_version(module, old, new, tmp_path)
    try:
        with pytest.raises(AssertionError):
            check(made, torch.device("cpu"))
    finally:
        del sys.modules[made.__name__]


def test_every_kernel_has_five_wrong_versions() -> None:
    for module, check, _ in CHECKS:
        made = sum(row[0] is module for row in WRONG.values())
        assert made >= 5, module.__name__
        assert any(row[3] is check for row in WRONG.values()), check.__name__


# The ways in


def test_on_a_cpu_the_definition_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, with its own autograd: kernels are not started."""

    def refused(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("a kernel was started")

    for module in (philox, laplace, ddim_step, action_map, frames):
        monkeypatch.setattr(module, "launch", refused)
    action, mu, log_scale = density(torch.float32, torch.device("cpu"))
    draw = philox.Draw.of(1, range(len(mu)), 0, 0, noise.Stream.POLICY)
    assert torch.equal(laplace.log_prob(action, mu, log_scale), laplace.log_prob_ref(action, mu, log_scale))
    assert all(map(torch.equal, laplace.draw(mu, log_scale, draw), laplace.draw_ref(mu, log_scale, draw)))
    assert torch.equal(philox.normal(draw, (3, 2)), torch.from_numpy(noise.normal(1, range(len(mu)), 0, 0, noise.Stream.POLICY, (3, 2))))
    seen = pictures(1, 9, 9, 3)
    assert torch.equal(frames.for_vae(seen, (9, 9), torch.float32), frames.for_vae_ref(seen, (9, 9), torch.float32))
    assert torch.equal(frames.for_reflector(seen, 5), frames.for_reflector_ref(seen, 5))


def test_the_rule() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert backend.uses_kernel(cuda, None)
    assert not backend.uses_kernel(torch.zeros(1), cpu)
    with pytest.raises(ValueError, match="cpu and cuda: move all"):
        backend.uses_kernel(torch.zeros(1), cuda)


def test_one_gpus_kernel_takes_no_tensor_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = torch.device("cuda:0"), torch.device("cuda:1")
    assert backend.uses_kernel(first, first)
    with pytest.raises(ValueError, match="cuda:0 and cuda:1: move all"):
        backend.uses_kernel(first, second)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert backend.uses_kernel(torch.device("cuda"), second)
    with pytest.raises(ValueError, match="cuda:0 and cuda:1: move all"):
        backend.uses_kernel(torch.device("cuda"), first)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: laplace.log_prob(torch.zeros(2, 7), torch.zeros(2, 7), torch.zeros(3, 7)), "log-scale \\(3, 7\\)"),
        (lambda: laplace.draw(torch.zeros(2, 8, 7), torch.zeros(2, 8, 7), torch.zeros(2, 8, 7)), "float64"),
        (lambda: laplace.draw(torch.zeros(2, 8, 7), torch.zeros(2, 8, 7), philox.Draw.of(1, 2, 3, 4, 5)), "B draws"),
        (
            lambda: laplace.draw(*[torch.zeros(2, 8, 7)] * 2, torch.zeros(2, 8, 7, dtype=torch.float64, device="meta")),
            "cpu and meta: move all of them to one device",
        ),
        (lambda: laplace.clipped(*[torch.zeros(2, 3)] * 2, torch.zeros(3), torch.ones(2, 3, dtype=torch.bool), 0.1), "advantage \\(3,\\)"),
        (lambda: frames.for_vae(torch.zeros(1, 3, 9, 9), (9, 9), torch.float32), "want \\(N, H, W, 3\\) uint8"),
        (lambda: frames.for_policy(pictures(1, 9, 9, 3), 9, 0.0, (0,) * 3, (1,) * 3), "area 0"),
        (lambda: frames.to_frames(torch.zeros(1, 9, 9, 3)), "want \\(N, 3, H, W\\)"),
        (lambda: philox.Draw.of(-1, 0, 0, 0, 0), "seed=-1"),
        (
            lambda: ddim_step.ddim_step(
                torch.zeros(1, 4, 6, 2, 2), torch.zeros(1, 4, 6, 2, 2), None, torch.zeros(1, 4, 2, 2, 3), torch.zeros(5, 6), torch.zeros(5),
                torch.zeros(1, dtype=torch.int64), None,
            ),
            "memory \\(1, 4, 2, 2, 3\\)",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_named(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


def test_draws_of_other_seeds_and_streams_are_each_their_own() -> None:
    for seed, stream in ((1, noise.Stream.WORLD), (9, noise.Stream.SFT)):
        draws = [philox.Draw.of(1, 2, 3, 4, noise.Stream.SFT), philox.Draw.of(seed, 2, 3, 4, stream)]
        got = philox.fill_ref("normal", philox.Draw(torch.cat([one.words for one in draws])), (5,))
        assert torch.equal(got, torch.cat([philox.fill_ref("normal", one, (5,)) for one in draws]))
        assert not torch.equal(got[0], got[1])


def test_operations_are_known_to_autograd_and_compilers(where: torch.device) -> None:
    """What LOOP does with them, in one graph, through torch.compile's own tracing; and torch's own check of a custom operation."""
    action, mu, log_scale = density(torch.float32, where)
    old = laplace.log_prob_ref(action, mu, log_scale) + 0.1 * normal(5, 11, 3).to(where)
    advantage, live = normal(6, 11).to(where), (normal(7, 11, 3) > 0).to(where)

    def loss(mu: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
        return -laplace.clipped_triton(laplace.log_prob_triton(action, mu, log_scale), old, advantage, live, 0.1)[0].sum()

    leaves = [one.clone().requires_grad_() for one in (mu, log_scale)]
    want = torch.autograd.grad(loss(*leaves), leaves)
    got = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(*leaves), leaves)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert float(want[0].abs().max()) > 0
    for way_in, given in ((laplace.log_prob, (action, mu, log_scale)), (laplace.clipped, (old, old, advantage, live, 0.1))):
        torch.compile(way_in, backend="eager", fullgraph=True)(*given)  # the rule itself breaks no graph
    torch.library.opcheck(laplace.log_prob_triton, (action, *leaves))
    torch.library.opcheck(laplace.clipped_triton, (old.clone().requires_grad_(), old, advantage, live, 0.1))


# What is compiled ahead of time

def test_offsets_of_32_bits_are_seen() -> None:
    ttir = """
      %c3_i32 = arith.constant 3 : i32
      %0 = tt.addptr %x, %c3_i32 : !tt.ptr<f32>, i32
      %1 = tt.addptr %y, %a : tensor<64x!tt.ptr<f32>>, tensor<64xi64>
      %2 = tt.addptr %y, %b : tensor<64x!tt.ptr<f32>>, tensor<64xi32> loc(#loc3)
      %3 = tt.addptr %x, %n : !tt.ptr<f32>, i32 loc(#loc4)
    """
    assert [line.split()[0] for line in compile_kernels.narrow_offsets(ttir)] == ["%2", "%3"]


def compiled_rows(*architectures: str) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "worldenv.cli.bench", "kernels", "--compile-only", "--arch", ",".join(architectures)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-500:]
    rows: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])["rows"]
    return rows


def check_rows(rows: list[dict[str, Any]], *architectures: str) -> None:
    assert len(rows) == len(architectures) * len(compile_kernels.SIZES) * len(list(compile_kernels.builds()))
    assert {row["arch"] for row in rows} == set(architectures)
    for row in rows:
        assert row.keys() == {"kernel", "arch", "registers", "shared_bytes", "spill_bytes"}
        assert row["spill_bytes"] == 0, row
        assert 0 < row["registers"] <= 255
        assert row["shared_bytes"] <= 48 * 1024, "what every GPU gives without asking"


def test_all_compile_for_hopper() -> None:
    check_rows(compiled_rows("sm_90"), "sm_90")


@pytest.mark.slow
def test_all_compile_everywhere() -> None:
    others = [arch for arch in ARCHITECTURES if arch != "sm_90"]
    check_rows(compiled_rows(*others), *others)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["kernels", "--compile-only", "--arch", "sm_91"], "--arch sm_91: there are sm_80"),
        (["copy", "--compile-only"], "--compile-only goes with kernels alone"),
        (["kernels", "--compile-only"], "TRITON_INTERPRET is set"),
    ],
)
def test_mistakes_are_named(argv: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from worldenv.cli import bench  # a bare GPU machine has no tyro

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert bench.main(argv) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("variant", [*sorted(compile_kernels.MODULES), "maps"])
def test_cases_are_measured_on_a_cpu(variant: str) -> None:
    """The very code that a GPU runs, with the definition on both sides."""
    setting = Setting(torch.device("cpu"), torch.bfloat16, "tiny", pairs=3, seconds=0.0, brief=True)
    case = cases.CASES["maps" if variant == "maps" else "kernels"]
    rows = [measure() for name, measure in case(setting).items() if variant in name or variant == "maps"]
    assert rows
    assert all(row.value is not None and row.parity in ("pass", "none") for row in rows), rows

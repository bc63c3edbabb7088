"""kernels/laplace.py: the policy's Laplace density, drawn and scored, and the clipped surrogate that learns from it.

    log p(a) = sum over d of  -|a - mu| / b - log(2 b)                    b = exp(log_scale)
    a = mu - b sign(u - 1/2) ln(2 min(u, 1 - u))                          the inverse CDF at u in (0, 1)
    r = exp(log p_new - log p_old),  gain = min(r A, clip(r, 1 - eps, 1 + eps) A)     of one executed step
Sources: World-Env, section 4.3, Eq. 5 and 8; Schulman et al. 2017 (arXiv:1707.06347) eq. 7.

The definitions work in the type that they are given; the policy gives float32 and draws in float64. The kernels work in float32, the tails of a draw
from integers or float64. Where clipping holds, and where r A = 0, the gain has no gradient; at the edges of the clip it still has.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from worldenv.kernels.backend import Build, launch, uses_kernel
from worldenv.kernels.philox import Draw, fill_ref, philox_block

_ROWS, _BLOCK = 64, 256
_LN2 = tl.constexpr(math.log(2.0))


class Steps(NamedTuple):
    """The surrogate, step by step, (B, K) each; 0 or False where nothing was executed. Only `gain` carries a gradient, to the new log-density."""

    gain: torch.Tensor
    """min(r A, clip(r) A)."""
    ratio: torch.Tensor
    """r."""
    clipped: torch.Tensor
    """bool: the clipped branch counts."""
    kl: torch.Tensor
    """r - 1 - log r [nat]."""


# The definitions


def log_density(action: torch.Tensor, mu: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
    """log p of each dimension, like `action`; all three alike in shape."""
    return -(action - mu).abs() * torch.exp(-log_scale) - log_scale - math.log(2.0)


def log_prob_ref(action: torch.Tensor, mu: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
    """log p of each step: (..., D) -> (...)."""
    return log_density(action, mu, log_scale).sum(-1)


def sample(mu: torch.Tensor, log_scale: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The draw that `uniform` in (0, 1) stands for, by the inverse CDF: mu - b sign(u - 1/2) ln(1 - 2 |u - 1/2|).

    1 - 2 |u - 1/2| is written 2 min(u, 1 - u), which keeps its precision in the tails. Result in the widest dtype of the three.
    """
    return mu - torch.exp(log_scale) * torch.sign(uniform - 0.5) * torch.log(2.0 * torch.minimum(uniform, 1.0 - uniform))


def draw_ref(mu: torch.Tensor, log_scale: torch.Tensor, source: torch.Tensor | Draw) -> tuple[torch.Tensor, torch.Tensor]:
    """Drawn in float64, rounded to float32, and scored as it was rounded; arguments and result as those of `draw`."""
    uniform = fill_ref("uniform", source, mu.shape[1:]) if isinstance(source, Draw) else source
    action = sample(mu.double(), log_scale.double(), uniform.to(mu.device)).float()
    return action, log_prob_ref(action, mu, log_scale)


def clipped_ref(new: torch.Tensor, old: torch.Tensor, advantage: torch.Tensor, live: torch.Tensor, clip: float) -> Steps:
    """The surrogate in plain PyTorch; arguments as those of `clipped`."""
    log_ratio = torch.where(live, new - old, 0.0)
    ratio = log_ratio.exp()
    gain = ratio * advantage[:, None]
    held = ratio.clamp(1.0 - clip, 1.0 + clip) * advantage[:, None]
    total = torch.where(live, torch.minimum(gain, held), 0.0)
    plain, log_plain = ratio.detach(), log_ratio.detach()
    return Steps(total, plain * live, (held < gain).detach() & live, plain - 1.0 - log_plain)


# The kernels


@triton.jit
def _draw_kernel(
    mu_ptr, log_scale_ptr, source_ptr, action_ptr, log_prob_ptr, rows, steps, dims,
    COUNTER: tl.constexpr, ROWS: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, DIMS)
    at = row[:, None] * dims + dim[None, :]
    held = (row < rows)[:, None] & (dim < dims)[None, :]
    mu = tl.load(mu_ptr + at, mask=held, other=0.0).to(tl.float32)
    log_scale = tl.load(log_scale_ptr + at, mask=held, other=0.0).to(tl.float32)
    if COUNTER:
        element = (row % steps)[:, None] * dims + dim[None, :]
        words = source_ptr + (row // steps)[:, None] * 5
        there = (row < rows)[:, None]
        seed, rollout = tl.load(words, mask=there, other=0).to(tl.uint32), tl.load(words + 1, mask=there, other=0).to(tl.uint32)
        chunk, step = tl.load(words + 2, mask=there, other=0).to(tl.uint32), tl.load(words + 3, mask=there, other=0).to(tl.uint32)
        stream = tl.load(words + 4, mask=there, other=0).to(tl.uint32)
        block = (element // 4).to(tl.uint32)
        zero = tl.zeros_like(block)
        a, b, c, d = philox_block(zero + seed, zero + rollout, zero + chunk, zero + step, zero + stream, block)
        lane = element % 4
        word = tl.where(lane < 2, tl.where(lane == 0, a, b), tl.where(lane == 2, c, d))
        above = word >= 2147483648  # u > 1/2
        least = tl.where(above, 4294967295 - word, word)  # 2 min(u, 1 - u) = (2 least + 1) / 2^32: rounded once, however near to 0 or 1
        tail = (least.to(tl.float32) * 2.0 + 1.0) * 2.3283064365386963e-10
    else:
        uniform = tl.load(source_ptr + at, mask=held, other=0.5)
        above = uniform > 0.5
        tail = (2.0 * tl.minimum(uniform, 1.0 - uniform)).to(tl.float32)
    away = -tl.exp(log_scale) * tl.log(tail)
    action = tl.where(above, mu + away, mu - away)
    density = -tl.abs(action - mu) * tl.exp(-log_scale) - log_scale - _LN2
    tl.store(action_ptr + at, action, mask=held)
    tl.store(log_prob_ptr + row, tl.sum(tl.where(held, density, 0.0), axis=1), mask=row < rows)


@triton.jit
def _log_prob_kernel(action_ptr, mu_ptr, log_scale_ptr, out_ptr, rows, dims, ROWS: tl.constexpr, DIMS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, DIMS)
    at = row[:, None] * dims + dim[None, :]
    held = (row < rows)[:, None] & (dim < dims)[None, :]
    action = tl.load(action_ptr + at, mask=held, other=0.0).to(tl.float32)
    mu = tl.load(mu_ptr + at, mask=held, other=0.0).to(tl.float32)
    log_scale = tl.load(log_scale_ptr + at, mask=held, other=0.0).to(tl.float32)
    density = -tl.abs(action - mu) * tl.exp(-log_scale) - log_scale - _LN2
    tl.store(out_ptr + row, tl.sum(tl.where(held, density, 0.0), axis=1), mask=row < rows)


@triton.jit
def _log_prob_backward_kernel(
    action_ptr, mu_ptr, log_scale_ptr, upstream_ptr, d_mu_ptr, d_log_scale_ptr, rows, dims, ROWS: tl.constexpr, DIMS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, DIMS)
    at = row[:, None] * dims + dim[None, :]
    held = (row < rows)[:, None] & (dim < dims)[None, :]
    action = tl.load(action_ptr + at, mask=held, other=0.0).to(tl.float32)
    mu = tl.load(mu_ptr + at, mask=held, other=0.0).to(tl.float32)
    log_scale = tl.load(log_scale_ptr + at, mask=held, other=0.0).to(tl.float32)
    upstream = tl.load(upstream_ptr + row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    away, inverse = action - mu, tl.exp(-log_scale)
    side = tl.where(away > 0.0, 1.0, tl.where(away < 0.0, -1.0, 0.0))
    tl.store(d_mu_ptr + at, upstream * side * inverse, mask=held)
    tl.store(d_log_scale_ptr + at, upstream * (tl.abs(away) * inverse - 1.0), mask=held)


@triton.jit
def _clipped_kernel(
    new_ptr, old_ptr, advantage_ptr, live_ptr, gain_ptr, slope_ptr, ratio_ptr, clipped_ptr, kl_ptr, count, steps, low, high, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    live = tl.load(live_ptr + at, mask=inside, other=0) != 0
    new = tl.load(new_ptr + at, mask=live, other=0.0).to(tl.float32)  # what was not executed is not even read: it may be nan
    old = tl.load(old_ptr + at, mask=live, other=0.0).to(tl.float32)
    advantage = tl.load(advantage_ptr + at // steps, mask=inside, other=0.0).to(tl.float32)
    log_ratio = new - old
    ratio = tl.exp(log_ratio)
    gain = ratio * advantage
    held = tl.where(ratio < low, low, tl.where(ratio > high, high, ratio)) * advantage
    clipped = (held < gain) & live
    tl.store(gain_ptr + at, tl.where(live, tl.where(held < gain, held, gain), 0.0), mask=inside)
    tl.store(slope_ptr + at, tl.where(live & (held >= gain), gain, 0.0), mask=inside)
    tl.store(ratio_ptr + at, tl.where(live, ratio, 0.0), mask=inside)
    tl.store(clipped_ptr + at, clipped.to(tl.int8), mask=inside)
    tl.store(kl_ptr + at, ratio - 1.0 - log_ratio, mask=inside)


def draw_triton(mu: torch.Tensor, log_scale: torch.Tensor, source: torch.Tensor | Draw) -> tuple[torch.Tensor, torch.Tensor]:
    """`draw` by the kernel."""
    (batch, steps, dims), counter = mu.shape, isinstance(source, Draw)
    action = torch.empty(mu.shape, dtype=torch.float32, device=mu.device)
    log_prob = torch.empty(batch, steps, dtype=torch.float32, device=mu.device)
    if log_prob.numel():
        given = source.words if isinstance(source, Draw) else source
        arguments = {
            "mu_ptr": mu.contiguous(), "log_scale_ptr": log_scale.contiguous(), "source_ptr": given.contiguous(), "action_ptr": action,
            "log_prob_ptr": log_prob, "rows": batch * steps, "steps": steps, "dims": dims,
        }  # fmt: skip
        constants = {"COUNTER": counter, "ROWS": _ROWS, "DIMS": triton.next_power_of_2(dims)}
        launch(_draw_kernel, triton.cdiv(batch * steps, _ROWS), arguments, constants)
    return action, log_prob


@torch.library.custom_op("worldenv::laplace_log_prob", mutates_args=())
def log_prob_triton(action: torch.Tensor, mu: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
    """`log_prob` by the kernel: an operation of torch, so that autograd and torch.compile know it."""
    dims = mu.shape[-1]
    out = torch.empty(mu.shape[:-1], dtype=torch.float32, device=mu.device)
    if out.numel():
        arguments = {
            "action_ptr": action.contiguous(), "mu_ptr": mu.contiguous(), "log_scale_ptr": log_scale.contiguous(), "out_ptr": out,
            "rows": out.numel(), "dims": dims,
        }  # fmt: skip
        launch(_log_prob_kernel, triton.cdiv(out.numel(), _ROWS), arguments, {"ROWS": _ROWS, "DIMS": triton.next_power_of_2(dims)})
    return out


@torch.library.custom_op("worldenv::laplace_log_prob_backward", mutates_args=())
def _log_prob_backward(
    action: torch.Tensor, mu: torch.Tensor, log_scale: torch.Tensor, upstream: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    d_mu, d_log_scale = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (mu, log_scale))
    if upstream.numel():
        arguments = {
            "action_ptr": action.contiguous(), "mu_ptr": mu.contiguous(), "log_scale_ptr": log_scale.contiguous(),
            "upstream_ptr": upstream.contiguous(), "d_mu_ptr": d_mu, "d_log_scale_ptr": d_log_scale,
            "rows": upstream.numel(), "dims": mu.shape[-1],
        }  # fmt: skip
        constants = {"ROWS": _ROWS, "DIMS": triton.next_power_of_2(mu.shape[-1])}
        launch(_log_prob_backward_kernel, triton.cdiv(upstream.numel(), _ROWS), arguments, constants)
    return d_mu, d_log_scale


@log_prob_triton.register_fake
def _(action: torch.Tensor, mu: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
    return mu.new_empty(mu.shape[:-1], dtype=torch.float32)


@_log_prob_backward.register_fake
def _(action: torch.Tensor, mu: torch.Tensor, log_scale: torch.Tensor, upstream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return mu.new_empty(mu.shape), log_scale.new_empty(log_scale.shape)


def _keep_density(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _density_gradient(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    action, mu, log_scale = ctx.saved_tensors
    d_mu, d_log_scale = _log_prob_backward(action, mu, log_scale, upstream)
    return -d_mu.to(action.dtype) if ctx.needs_input_grad[0] else None, d_mu, d_log_scale


log_prob_triton.register_autograd(_density_gradient, setup_context=_keep_density)


@torch.library.custom_op("worldenv::clipped_surrogate", mutates_args=())
def clipped_triton(
    new: torch.Tensor, old: torch.Tensor, advantage: torch.Tensor, live: torch.Tensor, clip: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`clipped` by the kernel, with d gain / d new as second result: it is made in the same pass, and backward is one product."""
    gain, slope, ratio, kl = (torch.empty(new.shape, dtype=torch.float32, device=new.device) for _ in range(4))
    held = torch.empty(new.shape, dtype=torch.bool, device=new.device)
    if new.numel():
        arguments = {
            "new_ptr": new.contiguous(), "old_ptr": old.contiguous(), "advantage_ptr": advantage.contiguous(),
            "live_ptr": live.contiguous().view(torch.int8), "gain_ptr": gain, "slope_ptr": slope, "ratio_ptr": ratio,
            "clipped_ptr": held.view(torch.int8), "kl_ptr": kl, "count": new.numel(), "steps": new.shape[1], "low": 1.0 - clip, "high": 1.0 + clip,
        }  # fmt: skip
        launch(_clipped_kernel, triton.cdiv(new.numel(), _BLOCK), arguments, {"BLOCK": _BLOCK})
    return gain, slope, ratio, held, kl


@clipped_triton.register_fake
def _(
    new: torch.Tensor, old: torch.Tensor, advantage: torch.Tensor, live: torch.Tensor, clip: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    gain, slope, ratio, kl = (new.new_empty(new.shape, dtype=torch.float32) for _ in range(4))
    return gain, slope, ratio, new.new_empty(new.shape, dtype=torch.bool), kl


def _keep_slope(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(output[1])
    ctx.dtype = inputs[0].dtype
    ctx.mark_non_differentiable(*output[1:])


def _gain_gradient(ctx: Any, upstream: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    (slope,) = ctx.saved_tensors
    return (upstream * slope).to(ctx.dtype), None, None, None, None


clipped_triton.register_autograd(_gain_gradient, setup_context=_keep_slope)


# The ways in


def draw(mu: torch.Tensor, log_scale: torch.Tensor, source: torch.Tensor | Draw) -> tuple[torch.Tensor, torch.Tensor]:
    """Actions (B, K, D) and their log-density (B, K), float32, of `mu` and `log_scale` (B, K, D), which get no gradient.

    `source` is uniform (B, K, D) float64 in (0, 1), or the addresses of B draws of the counter RNG: then uniforms are made where they are used.
    The density is that of the action as it is rounded to float32. Raises ValueError where shapes do not fit, or `source` is on another device.
    """
    given = source.words if isinstance(source, Draw) else source
    fits = given.shape == (len(mu), 5) if isinstance(source, Draw) else given.shape == mu.shape and given.dtype == torch.float64
    if mu.dim() != 3 or mu.shape != log_scale.shape or not fits:
        raise ValueError(
            f"draw: mu {tuple(mu.shape)}, log-scale {tuple(log_scale.shape)}, source {tuple(given.shape)} {given.dtype}: "
            "want (B, K, D) twice and uniforms alike in float64, or B draws"
        )
    return draw_triton(mu, log_scale, source) if uses_kernel(mu, log_scale, given) else draw_ref(mu, log_scale, source)


def log_prob(action: torch.Tensor, mu: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
    """log p of each step, (..., D) -> (...), with gradients to all three, which are alike in shape; ValueError where they are not."""
    if not action.shape == mu.shape == log_scale.shape:
        raise ValueError(f"log_prob: action {tuple(action.shape)}, mu {tuple(mu.shape)}, log-scale {tuple(log_scale.shape)}: want them alike")
    if uses_kernel(action, mu, log_scale):
        scored: torch.Tensor = log_prob_triton(action, mu, log_scale)
        return scored
    return log_prob_ref(action, mu, log_scale)


def clipped(new: torch.Tensor, old: torch.Tensor, advantage: torch.Tensor, live: torch.Tensor, clip: float) -> Steps:
    """The surrogate of log-densities `new` and `old` (B, K) with `advantage` (B,), where `live` (B, K) bool; elsewhere nothing is read.

    Raises ValueError where shapes do not fit.
    """
    if not new.shape == old.shape == live.shape or advantage.shape != new.shape[:1]:
        raise ValueError(
            f"surrogate: new {tuple(new.shape)}, old {tuple(old.shape)}, live {tuple(live.shape)}, advantage {tuple(advantage.shape)}"
        )
    if not uses_kernel(new, old, advantage, live):
        return clipped_ref(new, old, advantage, live, clip)
    gain, _, ratio, held, kl = clipped_triton(new, old, advantage, live, clip)
    return Steps(gain, ratio, held, kl)


def _density_types(dtype: str, *outputs: str) -> dict[str, str]:
    return {"mu_ptr": dtype, "log_scale_ptr": dtype, **dict.fromkeys(outputs, "*fp32"), "rows": "i32", "dims": "i32"}


_TILE = {"ROWS": _ROWS, "DIMS": 8}
BUILDS = (
    *(
        Build(
            _draw_kernel, {**_density_types(dtype, "action_ptr", "log_prob_ptr"), "source_ptr": "*i64" if counter else "*fp64", "steps": "i32"},
            {"COUNTER": counter, **_TILE},
        )
        for dtype in ("*fp32", "*bf16")
        for counter in (True, False)
    ),
    *(Build(_log_prob_kernel, {**_density_types(dtype, "out_ptr"), "action_ptr": "*fp32"}, _TILE) for dtype in ("*fp32", "*bf16")),
    *(
        Build(
            _log_prob_backward_kernel,
            {**_density_types(dtype, "upstream_ptr"), "action_ptr": "*fp32", "d_mu_ptr": dtype, "d_log_scale_ptr": dtype}, _TILE,
        )
        for dtype in ("*fp32", "*bf16")
    ),
    *(
        Build(
            _clipped_kernel,
            {
                "new_ptr": dtype, "old_ptr": "*fp32", "advantage_ptr": "*fp32", "live_ptr": "*i8", "gain_ptr": "*fp32", "slope_ptr": "*fp32",
                "ratio_ptr": "*fp32", "clipped_ptr": "*i8", "kl_ptr": "*fp32", "count": "i32", "steps": "i32", "low": "fp32", "high": "fp32",
            },
            {"BLOCK": _BLOCK},
        )
        for dtype in ("*fp32", "*bf16")
    ),
)  # fmt: skip

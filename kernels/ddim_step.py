"""kernels/ddim_step.py: one DDIM step of a v-predicting video model, from the network's answer to its next input.

    g  = u + guidance (v - u),  then  share g std(v) / std(g) + (1 - share) g          where there is an unconditional answer u
    x0 = (sqrt(a) x - sqrt(1 - a) g) rescale        e = sqrt(a) g + sqrt(1 - a) x      a = the cumulative alpha of the sample's level
    x' = sqrt(a') x0 + sqrt(1 - a' - sigma^2) e + sigma n
    next input = [memory frames * their scale at the next level, x']                   memory is put back, not denoised
Standard deviations are per sample over all channels, frames (memory too) and pixels. Each sample is at a level of its own.
Sources: Song et al. 2021 (arXiv:2010.02502) eq. 12, 16; v: Salimans & Ho 2022 (arXiv:2202.00512) sec. 4; guidance rescale: Lin et al. 2023
(arXiv:2305.08891) sec. 3.4; dynamic rescale: DynamiCrafter (arXiv:2310.12190); memory: EnerVerse-AC (arXiv:2505.09723).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from worldenv.kernels.backend import Build, launch, uses_kernel
from worldenv.kernels.philox import Draw, fill_ref, philox_normals

COLUMNS = ("sqrt(a)", "sqrt(1 - a)", "rescale", "sqrt(1 - a' - sigma^2)", "sqrt(a')", "sigma")
"""Of a sampler's table: what one level needs."""
_BLOCK, _MOMENTS_BLOCK, _MOMENTS = 1024, 4096, 5
_STRIDES = ("v_b", "v_c", "v_t", "v_p", "other_b", "other_c", "other_t", "other_p")


# The definition


def step_ref(x: torch.Tensor, v: torch.Tensor, rows: torch.Tensor, noise: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(x', x0) of `x` and `v` (B, ...) with `rows` (B, 6) of the table, in float32 or wider; `noise` like x, None where every sigma is 0."""
    signal, rest, rescale, towards, signal_prev, sigma = rows.view(-1, len(COLUMNS), *[1] * (x.dim() - 1)).unbind(1)
    wide = torch.promote_types(x.dtype, torch.float32)
    x, v = x.to(wide), v.to(wide)
    x_0 = (signal * x - rest * v) * rescale
    epsilon = signal * v + rest * x
    x_prev = signal_prev * x_0 + towards * epsilon
    return (x_prev if noise is None else x_prev + sigma * noise), x_0


def rescale_guidance(guided: torch.Tensor, conditional: torch.Tensor, share: float) -> torch.Tensor:
    """`guided` (B, ...) with `share` of it brought to the standard deviation of `conditional`, per sample over everything else."""
    axes = list(range(1, guided.dim()))
    # a network that says 0 everywhere, as an untrained one does, has no deviation to match
    matched = guided * (conditional.std(axes, keepdim=True) / guided.std(axes, keepdim=True).clamp_min(1e-30))
    return share * matched + (1.0 - share) * guided


def ddim_step_ref(
    x: torch.Tensor, v: torch.Tensor, other: torch.Tensor | None, memory: torch.Tensor, table: torch.Tensor, scales: torch.Tensor,
    index: torch.Tensor, noise: torch.Tensor | Draw | None, guidance: float = 1.0, share: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The definition, in the types that it is given; arguments and result as those of `ddim_step`."""
    if other is not None:
        guided = other + guidance * (v - other)
        v = rescale_guidance(guided, v, share) if share > 0 else guided
    remembered, at = memory.shape[2], len(table) - index
    if isinstance(noise, Draw):
        added: torch.Tensor | None = fill_ref("normal", noise.at(at), x[0, :, remembered:].shape).to(x.device)
    else:
        added = None if noise is None else noise[torch.arange(len(x), device=x.device), at]
    x_prev, x_0 = step_ref(x[:, :, remembered:], v[:, :, remembered:], table[index], added)
    kept = memory * scales[(index - 1).clamp_min(0)].view(-1, 1, 1, 1, 1)
    return torch.cat([kept, x_prev], dim=2), x_0


# The kernels


@triton.jit
def _moments_kernel(
    v_ptr, other_ptr, partial_ptr, channels, frames, pixels, v_b, v_c, v_t, v_p, other_b, other_c, other_t, other_p, guidance, BLOCK: tl.constexpr
):
    """Of one block of one sample: count; mean and sum of squared deviations of v; the same of what guidance makes of it."""
    size = channels * frames * pixels
    blocks = tl.cdiv(size, BLOCK)
    sample, part = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    # every element once, in any order: as the network wrote them, channels last
    at = part * BLOCK + tl.arange(0, BLOCK)  # one sample stays below 2^31
    inside = at < size
    c, p, t = at % channels, at // channels % pixels, at // (channels * pixels)
    c, p, t = c.to(tl.int64), p.to(tl.int64), t.to(tl.int64)
    v = tl.load(v_ptr + sample * v_b + c * v_c + t * v_t + p * v_p, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(other_ptr + sample * other_b + c * other_c + t * other_t + p * other_p, mask=inside, other=0.0).to(tl.float32)
    guided = other + guidance * (v - other)
    count = tl.minimum(size - part * BLOCK, BLOCK).to(tl.float32)
    mean_v, mean_g = tl.sum(v) / count, tl.sum(guided) / count
    off_v, off_g = tl.where(inside, v - mean_v, 0.0), tl.where(inside, guided - mean_g, 0.0)
    out = partial_ptr + tl.program_id(0).to(tl.int64) * 5
    tl.store(out, count)
    tl.store(out + 1, mean_v)
    tl.store(out + 2, tl.sum(off_v * off_v))
    tl.store(out + 3, mean_g)
    tl.store(out + 4, tl.sum(off_g * off_g))


@triton.jit
def _deviation(count, mean, squares):
    """Square root of the summed squared deviations of all parts from their common mean."""
    common = tl.sum(count * mean) / tl.sum(count)
    return tl.sqrt(tl.sum(squares + count * (mean - common) * (mean - common)))


@triton.jit
def _step_kernel(
    x_ptr, v_ptr, other_ptr, memory_ptr, table_ptr, scales_ptr, index_ptr, noise_ptr, partial_ptr, next_ptr, x_0_ptr,
    channels, remembered, chunk, pixels, steps, draws, parts, v_b, v_c, v_t, v_p, other_b, other_c, other_t, other_p, guidance, share,
    GUIDED: tl.constexpr, NOISE: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    frames = remembered + chunk
    new, kept = channels * chunk * pixels, channels * remembered * pixels
    new_blocks = tl.cdiv(new, BLOCK)
    blocks = new_blocks + tl.cdiv(kept, BLOCK)
    sample, part = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    index = tl.load(index_ptr + sample)
    whole = sample * channels * frames * pixels
    if part < new_blocks:
        at = part * BLOCK + tl.arange(0, BLOCK)
        inside = at < new
        c, t, p = (at // (chunk * pixels)).to(tl.int64), (at // pixels % chunk + remembered).to(tl.int64), (at % pixels).to(tl.int64)
        place = whole + (c * frames + t) * pixels + p
        x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + sample * v_b + c * v_c + t * v_t + p * v_p, mask=inside, other=0.0).to(tl.float32)
        if GUIDED:
            other = tl.load(other_ptr + sample * other_b + c * other_c + t * other_t + p * other_p, mask=inside, other=0.0).to(tl.float32)
            slot = tl.arange(0, PARTS)
            row = partial_ptr + (sample * parts + slot) * 5
            count = tl.load(row, mask=slot < parts, other=0.0)
            mean_v, squares_v = tl.load(row + 1, mask=slot < parts, other=0.0), tl.load(row + 2, mask=slot < parts, other=0.0)
            mean_g, squares_g = tl.load(row + 3, mask=slot < parts, other=0.0), tl.load(row + 4, mask=slot < parts, other=0.0)
            ratio = _deviation(count, mean_v, squares_v) / tl.maximum(_deviation(count, mean_g, squares_g), 1e-30)
            v = (other + guidance * (v - other)) * (share * ratio + (1.0 - share))
        entry = table_ptr + index * 6
        signal, rest, rescale = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
        towards, signal_prev, sigma = tl.load(entry + 3), tl.load(entry + 4), tl.load(entry + 5)
        x_0 = (signal * x - rest * v) * rescale
        x_prev = signal_prev * x_0 + towards * (signal * v + rest * x)
        if NOISE == 1:
            drawn = sample * draws + steps - index
            x_prev += sigma * tl.load(noise_ptr + drawn * new + at.to(tl.int64), mask=inside, other=0.0)
        if NOISE == 2:
            x_prev += sigma * philox_normals(noise_ptr, sample, (part * BLOCK).to(tl.int64), steps - index, BLOCK)
        tl.store(next_ptr + place, x_prev, mask=inside)
        tl.store(x_0_ptr + sample * new + at.to(tl.int64), x_0, mask=inside)
    else:
        at = (part - new_blocks) * BLOCK + tl.arange(0, BLOCK)
        inside = at < kept
        c, rest_of = (at // (remembered * pixels)).to(tl.int64), (at % (remembered * pixels)).to(tl.int64)
        scale = tl.load(scales_ptr + tl.maximum(index - 1, 0))
        memory = tl.load(memory_ptr + sample * kept + at.to(tl.int64), mask=inside, other=0.0).to(tl.float32)
        tl.store(next_ptr + whole + c * frames * pixels + rest_of, memory * scale, mask=inside)


def _strides(answer: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int, int, int]]:
    """`answer` (B, z, T, h, w), whose rows and columns are one axis, and its strides."""
    if answer.stride(3) != answer.shape[4] * answer.stride(4):
        answer = answer.contiguous()
    return answer, (answer.stride(0), answer.stride(1), answer.stride(2), answer.stride(4))


def ddim_step_triton(
    x: torch.Tensor, v: torch.Tensor, other: torch.Tensor | None, memory: torch.Tensor, table: torch.Tensor, scales: torch.Tensor,
    index: torch.Tensor, noise: torch.Tensor | Draw | None, guidance: float = 1.0, share: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """`ddim_step` by the kernel: one launch, and one before it for the standard deviations that guidance wants."""
    batch, channels, remembered = memory.shape[:3]
    frames, pixels = x.shape[2], x.shape[3] * x.shape[4]
    chunk = frames - remembered
    following = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    x_0 = torch.empty(batch, channels, chunk, *x.shape[3:], dtype=torch.float32, device=x.device)
    v, v_strides = _strides(v)
    unconditional, other_strides = (v, v_strides) if other is None else _strides(other)
    strides = dict(zip(_STRIDES, (*v_strides, *other_strides), strict=True))
    parts = triton.cdiv(channels * frames * pixels, _MOMENTS_BLOCK)
    guided = other is not None
    partial = torch.empty(batch * parts if guided else 1, _MOMENTS, dtype=torch.float32, device=x.device)
    if guided:
        arguments = {
            "v_ptr": v, "other_ptr": unconditional, "partial_ptr": partial, "channels": channels, "frames": frames, "pixels": pixels, **strides,
            "guidance": guidance,
        }  # fmt: skip
        launch(_moments_kernel, batch * parts, arguments, {"BLOCK": _MOMENTS_BLOCK}, warps=8)
    kind = 0 if noise is None else 2 if isinstance(noise, Draw) else 1
    given = partial if noise is None else noise.words if isinstance(noise, Draw) else noise
    arguments = {
        "x_ptr": x.contiguous(), "v_ptr": v, "other_ptr": unconditional, "memory_ptr": memory.contiguous(), "table_ptr": table, "scales_ptr": scales,
        "index_ptr": index, "noise_ptr": given.contiguous(), "partial_ptr": partial, "next_ptr": following, "x_0_ptr": x_0,
        "channels": channels, "remembered": remembered, "chunk": chunk, "pixels": pixels, "steps": len(table),
        "draws": given.shape[1], "parts": parts, **strides, "guidance": guidance, "share": share,
    }  # fmt: skip
    blocks = triton.cdiv(channels * chunk * pixels, _BLOCK) + triton.cdiv(channels * remembered * pixels, _BLOCK)
    constants = {"GUIDED": guided, "NOISE": kind, "PARTS": triton.next_power_of_2(parts) if guided else 1, "BLOCK": _BLOCK}
    launch(_step_kernel, batch * blocks, arguments, constants, contract=kind != 2)
    return following, x_0


# The way in


def ddim_step(
    x: torch.Tensor, v: torch.Tensor, other: torch.Tensor | None, memory: torch.Tensor, table: torch.Tensor, scales: torch.Tensor,
    index: torch.Tensor, noise: torch.Tensor | Draw | None, guidance: float = 1.0, share: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """What the network is given next (B, z, M + K, h, w), and the clean latents that this step foresees (B, z, K, h, w), float32.

    `x` (B, z, M + K, h, w) its input before: memory, then noisy latents; `v` its answer, `other` the unconditional one (None without guidance),
    in any strides; `memory` (B, z, M, h, w) not scaled; `table` (steps, 6) float32 of COLUMNS and `scales` (steps,) of memory, ascending in noise;
    `index` (B,) int64 each sample's row; `noise` (B, 1 + steps or more, z, K, h, w), of which step s before the end takes number steps - s, or
    the addresses of B draws, whose step it becomes; None where every sigma is 0. `share` of guidance's rescale, 0 .. 1.
    Raises ValueError where shapes do not fit.
    """
    shape = (x.shape[0], x.shape[1], x.shape[2] - memory.shape[2], *x.shape[3:])
    given = None if noise is None else noise.words if isinstance(noise, Draw) else noise
    fits = given is None or (len(given) == shape[0] and (isinstance(noise, Draw) or tuple(given.shape[2:]) == shape[1:]))
    alike = v.shape == x.shape and (other is None or other.shape == x.shape) and memory.shape == (*x.shape[:2], memory.shape[2], *x.shape[3:])
    if x[0].numel() >= 2**31:
        raise ValueError(f"ddim_step: latents {tuple(x.shape)}: one sample has to stay below 2^31 elements")
    if not alike or not fits or table.shape != (len(scales), len(COLUMNS)) or index.shape != x.shape[:1]:
        shapes = {"x": x, "v": v, "other": other, "memory": memory, "table": table, "scales": scales, "index": index, "noise": given}
        raise ValueError(f"ddim_step: {', '.join(f'{name} {tuple(one.shape)}' for name, one in shapes.items() if one is not None)} do not fit")
    step = ddim_step_triton if uses_kernel(x, v, other, memory, table, scales, index, given) else ddim_step_ref
    return step(x, v, other, memory, table, scales, index, noise, guidance, share)


_SIZES = ("channels", "remembered", "chunk", "pixels", "steps", "draws", "parts")
BUILDS = (
    *(
        Build(
            _moments_kernel,
            {"v_ptr": dtype, "other_ptr": dtype, "partial_ptr": "*fp32", "guidance": "fp32",
             **dict.fromkeys(("channels", "frames", "pixels", *_STRIDES), "i32")},
            {"BLOCK": _MOMENTS_BLOCK}, warps=8,
        )
        for dtype in ("*fp32", "*bf16")
    ),
    *(
        Build(
            _step_kernel,
            {
                "x_ptr": "*fp32", "v_ptr": dtype, "other_ptr": dtype, "memory_ptr": "*fp32", "table_ptr": "*fp32", "scales_ptr": "*fp32",
                "index_ptr": "*i64", "noise_ptr": "*i64" if kind == 2 else "*fp32", "partial_ptr": "*fp32", "next_ptr": "*fp32", "x_0_ptr": "*fp32",
                **dict.fromkeys((*_SIZES, *_STRIDES), "i32"), "guidance": "fp32", "share": "fp32",
            },
            {"GUIDED": guided, "NOISE": kind, "PARTS": 64 if guided else 1, "BLOCK": _BLOCK}, contract=kind != 2,
        )
        for dtype in ("*fp32", "*bf16")
        for guided in (False, True)
        for kind in (0, 1, 2)
    ),
)  # fmt: skip

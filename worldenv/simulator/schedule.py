"""The diffusion process in float64 tables: zero-terminal-SNR schedule, v-prediction, DDIM with trailing spacing.

    x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e          v = sqrt(a_t) e - sqrt(1 - a_t) x_0
    x_0 = sqrt(a_t) x_t - sqrt(1 - a_t) v          e = sqrt(a_t) v + sqrt(1 - a_t) x_t
with a the cumulative alpha. At the last of the 1000 noise levels a = 0: x is pure noise and v = -x_0.
Sources: Salimans & Ho 2022 (arXiv:2202.00512) sec. 4 for v; Lin et al. 2023 (arXiv:2305.08891) alg. 1 for the rescaled schedule
and sec. 3.3, 3.4 for trailing spacing and guidance rescale; Song et al. 2021 (arXiv:2010.02502) eq. 12, 16 for the sampler;
DynamiCrafter (arXiv:2310.12190) for the dynamic rescale.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from worldenv.kernels import ddim_step

LEVELS = 1000
"""Noise levels of the process."""
_BETA_FIRST, _BETA_LAST = 0.00085, 0.012
_RESCALE_LEVELS, _RESCALE_FLOOR = 400, 0.7

Table = NDArray[np.float64]


def betas() -> Table:
    """(1000,) noise added at each level: evenly spaced square roots, then rescaled so that the signal is exactly 0 at the end."""
    given = np.linspace(_BETA_FIRST**0.5, _BETA_LAST**0.5, LEVELS) ** 2
    signal = np.sqrt(np.cumprod(1.0 - given))
    signal = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
    squared = signal**2
    added: Table = 1.0 - squared / np.concatenate([[1.0], squared[:-1]])
    return added


def alphas_cumprod() -> Table:
    """(1000,) a_t, from 0.99915 down to exactly 0."""
    return np.asarray(np.cumprod(1.0 - betas()), dtype=np.float64)


def latent_scales(dynamic: bool = True) -> Table:
    """(1000,) factor on clean latents at each level: 1 down to 0.7 over the first 400, then 0.7; all 1 where not `dynamic`."""
    if not dynamic:
        return np.ones(LEVELS)
    tail = np.full(LEVELS - _RESCALE_LEVELS, _RESCALE_FLOOR)
    return np.concatenate([np.linspace(1.0, _RESCALE_FLOOR, _RESCALE_LEVELS), tail])


def trailing_timesteps(steps: int) -> NDArray[np.int64]:
    """(steps,) noise levels that the sampler visits, ascending, the last one 999.

    Raises ValueError for a count whose table leaves 0 .. 999: rounding gives such a count one level too many.
    """
    if not 1 <= steps <= LEVELS:
        raise ValueError(f"denoise_steps={steps}: want 1 .. {LEVELS}")
    levels = _trailing(steps)
    if not _whole(levels, steps):
        cures = (n for away in range(1, LEVELS) for n in (steps - away, steps + away) if 1 <= n <= LEVELS and _whole(_trailing(n), n))
        raise ValueError(f"denoise_steps={steps}: its trailing timesteps are {len(levels)}, from {levels[0]}; use {next(cures)}")
    return levels


def _trailing(steps: int) -> NDArray[np.int64]:
    return np.round(np.arange(LEVELS, 0, -LEVELS / steps)).astype(np.int64)[::-1] - 1


def _whole(levels: NDArray[np.int64], steps: int) -> bool:
    return len(levels) == steps and bool(levels[0] >= 0)


def _ddim_sigmas(alphas: Table, alphas_prev: Table, eta: float) -> Table:
    return np.asarray(eta * np.sqrt((1.0 - alphas_prev) / (1.0 - alphas) * (1.0 - alphas / alphas_prev)))


@dataclass(frozen=True)
class Sampler:
    """Tables of one DDIM sampler, (steps,) float64, ascending in noise: a rollout walks them from the last to the first."""

    timesteps: NDArray[np.int64]
    """Noise level, 0 .. 999."""
    alphas: Table
    """a_t."""
    alphas_prev: Table
    """a of the next lower level that is visited; the last step ends at the process' first level, not at a = 1."""
    sigmas: Table
    """Deviation of the noise that the step adds."""
    scales: Table
    """Dynamic rescale at the level."""
    scales_prev: Table
    """Dynamic rescale at the next lower level."""

    @classmethod
    def ddim(cls, steps: int, eta: float = 1.0, dynamic_rescale: bool = True) -> Sampler:
        """`steps` DDIM steps; `eta` in [0, 1] from deterministic to ancestral. ValueError where the numbers make no sampler."""
        if not 0.0 <= eta <= 1.0:
            raise ValueError(f"eta={eta}: want 0 (deterministic) .. 1 (ancestral)")
        levels, process, scales = trailing_timesteps(steps), alphas_cumprod(), latent_scales(dynamic_rescale)
        alphas = process[levels]
        alphas_prev = np.concatenate([process[:1], alphas[:-1]])
        scales = scales[levels]
        scales_prev = np.concatenate([scales[:1], scales[:-1]])
        return cls(levels, alphas, alphas_prev, _ddim_sigmas(alphas, alphas_prev, eta), scales, scales_prev)

    def __len__(self) -> int:
        return len(self.timesteps)

    @functools.cached_property
    def _coefficients(self) -> dict[torch.device, torch.Tensor]:
        return {}

    def table(self, device: torch.device) -> torch.Tensor:
        """(steps, 6) float32 of `ddim_step.COLUMNS`, kept on `device`: a step copies nothing to it and waits for nothing."""
        if device not in self._coefficients:
            # In exact arithmetic the radicand is 0 on the first step with eta = 1; rounded, it can be below.
            towards = np.sqrt(np.maximum(1.0 - self.alphas_prev - self.sigmas**2, 0.0))
            signal, rest, signal_prev = np.sqrt(self.alphas), np.sqrt(1.0 - self.alphas), np.sqrt(self.alphas_prev)
            columns = (signal, rest, self.scales_prev / self.scales, towards, signal_prev, self.sigmas)
            self._coefficients[device] = torch.from_numpy(np.stack(columns, axis=1)).to(device, torch.float32)
        return self._coefficients[device]

    def step(self, x: torch.Tensor, v: torch.Tensor, index: torch.Tensor, noise: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(x_prev, x_0) of latents `x` and predictions `v` (B, ...), each sample at its own `index` (B,) of the tables.

        `noise` is standard normal, like x; None where every sigma is 0. Arithmetic in float32. The simulator's own step has guidance and memory in
        it too (`worldenv.kernels.ddim_step`).
        """
        return ddim_step.step_ref(x.float(), v.float(), self.table(x.device)[index], noise)

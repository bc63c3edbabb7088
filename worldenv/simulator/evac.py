"""EVAC, the world simulator: the order in which its networks are called, and what it remembers of a rollout.

One chunk:  memory latents (first, n/3, 2n/3, last of all n so far)  +  action-map latents, rays, image tokens, action tokens
            -> DDIM over K new latents -> decode K frames.
The three are apart (begin_chunk, step, finish_chunk), so that a denoising batch may hold rollouts at different steps and chunks.
What is constant is computed once: image tokens per rollout, keys and values of all cross-attention per chunk (not per step and frame),
time embeddings per chunk for all steps, sampler tables per simulator. Memory stays in latent space: only new maps are encoded, only
new frames are decoded; the maps of memory frames are multiplied by zero in this model, so they are not made at all.
Source: EnerVerse-AC (arXiv:2505.09723) and its public code's order of work; every deviation from it is a switch in SimulatorConfig.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import nn

from worldenv import noise as counter_noise
from worldenv.config import SimulatorConfig
from worldenv.kernels.ddim_step import ddim_step
from worldenv.kernels.frames import for_vae, to_frames
from worldenv.nouns import ActionMap
from worldenv.simulator.conditioning import ClipTower, Resampler
from worldenv.simulator.graphs import DECODER, ENCODER, UNET, graphs
from worldenv.simulator.schedule import Sampler, latent_scales
from worldenv.simulator.unet import KeysValues, UNet
from worldenv.simulator.vae import VAE, Posterior

DELTA_DIM = 14
_GRIPPERS = (6, 13)
_CPU_PIXELS, _GPU_PIXELS, _MOST_PICTURES = 2**17, 2**22, 32
"""What the autoencoder is given at once; no more pictures than its engines take (engines/simulator_vae.py)."""
_NETWORK = 30
"""Number of this network under `Stream.WEIGHTS`."""


@dataclass(frozen=True)
class Memory:
    """What is remembered of one rollout between two chunks."""

    history: torch.Tensor
    """(n, z, h, w) scaled latents: the first frame as often as there are memory frames, then every imagined frame."""
    tokens: torch.Tensor | None
    """(queries, context) image tokens of the first frame; None where they are to be made anew from its decoded latent."""
    deviation: torch.Tensor | None = None
    """(z, h, w) scaled deviation of the first frame's posterior while no sample of it has been drawn; `history` then holds its mean."""


@dataclass(frozen=True)
class Condition:
    """What one chunk is denoised under; constant over the steps. T = memory + chunk frames."""

    memory: torch.Tensor
    """(B, z, M, h, w) scaled latents of the memory frames."""
    fixed: torch.Tensor
    """(B, 2 z + 7, T, h, w): condition latent, mask, map latent, ray direction, ray origin."""
    image: torch.Tensor
    """(B, L, context) image tokens."""
    action: torch.Tensor
    """(B, A, context) action tokens."""
    pairs: tuple[KeysValues, ...]
    """Keys and values of `image` and `action` in each attention block."""


@dataclass(frozen=True)
class Denoising:
    """Chunks that are being denoised, each at a step of its own."""

    condition: Condition
    unconditional: Condition | None
    """The other branch of guidance, where that is on."""
    noise: torch.Tensor
    """(B, draws, z, K, h, w): initial, then one per step where eta > 0."""
    rows: torch.Tensor
    """(1 + steps, .) from `UNet.time_rows`: of memory frames, then of the sampler's levels."""
    scales: torch.Tensor
    """(steps,) float32: what memory is multiplied by at each level."""
    done: tuple[int, ...]
    """Steps that each has been through."""
    noisy: torch.Tensor
    """(B, z, M + K, h, w): memory at its level, then the chunk."""
    x_0: torch.Tensor
    """(B, z, K, h, w): what the last step foresaw."""


@dataclass(frozen=True)
class Chunk:
    """One rollout's chunk under way: a row of the batch that made it."""

    memory: Memory
    batch: Denoising
    row: int


def _stacked(rows: Sequence[tuple[Condition, int]]) -> Condition:
    def pick(name: str) -> torch.Tensor:
        return torch.stack([getattr(condition, name)[row] for condition, row in rows])

    pairs = tuple(
        KeysValues(*(torch.stack([condition.pairs[block][part][row] for condition, row in rows]) for part in range(2)))
        for block in range(len(rows[0][0].pairs))
    )
    return Condition(pick("memory"), pick("fixed"), pick("image"), pick("action"), pairs)


def _gathered(chunks: Sequence[Chunk]) -> Denoising:
    """`chunks` as one batch. Nothing is copied where they are the rows of one batch in order; behind its last row one may be repeated, as padding."""
    first = chunks[0].batch
    together = all(chunk.batch is first and (chunk.row == i or (i > 0 and chunk is chunks[i - 1])) for i, chunk in enumerate(chunks))
    if together and len(chunks) == len(first.done):
        return first
    from_ = [(chunk.batch, chunk.row) for chunk in chunks]
    others = [(batch.unconditional, row) for batch, row in from_ if batch.unconditional is not None]
    noise, noisy, x_0 = (torch.stack([getattr(batch, name)[row] for batch, row in from_]) for name in ("noise", "noisy", "x_0"))
    return Denoising(
        _stacked([(batch.condition, row) for batch, row in from_]), _stacked(others) if others else None, noise,
        first.rows, first.scales, tuple(batch.done[row] for batch, row in from_), noisy, x_0,
    )  # fmt: skip


def memory_indices(frames: int, memory: int) -> list[int]:
    """Which of `frames` frames so far are remembered: `memory` - 1 evenly spread from the first on, then the last."""
    return [frames * k // (memory - 1) for k in range(memory - 1)] + [frames - 1]


def chunk_deltas(deltas: torch.Tensor, number: int, config: SimulatorConfig) -> torch.Tensor:
    """What chunk `number` is told of `deltas` (B, N, 14), one row per step of a path that is known to its end: (B, rows, 14).

    "aligned": its K rows. "published": from the second chunk on, the released sampler's rows, one too many and shifted by memory - 1;
    fewer where the path ends with the chunk. Either is filled up to K rows with zeros where the path ends inside the chunk.
    """
    first, chunk = number * config.chunk, config.chunk
    shift = config.memory - 1 if config.delta_rows == "published" and number else 0
    rows = deltas[:, first + shift : first + chunk + shift + (1 if shift else 0)]
    if first + chunk > deltas.shape[1] and rows.shape[1] < chunk:
        rows = F.pad(rows, (0, 0, 0, chunk - rows.shape[1]))
    return rows


class Evac(nn.Module):
    """`Simulator` of the contract. All weights, and three things that are measured with them: latent scale and statistics of deltas."""

    latent_scale: torch.Tensor
    delta_mean: torch.Tensor
    delta_std: torch.Tensor

    def __init__(self, config: SimulatorConfig) -> None:
        super().__init__()
        self.config = config
        latent, context = config.vae.z_channels, config.unet.context_dim
        self.unet = UNet(config.unet, latent)
        self.vae = VAE(config.vae)
        self.runs: dict[str, Callable[..., Any]] = dict(graphs(self.unet, self.vae, config.memory))
        """What runs the networks of a rollout, by name (`simulator.graphs`): in the beginning these modules themselves. Training does not call it."""
        self.clip = ClipTower(config.clip)
        self.image_resampler = Resampler(config.image_resampler, config.clip.width, context)
        self.action_resampler = Resampler(config.action_resampler, DELTA_DIM, context)
        self.register_buffer("latent_scale", torch.tensor(config.latent_scale))
        self.register_buffer("delta_mean", torch.zeros(DELTA_DIM))
        self.register_buffer("delta_std", torch.ones(DELTA_DIM))
        self.sampler = Sampler.ddim(config.denoise_steps, config.eta, config.dynamic_rescale)

    @classmethod
    def initialised(cls, config: SimulatorConfig, seed: int) -> Self:
        """A simulator with random weights, a function of `seed` alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(counter_noise.torch_seed(seed, counter_noise.Stream.WEIGHTS, _NETWORK))
            return cls(config)

    @classmethod
    def unfilled(cls, config: SimulatorConfig, device: torch.device | str = "cpu") -> Self:
        """A simulator whose weights are to be filled from a file: no time is spent on random ones. Buffers are as `config` has them."""
        with torch.device("meta"):
            simulator = cls(config)
        simulator.to_empty(device=device)
        simulator.latent_scale.fill_(config.latent_scale)
        simulator.delta_mean.zero_()
        simulator.delta_std.fill_(1.0)
        return simulator

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, which may be bfloat16. What is remembered, sampled and scaled stays in the type of `latent_scale`."""
        return next(self.unet.parameters()).dtype

    @property
    def chunk(self) -> int:
        """See `Simulator`."""
        return self.config.chunk

    def noise_shape(self) -> tuple[int, ...]:
        """See `Simulator`: (draws, z, K, h, w).

        Draws: initial; each step, where eta > 0; then the maps' posterior and the first frame's, where they are sampled.
        """
        draws = 1 + (self.config.denoise_steps if self.config.eta > 0 else 0) + (2 if self.config.posterior == "sample" else 0)
        return draws, self.config.vae.z_channels, self.config.chunk, *self.config.latent

    def sample_with(self, denoise_steps: int | None = None, eta: float | None = None, guidance: float | None = None) -> None:
        """Change how rollouts are sampled; None leaves a setting as it is. Raises ValueError where the numbers make no sampler."""
        asked = {"denoise_steps": denoise_steps, "eta": eta, "guidance": guidance}
        config = replace(self.config, **{name: value for name, value in asked.items() if value is not None})  # type: ignore[arg-type]
        self.sampler = Sampler.ddim(config.denoise_steps, config.eta, config.dynamic_rescale)
        self.config = config

    # what pictures, maps and motion are turned into

    def fit(self, pictures: torch.Tensor) -> torch.Tensor:
        """(N, 3, height, width) in [-1, 1] of `pictures` (N, 3, H, W) in [0, 1], resized (bilinear, antialiased) where they are of another size."""
        size = (self.config.height, self.config.width)
        if pictures.shape[-2:] != size:
            pictures = F.interpolate(pictures, size, mode="bilinear", antialias=True)
        return pictures * 2.0 - 1.0

    def picture(self, frames: torch.Tensor) -> torch.Tensor:
        """(N, 3, height, width) in [-1, 1] of `frames` (N, H, W, 3) uint8."""
        return for_vae(frames, (self.config.height, self.config.width), self.latent_scale.dtype)

    def encode(self, pictures: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Scaled latents (N, z, h, w) of `pictures` (N, 3, H, W) in [-1, 1]: the posterior's mean, or its sample at `noise` like the result."""
        posterior = self._posterior(pictures)
        return (posterior.mean if noise is None else posterior.sample(noise)) * self.latent_scale

    def _posterior(self, pictures: torch.Tensor) -> Posterior:
        """Of `pictures` (N, 3, H, W) in [-1, 1], so many at once as the autoencoder takes."""
        parts = [self.runs[ENCODER](some.to(self.dtype)) for some in torch.split(pictures, self._pictures_per_call(pictures.device))]
        mean, logvar = (torch.cat(some).to(self.latent_scale.dtype) for some in zip(*parts, strict=True))
        return Posterior(mean, logvar)

    def _pictures_per_call(self, device: torch.device) -> int:
        """How many pictures the autoencoder takes at once: what fits a CPU's cache, or is enough to fill a GPU."""
        pixels = _CPU_PIXELS if device.type == "cpu" else _GPU_PIXELS
        return min(_MOST_PICTURES, max(1, pixels // (self.config.height * self.config.width)))

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) in about [-1, 1], not clamped, of scaled `latents` (N, z, h, w)."""
        parts = torch.split(latents / self.latent_scale, self._pictures_per_call(latents.device))
        return torch.cat([self.runs[DECODER](some.to(self.dtype)).to(self.latent_scale.dtype) for some in parts])

    def image_tokens(self, pictures: torch.Tensor) -> torch.Tensor:
        """(N, queries, context) of `pictures` (N, 3, H, W) in [-1, 1]."""
        tokens: torch.Tensor = self.image_resampler(self.clip(pictures.to(self.dtype)))
        return tokens

    def action_tokens(self, deltas: torch.Tensor) -> torch.Tensor:
        """(B, queries, context) of normalised `deltas` (B, rows, 14), any number of rows."""
        tokens: torch.Tensor = self.action_resampler(deltas.to(self.dtype))
        return tokens

    def normalise(self, deltas: torch.Tensor) -> torch.Tensor:
        """`deltas` (..., 14) less their mean, over their deviation, both times `delta_stride`; the grippers' openings as they are."""
        moves = torch.ones(DELTA_DIM, dtype=torch.bool, device=deltas.device)
        moves[list(_GRIPPERS)] = False
        stride = self.config.delta_stride
        return torch.where(moves, (deltas - stride * self.delta_mean) / (stride * self.delta_std), deltas)

    # one chunk

    def condition(
        self,
        memory: torch.Tensor,
        maps: torch.Tensor,
        rays: torch.Tensor,
        image: torch.Tensor,
        action: torch.Tensor,
        seen: torch.Tensor | None = None,
    ) -> Condition:
        """What a chunk is denoised under.

        `memory` (B, z, M, h, w) and `maps` (B, z, K, h, w) scaled latents; `rays` (B, 6, h, w), or (B, 6, M + K, h, w) of a camera
        that moves; `image`, `action` tokens. `seen` (B,) bool: where False, the chunk's frames get no condition latent and mask 0
        (as in the unconditional branch of guidance, and in training).
        """
        batch, _, remembered, height, width = memory.shape
        chunk = maps.shape[2]
        rays = rays if rays.dim() == 5 else rays[:, :, None].expand(-1, -1, remembered + chunk, -1, -1)
        shown = memory.new_ones(batch) if seen is None else seen.to(memory.dtype)
        shown = shown.view(batch, 1, 1, 1, 1).expand(-1, 1, chunk, height, width)
        latent = torch.cat([memory, memory[:, :, -1:] * shown], dim=2)
        mask = torch.cat([memory.new_ones(batch, 1, remembered, height, width), shown], dim=2)
        maps = torch.cat([torch.zeros_like(memory), maps if self.config.action_maps else torch.zeros_like(maps)], dim=2)
        fixed = torch.cat([latent, mask, maps, rays.to(memory.dtype)], dim=1)
        return Condition(memory, fixed, image, action, tuple(self.unet.keys_values(image, action)))

    def _unconditional(self, condition: Condition) -> Condition:
        """The other branch of guidance: tokens of a grey picture, nothing seen; action tokens, maps and rays are kept."""
        grey = torch.zeros(1, 3, self.config.height, self.config.width, device=condition.memory.device, dtype=condition.memory.dtype)
        image = self.image_tokens(grey).expand(len(condition.memory), -1, -1)
        remembered, channels = condition.memory.shape[2], condition.memory.shape[1] + 1
        fixed = condition.fixed.clone()
        fixed[:, :channels, remembered:] = 0.0
        return replace(condition, fixed=fixed, image=image, pairs=tuple(self.unet.keys_values(image, condition.action)))

    def denoise(self, condition: Condition, noise: torch.Tensor, unconditional: Condition | None = None) -> torch.Tensor:
        """Scaled latents (B, z, K, h, w) of the chunk.

        `noise` (B, draws, z, K, h, w): initial, then one per step where eta > 0. `unconditional` is the other branch of guidance
        (default: made from `condition` where guidance is on).
        """
        now = self._begun(condition, noise, unconditional)
        for _ in range(self.steps):
            now = self._stepped(now)
        return self._latents(now)

    def _begun(self, condition: Condition, noise: torch.Tensor, unconditional: Condition | None = None) -> Denoising:
        """Before the first step; arguments as in `denoise`."""
        config, sampler, device = self.config, self.sampler, condition.memory.device
        if config.guidance == 1.0:
            unconditional = None
        elif unconditional is None:
            unconditional = self._unconditional(condition)
        condition, unconditional = self._narrowed(condition), None if unconditional is None else self._narrowed(unconditional)
        levels = torch.cat([torch.zeros(1, dtype=torch.int64), torch.from_numpy(sampler.timesteps)]).to(device)
        rows = self.unet.time_rows(levels, torch.full_like(levels, config.fps_token), torch.full_like(levels, config.domain))
        scales = torch.from_numpy(latent_scales(config.scale_memory)[sampler.timesteps]).to(device, torch.float32)
        x = noise[:, 0].contiguous()
        return Denoising(condition, unconditional, noise, rows, scales, (0,) * len(x), torch.cat([condition.memory * scales[-1], x], dim=2), x)

    def _narrowed(self, condition: Condition) -> Condition:
        """With keys and values in the type that what runs the U-Net takes, so that they are not cast again at every step."""
        kind = getattr(self.runs[UNET], "dtype", None)
        if kind is None:
            return condition
        return replace(condition, pairs=tuple(KeysValues(*(one.to(kind) for one in pair)) for pair in condition.pairs))

    def _stepped(self, now: Denoising) -> Denoising:
        """After one more step of each."""
        config, condition = self.config, now.condition
        device, batch = now.noisy.device, len(now.done)
        at = [max(0, self.steps - 1 - done) for done in now.done]  # padding may be a row that is through
        index = torch.full((batch,), at[0], device=device) if len(set(at)) == 1 else torch.tensor(at, device=device)
        levels = now.rows[1 + index]
        run = self.runs[UNET]
        v = run(torch.cat([now.noisy, condition.fixed], dim=1).to(self.dtype), now.rows[:1], levels, *itertools.chain(*condition.pairs))
        other = None
        if now.unconditional is not None:
            given = torch.cat([now.noisy, now.unconditional.fixed], dim=1).to(self.dtype)
            other = run(given, now.rows[:1], levels, *itertools.chain(*now.unconditional.pairs))
        noisy, x_0 = ddim_step(
            now.noisy, v, other, condition.memory, self.sampler.table(device), now.scales, index, now.noise if config.eta > 0 else None,
            config.guidance, config.guidance_rescale,
        )  # fmt: skip
        return replace(now, done=tuple(done + 1 for done in now.done), noisy=noisy.contiguous(), x_0=x_0.contiguous())

    def _latents(self, now: Denoising) -> torch.Tensor:
        return now.x_0 if self.config.final == "pred_x0" else now.noisy[:, :, now.condition.memory.shape[2] :]

    # the contract

    @torch.no_grad()
    def begin(self, frame: torch.Tensor) -> list[Memory]:
        """See `Simulator`. Frames of another size than the simulator's are resized."""
        pictures = self.picture(frame)
        posterior, tokens = self._posterior(pictures), self.image_tokens(pictures)
        mean = posterior.mean * self.latent_scale
        deviation = torch.exp(0.5 * posterior.logvar) * self.latent_scale
        sampled = self.config.posterior == "sample"
        return [
            Memory(mean[i].expand(self.config.memory, -1, -1, -1), tokens[i], deviation[i] if sampled else None) for i in range(len(frame))
        ]

    @property
    def steps(self) -> int:
        """See `Simulator`."""
        return len(self.sampler)

    @torch.no_grad()
    def begin_chunk(self, memory: Sequence[Memory], action_map: ActionMap, noise: torch.Tensor) -> list[Chunk]:
        """See `Simulator`. Raises ValueError where the batch, the chunk or the noise do not fit."""
        batch, chunk = action_map.picture.shape[:2]
        if len(memory) != batch or chunk != self.chunk or tuple(noise.shape) != (batch, *self.noise_shape()):
            raise ValueError(
                f"imagine: {len(memory)} memories, action map {tuple(action_map.picture.shape)}, noise {tuple(noise.shape)}: "
                f"want B, (B, {self.chunk}, H, W, 3), (B, {', '.join(map(str, self.noise_shape()))})"
            )
        told = self.action_tokens(self.normalise(action_map.delta))
        return self._begin_chunk(memory, action_map.picture, action_map.rays, told, noise)

    @torch.no_grad()
    def step(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """See `Simulator`."""
        now = self._stepped(_gathered(chunks))
        return [Chunk(chunk.memory, now, i) for i, chunk in enumerate(chunks)]

    @torch.no_grad()
    def finish_chunk(self, chunks: Sequence[Chunk]) -> tuple[torch.Tensor, list[Memory]]:
        """See `Simulator`. Raises FloatingPointError where latents are not finite: their frames would be black, and a judge would score them."""
        latents = torch.stack([self._latents(chunk.batch)[chunk.row] for chunk in chunks]).transpose(1, 2)
        finite = torch.isfinite(latents).flatten(1).all(1)
        frames = self.frames(latents.flatten(0, 1))
        frames = frames.view(*latents.shape[:2], *frames.shape[1:])
        tokens = [chunk.batch.condition.image[chunk.row] for chunk in chunks]
        grown = [self._grown(chunk.memory, *one) for chunk, *one in zip(chunks, latents, tokens, strict=True)]
        if latents.is_meta:  # where operations are counted there are no numbers
            return frames, grown
        if not all(sound := finite.tolist()):  # asked last: a GPU is then waited for once all of the chunk is under way
            number = (len(chunks[sound.index(False)].memory.history) - self.config.memory) // self.chunk
            raise FloatingPointError(f"latents of chunk {number} are not finite; try another precision, and look at the checkpoint")
        return frames, grown

    def imagine(self, memory: Sequence[Memory], action_map: ActionMap, noise: torch.Tensor) -> tuple[torch.Tensor, list[Memory]]:
        """See `Simulator`. Raises ValueError as `begin_chunk`, FloatingPointError as `finish_chunk`."""
        return self._through(self.begin_chunk(memory, action_map, noise))

    def _through(self, chunks: list[Chunk]) -> tuple[torch.Tensor, list[Memory]]:
        for _ in range(self.steps):
            chunks = self.step(chunks)
        return self.finish_chunk(chunks)

    @torch.no_grad()
    def imagine_path(
        self,
        frame: torch.Tensor,
        maps: Callable[[int, int], torch.Tensor],
        rays: torch.Tensor,
        deltas: torch.Tensor,
        noise: Callable[[int], torch.Tensor],
    ) -> Iterator[torch.Tensor]:
        """What follows `frame` (H, W, 3) uint8 along a path that is known to its end, chunk by chunk: (K, H, W, 3) uint8, at its end fewer.

        `maps(first, end)` draws the action maps (end - first, H, W, 3) uint8 of these steps, asked for as they are needed; `rays` (6, h, w);
        `deltas` (N, 14) one row per step, not normalised; `noise(chunk)` *noise_shape(). A chunk that the path does not fill is given its
        last map again and deltas of 0, after normalisation (the released sampler's padding). Raises FloatingPointError as `finish_chunk`.
        """
        (memory,) = self.begin(frame[None])
        steps, told = len(deltas), self.normalise(deltas)[None]
        for number, first in enumerate(range(0, steps, self.chunk)):
            end = min(first + self.chunk, steps)
            drawn = maps(first, end)
            drawn = torch.cat([drawn, drawn[-1:].expand(self.chunk - len(drawn), -1, -1, -1)])
            tokens = self.action_tokens(chunk_deltas(told, number, self.config))
            frames, (memory,) = self._through(self._begin_chunk([memory], drawn[None], rays[None], tokens, noise(number)[None]))
            yield frames[0, : end - first]

    def _begin_chunk(
        self, memory: Sequence[Memory], picture: torch.Tensor, rays: torch.Tensor, action: torch.Tensor, noise: torch.Tensor
    ) -> list[Chunk]:
        """As `begin_chunk`, of action maps `picture` (B, K, H, W, 3) uint8, `rays` and `action` tokens."""
        batch, chunk = picture.shape[:2]
        sampled = self.config.posterior == "sample"
        memory = [self._drawn(one, noise[i, -1]) for i, one in enumerate(memory)]
        maps = self.encode(self.picture(picture.flatten(0, 1)), noise[:, -2].transpose(1, 2).flatten(0, 1) if sampled else None)
        remembered = torch.stack([one.history[memory_indices(len(one.history), self.config.memory)] for one in memory])
        condition = self.condition(
            remembered.transpose(1, 2).contiguous(),
            maps.view(batch, chunk, *maps.shape[1:]).transpose(1, 2),
            rays,
            self._first_tokens(memory),
            action,
        )
        now = self._begun(condition, noise)
        return [Chunk(one, now, i) for i, one in enumerate(memory)]

    def frames(self, latents: torch.Tensor) -> torch.Tensor:
        """(N, H, W, 3) uint8 of scaled `latents` (N, z, h, w), rounded to the nearest level."""
        return to_frames(self.decode(latents))

    @torch.no_grad()
    def reconstruct(self, frames: torch.Tensor) -> torch.Tensor:
        """`frames` (N, H, W, 3) uint8 as the autoencoder draws them: the best that any imagined frame can look."""
        return self.frames(self.encode(self.picture(frames)))

    def _drawn(self, memory: Memory, noise: torch.Tensor) -> Memory:
        """`memory` with its first frames drawn from the posterior, each at its own `noise` (z, K, h, w), where that is still to do."""
        if memory.deviation is None:
            return memory
        drawn = memory.history + memory.deviation * noise[:, : self.config.memory].transpose(0, 1)
        return replace(memory, history=drawn, deviation=None)

    def _first_tokens(self, memory: Sequence[Memory]) -> torch.Tensor:
        """Image tokens (B, queries, context) of the rollouts, those that are wanted anew made from the decoded first latent."""
        stale = [i for i, one in enumerate(memory) if one.tokens is None]
        tokens = [one.tokens for one in memory]
        if stale:
            decoded = self.decode(torch.stack([memory[i].history[0] for i in stale])).clamp(-1.0, 1.0)
            for i, made in zip(stale, self.image_tokens(decoded), strict=True):
                tokens[i] = made
        return torch.stack([one for one in tokens if one is not None])

    def _grown(self, memory: Memory, latents: torch.Tensor, tokens: torch.Tensor) -> Memory:
        """`memory` after a chunk of `latents` (K, z, h, w) that was told image `tokens`."""
        first = len(memory.history) == self.config.memory
        again = first and self.config.first_tokens == "decoded"
        return Memory(torch.cat([memory.history, latents]), None if again else tokens)

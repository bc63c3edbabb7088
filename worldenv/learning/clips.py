"""Stage world: episodes as the simulator learns from them, encoded once, and the training examples that are drawn from them.

An example's memory frames are those that a rollout would have: the first, n/3, 2n/3 and last of the n frames so far.

Published recipe (EnerVerse-AC, arXiv:2505.09723, and its training code; DynamiCrafter, arXiv:2310.12190): noise on the memory, later
frames noisier, at levels below a third; conditions dropped at random.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray

from worldenv import action_map, console, noise
from worldenv.config import WorldConfig
from worldenv.data.episode import Episode
from worldenv.kernels import philox
from worldenv.learning import processes
from worldenv.learning.optimizer import pieces
from worldenv.noise import Stream
from worldenv.nouns import Camera
from worldenv.robots.contract import Robot
from worldenv.simulator import schedule
from worldenv.simulator.evac import Evac, memory_indices

_LEAST_STD = 1e-4  # of a delta [m, rad]: dimensions that never move stay at 0
_LARGEST_ANGLE = 1.57  # of the memory's noise level: t = (1 - cos a) * 1000 / divisor
_DIVISORS = (3, 20)
ENCODED_TOGETHER = 8
"""Episodes whose pictures are in memory at once."""


def draw_maps(pose: NDArray[np.float64], gripper: NDArray[np.float64], camera: Camera, robot: Robot) -> torch.Tensor:
    """Action maps (N, H, W, 3) uint8 of one arm's `pose` (N, 7) and `gripper` (N,)."""
    return action_map.pictures(pose[:, None], gripper[:, None], camera, robot, robot.arms_at(camera.height)[-1:])


@dataclass(frozen=True)
class Clips:
    """Episodes as the simulator sees them in training, one after another; everything encoded once."""

    latents: torch.Tensor
    """(F, z, h, w) scaled latents of all frames."""
    maps: torch.Tensor
    """(F, z, h, w) scaled latents of the action map of each frame's state."""
    deltas: torch.Tensor
    """(F, 14) from the state before to each frame's; rows of first frames are 0. Not normalised."""
    first: torch.Tensor
    """(E, 3, H, W) in [-1, 1]: the first picture of each episode."""
    rays: torch.Tensor
    """(6, h, w)."""
    begins: NDArray[np.int64]
    """(E + 1,): episode e is frames begins[e] .. begins[e + 1] - 1."""

    def windows(self, chunk: int, aligned: bool) -> NDArray[np.int64]:
        """(N, 2): episode, and frame within it that a chunk of `chunk` frames can follow; `aligned`: only where a rollout's chunk does."""
        step = chunk if aligned else 1
        rows = [(e, s) for e, n in enumerate(np.diff(self.begins)) for s in range(0, int(n) - chunk, step)]
        if not rows:
            raise ValueError(f"no episode has {chunk} frames after its first: record longer ones, or lower simulator.chunk")
        return np.array(rows, dtype=np.int64)


@torch.no_grad()
def encode(simulator: Evac, episodes: Sequence[Episode], camera: Camera, robot: Robot) -> Clips:
    """`episodes` as clips; the autoencoder and its scale are final from here on. Of several processes each encodes a share, for all."""
    device = simulator.latent_scale.device
    arms = robot.arms_at(camera.height)[-1:]
    deltas, first = [], []
    for episode in episodes:
        moved = action_map.deltas(episode.pose[:, None], episode.gripper[:, None], arms)
        deltas.append(np.concatenate([np.zeros((1, moved.shape[1])), moved]))
        first.append(episode.frame[0].copy())  # not a view, which keeps the others
    begins = np.cumsum([0, *map(len, deltas)])
    latents, maps = torch.zeros(2, begins[-1], simulator.config.vae.z_channels, *simulator.config.latent, device=device)
    for start in (bar := console.track(0, -(-len(episodes) // ENCODED_TOGETHER), "encode")):
        if start % processes.count() != processes.rank():
            continue
        some = slice(start * ENCODED_TOGETHER, (start + 1) * ENCODED_TOGETHER)
        frames, pose, gripper = map(np.concatenate, zip(*((e.frame, e.pose, e.gripper) for e in episodes[some]), strict=True))
        at = slice(begins[some.start], begins[some.start] + len(frames))
        latents[at] = simulator.encode(simulator.picture(torch.from_numpy(frames).to(device)))
        maps[at] = simulator.encode(simulator.picture(draw_maps(pose, gripper, camera, robot).to(device)))
        bar.note(frames=at.stop)
    processes.sum_up((latents, maps))  # all but one have zeros there
    return Clips(
        latents=latents,
        maps=maps,
        deltas=torch.from_numpy(np.concatenate(deltas).astype(np.float32)).to(device),
        first=simulator.picture(torch.from_numpy(np.stack(first)).to(device)),
        rays=action_map.rays(camera, simulator.config.latent).to(device),
        begins=begins,
    )


def set_delta_statistics(simulator: Evac, clips: Clips) -> None:
    """Mean and deviation of the motion's deltas, of all frames but first ones; the gripper's opening is not normalised."""
    inner = np.ones(len(clips.deltas), dtype=bool)
    inner[clips.begins[:-1]] = False
    moved = clips.deltas[torch.from_numpy(inner)]
    simulator.delta_mean.copy_(moved.mean(0))
    simulator.delta_std.copy_(moved.std(0).clamp_min(_LEAST_STD))


@dataclass(frozen=True)
class Batch:
    """B training examples; every random number in it is a function of (seed, step)."""

    target: torch.Tensor
    """(B, z, K, h, w) scaled latents of the chunk."""
    memory: torch.Tensor
    """(B, z, M, h, w) scaled latents of the memory frames, with the noise of training on them."""
    maps: torch.Tensor
    """(B, z, K, h, w)."""
    first: torch.Tensor
    """(B, 3, H, W): first pictures, grey where dropped."""
    deltas: torch.Tensor
    """(B, K, 14) normalised, 0 where dropped."""
    seen: torch.Tensor
    """(B,) bool: whether the chunk's frames get a condition latent."""
    level: torch.Tensor
    """(B,) int64 noise levels of the chunk, 0 .. 999."""
    noise: torch.Tensor
    """(B, z, K, h, w) standard normal."""

    def rows(self, rank: int, count: int) -> Batch:
        """Those of process `rank` of `count`: every count-th example, from its own number on."""
        return self._of(slice(rank, None, count))

    def pieces(self, most: int) -> Iterator[tuple[float, Batch]]:
        """All of it, at most `most` examples at a time, each piece with its share of the batch."""
        return ((share, self._of(part)) for share, part in pieces(len(self.target), most))

    def _of(self, examples: slice) -> Batch:
        return Batch(**{field.name: getattr(self, field.name)[examples] for field in fields(self)})


def clip_weights(windows: NDArray[np.int64], chunk: int, config: WorldConfig, progress: float) -> NDArray[np.float64]:
    """(N,) chances, summing to 1, of drawing each of `windows` (N, 2) at `progress` 0 .. 1 through the stage.

    Episode e of n_e clips has the chance n_e^p / sum, a clip at frame s of it (1 + s / chunk)^q / sum over e; p and q go linearly from
    `curriculum_begin` to `curriculum_end`.
    """
    p, q = ((1.0 - progress) * begin + progress * end for begin, end in zip(config.curriculum_begin, config.curriculum_end, strict=True))
    episode, at = windows[:, 0], (1.0 + windows[:, 1] / chunk) ** q
    clips = np.bincount(episode).astype(np.float64)
    ours = np.power(clips, p, out=np.zeros_like(clips), where=clips > 0)
    weight: NDArray[np.float64] = (ours / ours.sum())[episode] * at / np.bincount(episode, weights=at)[episode]
    return weight


def draw_windows(windows: NDArray[np.int64], chunk: int, config: WorldConfig, seed: int, draw: int, count: int, progress: float) -> NDArray[np.int64]:
    """(count, 2) of `windows` (N, 2), with replacement, as `config.sampling` has it; a function of (seed, draw, progress)."""
    if config.sampling == "uniform":
        return windows[noise.integers(seed, Stream.WORLD, draw, len(windows), count)]
    reached = np.cumsum(clip_weights(windows, chunk, config, progress))
    chosen = np.searchsorted(reached, reached[-1] * noise.uniform(seed, 0, 1, draw, Stream.WORLD, (count,)), side="right")
    drawn: NDArray[np.int64] = windows[np.minimum(chosen, len(windows) - 1)]
    return drawn


def _levels(simulator: Evac, config: WorldConfig, seed: int, step: int, count: int) -> NDArray[np.int64]:
    """(count,) noise levels: some of those that the sampler visits, the others uniform."""
    draw = noise.uniform(seed, 0, 0, step, Stream.WORLD_TIME, (3, count))
    visited = simulator.sampler.timesteps
    uniform = (draw[1] * schedule.LEVELS).astype(np.int64)
    levels: NDArray[np.int64] = np.where(draw[0] < config.sampled_levels, visited[(draw[2] * len(visited)).astype(np.int64)], uniform)
    return levels


def _normal(seed: int, draw: int, step: int, stream: Stream, like: torch.Tensor) -> torch.Tensor:
    """Standard normals like `like`, made on its device: on the host they would take as long as a step of a small network."""
    return philox.normal(philox.Draw.of(seed, 0, draw, step, stream, like.device), tuple(like.shape))[0].to(like.dtype)


def _noisy_memory(memory: torch.Tensor, seed: int, step: int) -> torch.Tensor:
    """Memory latents (B, z, M, h, w) with noise, half of them at level 0, later frames noisier."""
    batch, frames = memory.shape[0], memory.shape[2]
    divisor = _DIVISORS[0] + int(noise.integers(seed, Stream.WORLD_MEMORY, step, _DIVISORS[1] - _DIVISORS[0] + 1, 1)[0])
    draw = noise.uniform(seed, 0, 1, step, Stream.WORLD_MEMORY, (batch, frames))
    angle = np.clip((2.0 * draw - 1.0) * _LARGEST_ANGLE, 0.0, None)
    level = np.sort(((1.0 - np.cos(angle)) * schedule.LEVELS / divisor).astype(np.int64), axis=1)
    kept = torch.from_numpy(schedule.alphas_cumprod()[level]).to(memory)[:, None, :, None, None]
    # at level 0 the published process has a little noise already; a memory that is not noised stays as it is
    kept = torch.where(torch.from_numpy(level).to(memory.device)[:, None, :, None, None] == 0, torch.ones_like(kept), kept)
    given = _normal(seed, 2, step, Stream.WORLD_MEMORY, memory)
    return kept.sqrt() * memory + (1.0 - kept).sqrt() * given


def example(simulator: Evac, clips: Clips, windows: NDArray[np.int64], config: WorldConfig, seed: int, step: int, training: bool = True) -> Batch:
    """The examples that begin at `windows` (B, 2), with the random numbers of `step`; without drops and memory noise unless `training`."""
    memory, chunk, count = simulator.config.memory, simulator.config.chunk, len(windows)
    device = clips.latents.device
    begin = clips.begins[windows[:, 0]]
    # As in a rollout: the history begins with the first frame as often as there are memory frames, then come the frames up to the window.
    at = np.stack([[max(i - memory + 1, 0) for i in memory_indices(memory + int(s), memory)] for _, s in windows])
    past = clips.latents[torch.from_numpy(begin[:, None] + at)].transpose(1, 2)
    coming = torch.from_numpy((begin + windows[:, 1])[:, None] + np.arange(1, chunk + 1))
    target, maps = (of[coming].transpose(1, 2) for of in (clips.latents, clips.maps))
    deltas, first = simulator.normalise(clips.deltas[coming]), clips.first[torch.from_numpy(windows[:, 0])]
    seen = torch.ones(count, dtype=torch.bool, device=device)
    if training:
        p, r = config.dropout, torch.from_numpy(noise.uniform(seed, 0, 0, step, Stream.WORLD_DROPOUT, (count,))).to(device)

        def within(*ranges: tuple[float, float]) -> torch.Tensor:
            return torch.stack([(r >= low * p) & (r < high * p) for low, high in ranges]).any(0)

        deltas = torch.where(within((0.0, 2.0))[:, None, None], 0.0, deltas)
        first = torch.where(within((1.0, 3.0))[:, None, None, None], 0.0, first)
        maps = torch.where(within((0.5, 1.5))[:, None, None, None, None], 0.0, maps)
        seen = ~within((0.0, 0.5), (1.0, 1.5), (2.5, 3.5))
        past = _noisy_memory(past, seed, step) if config.memory_noise else past
    given = _normal(seed, 0, step, Stream.WORLD_NOISE, target)
    level = torch.from_numpy(_levels(simulator, config, seed, step, count)).to(device)
    return Batch(target, past, maps, first, deltas, seen, level, given)

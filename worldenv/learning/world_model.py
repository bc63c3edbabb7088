"""Stage world: the autoencoder, then the simulator, learn from episodes how the world looks and how it moves.

The autoencoder learns frames and action maps, is frozen, and every episode is encoded once. The simulator learns v at the chunk's frames
(mean squared error), with memory frames as a rollout would have them: the first, n/3, 2n/3 and last of the n frames so far.

Published recipe (EnerVerse-AC, arXiv:2505.09723, and its training code; DynamiCrafter, arXiv:2310.12190): noise on the memory, later
frames noisier, at levels below a third; conditions dropped at random; AdamW; autoencoder, CLIP tower and action resampler frozen. A small
simulator begins from random weights, so by default CLIP tower and both resamplers are trained with the U-Net; `WorldConfig.initial` begins
from published weights and `frozen` says what stays. Averaged weights (EMA) are kept, those of the best held-out loss.

Several processes (worldenv.distributed) train one simulator: each takes its rows of the very batch that one process would take, and gradients
are averaged, so the number of processes changes results by rounding and the network's own dropout masks only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from worldenv import action_map, console, noise
from worldenv.checkpoint import Savepoint
from worldenv.config import SimulatorConfig, WorldConfig
from worldenv.data.episode import Episode
from worldenv.kernels import philox
from worldenv.learning import processes
from worldenv.learning.finite import finite
from worldenv.learning.sft import one_cycle
from worldenv.noise import Stream
from worldenv.nouns import Camera
from worldenv.robots.contract import Robot
from worldenv.simulator import schedule
from worldenv.simulator.evac import Evac, memory_indices
from worldenv.simulator.weights import begin_from, fill

_FOREGROUND = 0.15  # a pixel differs from the median picture by more than this [of full range]
_MEDIAN_FRAMES = 256
_LEAST_STD = 1e-4  # of a delta [m, rad]: dimensions that never move stay at 0
_LARGEST_ANGLE = 1.57  # of the memory's noise level: t = (1 - cos a) * 1000 / divisor
_DIVISORS = (3, 20)
_ENCODED_TOGETHER = 8  # episodes
_HELD_OUT_STEP = 2**31  # the held-out batch's place among optimiser steps: no training step has it

Frames = NDArray[np.uint8]


def _draw_maps(pose: NDArray[np.float64], gripper: NDArray[np.float64], camera: Camera, robot: Robot) -> torch.Tensor:
    """Action maps (N, H, W, 3) uint8 of one arm's `pose` (N, 7) and `gripper` (N,)."""
    return action_map.pictures(pose[:, None], gripper[:, None], camera, robot, robot.arms_at(camera.height)[-1:])


def _restore(optimizer: torch.optim.Optimizer, kept: dict[str, Any]) -> None:
    """Load an optimizer's kept state, each moment laid out in memory as its parameter: the fused step walks both side by side.

    Files hold plain layouts, convolution weights are channels-last.
    """
    optimizer.load_state_dict(kept)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for name, value in optimizer.state[parameter].items():
                if value.shape == parameter.shape:
                    optimizer.state[parameter][name] = torch.empty_like(parameter).copy_(value)


# the autoencoder


def median_picture(episodes: Sequence[Episode]) -> torch.Tensor:
    """(H, W, 3) float32 in [0, 1]: what stands still, the median of frames spread over `episodes`."""
    frames = np.concatenate([episode.frame for episode in episodes[:: max(1, len(episodes) // _MEDIAN_FRAMES)]])
    spread = frames[:: max(1, len(frames) // _MEDIAN_FRAMES)]
    return torch.from_numpy(np.median(spread, axis=0).astype(np.float32) / 255.0)


def picture_loss(drawn: torch.Tensor, true: torch.Tensor, still: torch.Tensor, foreground: float) -> torch.Tensor:
    """Mean of |d| + d^2 over `drawn`, `true` (N, 3, H, W) in [-1, 1]; pixels of `true` that differ from `still` (like it) weigh `foreground`."""
    moved = ((true - still).abs() > 2.0 * _FOREGROUND).any(dim=1, keepdim=True)
    weight = 1.0 + (foreground - 1.0) * moved.to(true.dtype)
    difference = (drawn - true).abs()
    return ((difference + difference**2) * weight).mean()


def train_vae(
    simulator: Evac, episodes: Sequence[Episode], camera: Camera, robot: Robot, config: WorldConfig, seed: int, savepoint: Savepoint
) -> dict[str, Any]:
    """Train the autoencoder of `simulator` in place on frames and action maps, then measure its latents' scale.

    A killed stage goes on from `savepoint`, to the same bits. Returns JSON-ready metrics: `loss` (mean of the last tenth), `kl` [nats
    per latent value], `latent_scale`. FloatingPointError where the loss is not finite.
    """
    network, device = simulator.vae, simulator.latent_scale.device
    frames = np.concatenate([episode.frame for episode in episodes])
    pose = np.concatenate([episode.pose for episode in episodes])
    gripper = np.concatenate([episode.gripper for episode in episodes])
    maps = round(config.map_share * config.vae_batch)
    still = simulator.fit(median_picture(episodes).permute(2, 0, 1)[None].to(device))
    blank = torch.full_like(still, robot.background / 127.5 - 1.0)
    still = torch.cat([still.expand(config.vae_batch - maps, -1, -1, -1), blank.expand(maps, -1, -1, -1)])
    shape = (config.vae_batch, simulator.config.vae.z_channels, *simulator.config.latent)
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.vae_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    begin, losses, divergence = 0, list[float](), 0.0
    if (kept := savepoint.load()) is not None:
        begin, losses, divergence = kept["step"], kept["losses"], kept["kl"]
        fill(network, kept["network"], "savepoint of the autoencoder")
        _restore(optimizer, kept["optimizer"])

    def keep(step: int) -> None:
        kept = {"step": step, "losses": losses, "kl": divergence, "network": network.state_dict(), "optimizer": optimizer.state_dict()}
        savepoint.save(kept)

    network.train()
    for step in (bar := console.track(begin, config.vae_steps, "autoencoder")):
        if savepoint.due():
            keep(step)
        chosen = noise.integers(seed, Stream.VAE, step, len(frames), config.vae_batch)
        seen, drawn = chosen[maps:], chosen[:maps]
        pictures = torch.from_numpy(frames[seen]).to(device)
        if maps:
            pictures = torch.cat([pictures, _draw_maps(pose[drawn], gripper[drawn], camera, robot).to(device)])
        pictures = simulator.picture(pictures)
        posterior = network.encode(pictures)
        given = torch.from_numpy(noise.normal(seed, 0, 0, step, Stream.VAE_NOISE, shape)).to(device)
        kl = posterior.kl().mean() / math.prod(shape[1:])
        loss = picture_loss(network.decode(posterior.sample(given)), pictures, still, config.foreground_weight) + config.vae_kl * kl
        losses.append(finite(loss, "autoencoder", step, "world.vae_lr"))
        divergence = float(kl.detach())
        for group in optimizer.param_groups:
            group["lr"] = one_cycle(step, config.vae_steps, config.vae_lr)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(network.parameters(), config.grad_clip)
        optimizer.step()
        bar.note(loss=losses[-1])
    network.eval()
    if begin < config.vae_steps:
        keep(config.vae_steps)
    simulator.latent_scale.copy_(torch.tensor(1.0 / latent_std(simulator, episodes)))
    last = losses[-max(1, len(losses) // 10) :]
    return {"loss": float(np.mean(last)), "kl": divergence, "latent_scale": float(simulator.latent_scale), "steps": config.vae_steps}


@torch.no_grad()
def latent_std(simulator: Evac, episodes: Sequence[Episode]) -> float:
    """Standard deviation of all values of unscaled latents, of frames spread over `episodes`."""
    frames = np.concatenate([episode.frame[::8] for episode in episodes])
    pictures = simulator.picture(torch.from_numpy(frames[:: max(1, len(frames) // _MEDIAN_FRAMES)]).to(simulator.latent_scale.device))
    latents = simulator.encode(pictures) / simulator.latent_scale
    return float(latents.std())


# the simulator


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
    begins = np.concatenate([[0], np.cumsum([len(episode.frame) for episode in episodes])])
    latents, maps = torch.zeros(2, begins[-1], simulator.config.vae.z_channels, *simulator.config.latent, device=device)
    deltas = []
    for start in (bar := console.track(0, -(-len(episodes) // _ENCODED_TOGETHER), "encode")):
        some = episodes[start * _ENCODED_TOGETHER : (start + 1) * _ENCODED_TOGETHER]
        for episode in some:
            moved = action_map.deltas(episode.pose[:, None], episode.gripper[:, None], arms)
            deltas.append(np.concatenate([np.zeros((1, moved.shape[1])), moved]))
        if start % processes.count() != processes.rank():
            continue
        frames, pose, gripper = (np.concatenate([getattr(e, name) for e in some]) for name in ("frame", "pose", "gripper"))
        at = slice(begins[start * _ENCODED_TOGETHER], begins[start * _ENCODED_TOGETHER] + len(frames))
        latents[at] = simulator.encode(simulator.picture(torch.from_numpy(frames).to(device)))
        maps[at] = simulator.encode(simulator.picture(_draw_maps(pose, gripper, camera, robot).to(device)))
        bar.note(frames=at.stop)
    processes.sum_up((latents, maps))  # all but one have zeros there
    return Clips(
        latents=latents,
        maps=maps,
        deltas=torch.from_numpy(np.concatenate(deltas).astype(np.float32)).to(device),
        first=simulator.picture(torch.from_numpy(np.stack([episode.frame[0] for episode in episodes])).to(device)),
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
        return Batch(**{field.name: getattr(self, field.name)[rank::count] for field in fields(self)})


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


def draw_windows(
    windows: NDArray[np.int64], chunk: int, config: WorldConfig, seed: int, draw: int, count: int, progress: float
) -> NDArray[np.int64]:
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


def v_loss(simulator: Evac, batch: Batch, rays: torch.Tensor) -> torch.Tensor:
    """Mean squared error of v over the chunk's frames. With dynamic rescale, clean latents, memory's too, are scaled by their level."""
    config = simulator.config

    def at_level(table: NDArray[np.float64]) -> torch.Tensor:
        return torch.from_numpy(table).to(batch.target)[batch.level].view(-1, 1, 1, 1, 1)

    alphas = schedule.alphas_cumprod()
    signal, rest = at_level(np.sqrt(alphas)), at_level(np.sqrt(1.0 - alphas))
    scale = at_level(schedule.latent_scales(config.dynamic_rescale))
    clean = batch.target * scale
    noisy, v = signal * clean + rest * batch.noise, signal * batch.noise - rest * clean
    condition = simulator.condition(
        batch.memory,
        batch.maps,
        rays.expand(len(batch.target), -1, -1, -1),
        simulator.image_tokens(batch.first),
        simulator.action_tokens(batch.deltas),
        batch.seen,
    )
    remembered = batch.memory.shape[2]
    x = torch.cat([torch.cat([batch.memory * scale, noisy], dim=2), condition.fixed], dim=1)
    count = torch.ones_like(batch.level)
    predicted = simulator.unet(x, batch.level, condition.image, condition.action, config.fps_token * count, config.domain * count, remembered)
    return torch.nn.functional.mse_loss(predicted[:, :, remembered:], v)


class Objective(nn.Module):
    """`v_loss` of one simulator as a module, in the precision of the settings: what several processes wrap."""

    def __init__(self, simulator: Evac, config: WorldConfig) -> None:
        super().__init__()
        self.simulator, self._bfloat16 = simulator, config.precision == "bfloat16"

    def forward(self, batch: Batch, rays: torch.Tensor) -> torch.Tensor:
        """The scalar loss of `batch`."""
        with torch.autocast(rays.device.type, torch.bfloat16, enabled=self._bfloat16):
            return v_loss(self.simulator, batch, rays)


def train_simulator(
    simulator: Evac, clips: Clips, held_out: Clips, config: WorldConfig, seed: int, savepoint: Savepoint
) -> dict[str, Any]:
    """Train everything of `simulator` but `config.frozen`, in place; it ends with the averaged weights of the best held-out loss.

    A killed stage goes on from `savepoint`, to the same bits. Returns JSON-ready metrics: `steps` taken, `loss` (mean of the last tenth),
    `held_out` [[step, loss]], `best_step`. FloatingPointError where the loss is not finite; ValueError where the batch cannot be divided
    among the processes.
    """
    rank, count = processes.rank(), processes.count()
    if config.batch % count:
        raise ValueError(f"world.batch={config.batch} clips over {count} processes: make it a multiple")
    held = tuple(f"{part}." for part in config.frozen)
    trained = {name: parameter for name, parameter in simulator.named_parameters() if not name.startswith(held)}
    for name, parameter in simulator.named_parameters():
        parameter.requires_grad_(name in trained)
    simulator.unet.recompute = config.gradient_checkpointing
    objective: nn.Module = Objective(simulator, config)
    if count > 1:
        objective = DistributedDataParallel(objective, broadcast_buffers=False)
    averaged = {name: parameter.detach().clone() for name, parameter in trained.items()}
    best = {name: value.clone() for name, value in averaged.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=config.lr, fused=True)
    chunk = simulator.config.chunk
    aligned, anywhere = clips.windows(chunk, aligned=True), clips.windows(chunk, aligned=False)
    judged = held_out.windows(chunk, aligned=True)
    judged = judged[noise.integers(seed, Stream.WORLD, _HELD_OUT_STEP, len(judged), config.held_out_clips)]
    begin, losses, checks, best_loss = 0, list[float](), list[list[float]](), math.inf

    def keep(step: int) -> None:
        if rank:
            return
        state = {name: parameter.detach() for name, parameter in trained.items()}
        savepoint.save({
            "step": step, "losses": losses, "checks": checks, "best_loss": best_loss, "trained": state, "averaged": averaged, "best": best,
            "optimizer": optimizer.state_dict(),
        })  # fmt: skip

    def put(values: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(values[name])

    if (kept := savepoint.load()) is not None:
        if kept["trained"].keys() != trained.keys():
            raise ValueError("the simulator's savepoint is of another network; delete it")
        begin, losses, checks, best_loss = kept["step"], kept["losses"], kept["checks"], kept["best_loss"]
        put(kept["trained"])
        averaged, best = kept["averaged"], kept["best"]
        _restore(optimizer, kept["optimizer"])

    @torch.no_grad()
    def held_out_loss() -> float:
        now = {name: parameter.detach().clone() for name, parameter in trained.items()}
        put(averaged)
        simulator.eval()
        parts = [judged[i : i + config.batch] for i in range(0, len(judged), config.batch)]
        judge, total = Objective(simulator, config), 0.0
        for i, part in enumerate(parts):
            if i % count == rank:
                batch = example(simulator, held_out, part, config, seed, _HELD_OUT_STEP + i, training=False)
                total += len(part) * float(judge(batch, held_out.rays))
        put(now)
        simulator.train()
        return processes.total(total, clips.latents.device) / len(judged)

    def check(step: int) -> None:
        nonlocal best_loss, best
        if checks and checks[-1][0] == step:  # before it was killed
            return
        checks.append([step, held_out_loss()])
        if checks[-1][1] < best_loss:
            best_loss, best = checks[-1][1], {name: value.clone() for name, value in averaged.items()}

    step, waiting = begin, 0
    simulator.train()
    for step in (bar := console.track(begin, config.steps, "simulator")):
        if step and step % config.check_every == 0:
            check(step)
        waiting = _without_better(checks)
        if waiting >= config.patience:
            break
        if savepoint.due():
            keep(step)
        few = round(config.aligned_starts * config.batch)
        starts = [
            draw_windows(of, chunk, config, seed, 2 * step + i, many, step / config.steps)
            for i, (of, many) in enumerate(((aligned, few), (anywhere, config.batch - few)))
        ]
        batch = example(simulator, clips, np.concatenate(starts), config, seed, step)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(noise.torch_seed(seed, Stream.WORLD_DROPOUT, step) + rank)  # the network's own dropout layers
            loss = objective(batch.rows(rank, count) if count > 1 else batch, clips.rays)
        losses.append(processes.total(finite(loss, "simulator", step, "world.lr"), clips.latents.device) / count)
        for group in optimizer.param_groups:
            group["lr"] = one_cycle(step, config.steps, config.lr)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), config.grad_clip)
        optimizer.step()
        decay = min(config.ema, (1.0 + step) / (10.0 + step))  # early averages forget the random weights
        torch._foreach_lerp_(list(averaged.values()), [p.detach() for p in trained.values()], 1.0 - decay)
        bar.note(loss=float(np.mean(losses[-50:])), held_out=checks[-1][1] if checks else math.nan)
    else:
        step = config.steps
        check(step)
    keep(step)
    put(best)
    simulator.eval()
    last = losses[-max(1, len(losses) // 10) :]
    best_step = min(checks, key=lambda row: row[1])[0] if checks else step
    return {"steps": step, "loss": float(np.mean(last)) if last else None, "held_out": checks, "best_step": int(best_step)}


def _without_better(checks: Sequence[Sequence[float]]) -> int:
    """How many checks [step, loss] have passed since the best."""
    if not checks:
        return 0
    losses = [loss for _, loss in checks]
    return len(losses) - 1 - losses.index(min(losses))


def train(
    simulator_config: SimulatorConfig,
    config: WorldConfig,
    training: Sequence[Episode],
    held_out: Sequence[Episode],
    camera: Camera,
    robot: Robot,
    seed: int,
    device: torch.device,
    savepoint: Callable[[str], Savepoint],
) -> tuple[Evac, dict[str, Any]]:
    """A simulator trained on `training` episodes, from `config.initial` or random weights, and its metrics; `held_out` decides when to stop.

    `savepoint` gives the place of each part's savepoint. Of several processes each returns the simulator; the metrics are the first one's.
    Errors as those of the two stages; CheckpointError where `config.initial` or `config.clip` does not fit.
    """
    simulator = Evac.initialised(simulator_config, seed)
    metrics: dict[str, Any] = {}
    if config.initial:
        new = begin_from(simulator, Path(config.initial), Path(config.clip) if config.clip else None)
        metrics["initial"] = {"file": config.initial, "not_in_it": len(new)}
    simulator = simulator.to(device)
    if not config.initial:
        if processes.rank() == 0:
            metrics["autoencoder"] = train_vae(simulator, training, camera, robot, config, seed, savepoint("autoencoder"))
        processes.share(simulator.state_dict().values())
    clips, judged = (encode(simulator, episodes, camera, robot) for episodes in (training, held_out))
    set_delta_statistics(simulator, clips)
    metrics["simulator"] = train_simulator(simulator, clips, judged, config, seed, savepoint("simulator"))
    metrics["parameters"] = {name: sum(p.numel() for p in part.parameters()) for name, part in simulator.named_children()}
    return simulator.eval(), metrics

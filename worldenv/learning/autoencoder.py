"""Stage world, first part: the autoencoder learns frames and action maps, and is frozen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from worldenv import console, noise
from worldenv.checkpoint import Savepoint
from worldenv.config import WorldConfig
from worldenv.data.episode import Episode
from worldenv.learning.clips import draw_maps
from worldenv.learning.finite import finite
from worldenv.learning.optimizer import one_cycle, pieces, restore
from worldenv.noise import Stream
from worldenv.nouns import Camera
from worldenv.robots.contract import Robot
from worldenv.simulator.evac import Evac
from worldenv.simulator.weights import fill

_FOREGROUND = 0.15  # a pixel differs from the median picture by more than this [of full range]
_MEDIAN_FRAMES = 256


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
    frames, pose, gripper = map(np.concatenate, zip(*((e.frame, e.pose, e.gripper) for e in episodes), strict=True))
    maps = round(config.map_share * config.vae_batch)
    still = simulator.fit(median_picture(episodes).permute(2, 0, 1)[None].to(device))
    blank = torch.full_like(still, robot.background / 127.5 - 1.0)
    still = torch.cat([still.expand(config.vae_batch - maps, -1, -1, -1), blank.expand(maps, -1, -1, -1)])
    shape = (config.vae_batch, simulator.config.vae.z_channels, *simulator.config.latent)
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.vae_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    begin, losses, divergence = 0, list[float](), 0.0
    if (kept := savepoint.load("step", "losses", "kl", "network", "optimizer")) is not None:
        begin, losses, divergence = kept["step"], kept["losses"], kept["kl"]
        fill(network, kept["network"], "savepoint of the autoencoder")
        restore(optimizer, kept["optimizer"])

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
            pictures = torch.cat([pictures, draw_maps(pose[drawn], gripper[drawn], camera, robot).to(device)])
        pictures = simulator.picture(pictures)
        given = torch.from_numpy(noise.normal(seed, 0, 0, step, Stream.VAE_NOISE, shape)).to(device)
        optimizer.zero_grad(set_to_none=True)
        total, divergence = 0.0, 0.0
        for share, part in pieces(config.vae_batch, config.microbatch):
            posterior = network.encode(pictures[part])
            kl = posterior.kl().mean() / math.prod(shape[1:])
            drawn_again = network.decode(posterior.sample(given[part]))
            loss = picture_loss(drawn_again, pictures[part], still[part], config.foreground_weight) + config.vae_kl * kl
            (loss * share).backward()  # type: ignore[no-untyped-call]
            total, divergence = total + share * float(loss.detach()), divergence + share * float(kl.detach())
        losses.append(finite(total, "autoencoder", step, "world.vae_lr"))
        for group in optimizer.param_groups:
            group["lr"] = one_cycle(step, config.vae_steps, config.vae_lr)
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

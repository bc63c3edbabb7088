"""Stage sft: the policy learns to imitate demonstrations, by L1 on normalised chunks (paper, appendix B.1, Eq. 6; OpenVLA-OFT's recipe).

At the published sizes this fine-tunes a pretrained model; a small policy is trained here from random weights, all of it.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from worldenv import console, noise
from worldenv.checkpoint import Savepoint
from worldenv.config import PolicyConfig, SftConfig
from worldenv.data.episode import Episode
from worldenv.learning.chunks import Chunks
from worldenv.nouns import ACTION_DIM, Observation
from worldenv.policy.openvla_oft import OpenVLAOFT
from worldenv.policy.processing import PromptTokenizer, Statistics
from worldenv.policy.weights import fill
from worldenv.robots.contract import Robot

_PICTURE, _PROPRIO = 1, 2
"""Draws of a step beside its batch, which is draw 0 (`noise.integers`)."""
_GRAD_CLIP = 1.0


def untrained(
    config: PolicyConfig, episodes: Sequence[Episode], instructions: Sequence[str], robot: Robot, seed: int, device: torch.device
) -> OpenVLAOFT:
    """A policy with random weights for these demonstrations: their statistics, and a tokenizer of the environment's `instructions`."""
    proprio = [robot.proprio(episode.pose[:-1], episode.gripper[:-1]) for episode in episodes]
    statistics = Statistics.of([episode.command for episode in episodes], proprio, f"{len(episodes)} demonstrations")
    return OpenVLAOFT.create(config, PromptTokenizer.build(instructions), statistics, noise.torch_seed(seed, noise.Stream.WEIGHTS), device)


def one_cycle(step: int, steps: int, peak: float, rise: float = 0.1) -> float:
    """Learning rate of `step`: a straight rise to `peak` over the first share of steps, then half a cosine down to 0."""
    done = (step + 1) / steps
    return peak * (done / rise if done < rise else 0.5 * (1.0 + math.cos(math.pi * (done - rise) / (1.0 - rise))))


def shift(frames: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """Frames (B, H, W, 3) moved by `offset` (B, 2) int64 [px, down and right]; what comes in repeats the edge."""
    height, width = frames.shape[1:3]
    rows = (torch.arange(height) - offset[:, :1]).clamp(0, height - 1)
    columns = (torch.arange(width) - offset[:, 1:]).clamp(0, width - 1)
    return frames[torch.arange(len(frames))[:, None, None], rows[:, :, None], columns[:, None, :]]


def recolour(frames: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """Frames (B, H, W, 3) uint8 with brightness, contrast and saturation multiplied by 1 + `change` (B, 3)."""
    brightness, contrast, saturation = (1.0 + change).float()[:, :, None, None, None].unbind(1)
    wide = frames.float()
    grey = wide.mean(dim=3, keepdim=True)
    mean = wide.mean(dim=(1, 2, 3), keepdim=True)
    return (((wide - grey) * saturation + grey - mean) * contrast + mean * brightness).round().clamp(0, 255).to(torch.uint8)


def augment(observation: Observation, config: SftConfig, seed: int, step: int) -> Observation:
    """Moved and recoloured pictures. The target stays: an action says where to go from here, and all that is seen moves together."""
    batch = len(observation.instruction)
    u = torch.from_numpy(noise.uniform(seed, 0, _PICTURE, step, noise.Stream.SFT, (batch, 5)))
    frames = observation.frame
    if config.shift_px:
        frames = shift(frames, (u[:, :2] * (2 * config.shift_px + 1)).floor().long() - config.shift_px)
    if config.colour:
        frames = recolour(frames, config.colour * (2.0 * u[:, 2:] - 1.0))
    return dataclasses.replace(observation, frame=frames)


def loss_at(policy: OpenVLAOFT, chunks: Chunks, config: SftConfig, seed: int, step: int) -> torch.Tensor:
    """L1 of the batch of `step`: a function of (seed, step) and the weights."""
    observation, target = chunks.take(noise.integers(seed, noise.Stream.SFT, step, len(chunks), config.batch))
    query = policy.query(augment(observation, config, seed, step))
    if config.proprio_noise and query.proprio is not None:
        drawn = noise.normal(seed, 0, _PROPRIO, step, noise.Stream.SFT, tuple(query.proprio.shape))
        query = dataclasses.replace(query, proprio=query.proprio + config.proprio_noise * torch.from_numpy(drawn).to(query.proprio))
    mu: torch.Tensor = policy.network.action_head(policy.hidden(query))
    return (mu - target.to(mu.device)).abs().mean()


@torch.no_grad()
def l1(policy: OpenVLAOFT, chunks: Chunks, batch: int) -> float:
    """Mean |mu - target| over all chunk starts, pictures as they are."""
    total = 0.0
    for start in range(0, len(chunks), batch):
        observation, target = chunks.take(np.arange(start, min(start + batch, len(chunks))))
        total += float((policy.act(observation).mu - target.to(policy.device)).abs().sum())
    return total / (len(chunks) * policy.chunk * ACTION_DIM)


def sft(
    policy: OpenVLAOFT, episodes: Sequence[Episode], robot: Robot, config: SftConfig, seed: int, savepoint: Savepoint
) -> dict[str, Any]:
    """Train `policy` in place on `episodes`, all of it but the scale head; a killed stage goes on from `savepoint`, to the same bits.

    Returns JSON-ready metrics: `l1` over all chunk starts, `l1_train` of the last epoch, `steps` taken, `chunks`, `parameters`.
    FloatingPointError where the loss is not finite.
    """
    chunks = Chunks(episodes, robot, policy.statistics, policy.chunk)
    network = policy.network
    trained = {name: parameter for name, parameter in network.named_parameters() if not name.startswith("scale_head.")}
    matrices, vectors = ([p for p in trained.values() if (p.dim() > 1) is wide] for wide in (True, False))
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=config.lr,
        betas=(0.9, 0.95),
        fused=True,
    )
    begin, losses = 0, deque[float](maxlen=math.ceil(len(chunks) / config.batch))
    if (kept := savepoint.load()) is not None:
        begin = kept["step"]
        losses.extend(kept["losses"])
        fill(network, kept["network"], "savepoint of stage sft")
        optimizer.load_state_dict(kept["optimizer"])
    step = begin
    for step in (bar := console.track(begin, config.steps, "sft")):
        if len(losses) == losses.maxlen and sum(losses) / len(losses) < config.stop_l1:
            break
        if savepoint.due():
            kept = {"step": step, "losses": list(losses), "network": network.state_dict(), "optimizer": optimizer.state_dict()}
            savepoint.save(kept)
        loss = loss_at(policy, chunks, config, seed, step)
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"sft: loss is {losses[-1]} at step {step}; lower sft.lr")
        for group in optimizer.param_groups:
            group["lr"] = one_cycle(step, config.steps, config.lr)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained.values(), _GRAD_CLIP)
        optimizer.step()
        bar.note(l1=sum(losses) / len(losses))
    else:
        step = config.steps
    return {
        "l1": l1(policy, chunks, config.batch),
        "l1_train": sum(losses) / len(losses) if losses else None,
        "steps": step,
        "chunks": len(chunks),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
    }

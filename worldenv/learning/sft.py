"""Stage sft: the policy learns to imitate demonstrations, by L1 on normalised chunks (paper, appendix B.1, Eq. 6; OpenVLA-OFT's recipe).

A policy of tokens learns the tokens of the same chunks by cross-entropy (OpenVLA); nothing else differs.

A small policy is trained from random weights, all of it. A published one (`start`) gets LoRA on its backbone (`worldenv.policy.lora` says where and
why), with its action head and proprio projector trained in full; what comes out has LoRA merged. Several processes (worldenv.distributed) take their
rows of the very batch that one would take, and sum gradients: their number changes results by rounding only.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from worldenv import console, noise
from worldenv.checkpoint import Savepoint
from worldenv.config import PolicyConfig, SftConfig
from worldenv.data.episode import Episode
from worldenv.learning import augment, processes
from worldenv.learning.chunks import Chunks
from worldenv.learning.finite import finite
from worldenv.learning.optimizer import one_cycle
from worldenv.nouns import ACTION_DIM, Observation
from worldenv.policy import lora, published, tokens
from worldenv.policy.openvla_oft import OpenVLAOFT, Query
from worldenv.policy.processing import PromptTokenizer, Statistics
from worldenv.robots.contract import Robot

_PICTURE, _PROPRIO = 1, 2
"""Draws of a step beside its batch, which is draw 0 (`noise.integers`)."""
_GRAD_CLIP = 1.0


def untrained(
    config: PolicyConfig, episodes: Sequence[Episode], instructions: Sequence[str], robot: Robot, seed: int, device: torch.device
) -> OpenVLAOFT:
    """A policy with random weights for these demonstrations: their statistics, and a tokenizer of the environment's `instructions`."""
    tokenizer, torch_seed = PromptTokenizer.build(instructions), noise.torch_seed(seed, noise.Stream.WEIGHTS)
    return OpenVLAOFT.create(config, tokenizer, _statistics(episodes, robot), torch_seed, device)


def retold(policy: OpenVLAOFT, episodes: Sequence[Episode], robot: Robot) -> OpenVLAOFT:
    """The same network and tokenizer with the statistics of `episodes`, for fine-tuning on these."""
    return OpenVLAOFT(policy.config, policy.network, policy.tokenizer, _statistics(episodes, robot))


def _statistics(episodes: Sequence[Episode], robot: Robot) -> Statistics:
    proprio = [robot.proprio(episode.pose[:-1], episode.gripper[:-1]) for episode in episodes]
    return Statistics.of([episode.command for episode in episodes], proprio, f"{len(episodes)} demonstrations")


def pretrained(config: PolicyConfig, sft: SftConfig, episodes: Sequence[Episode], robot: Robot, seed: int, device: torch.device) -> OpenVLAOFT:
    """The policy in `sft.start` with fresh heads and the statistics of these demonstrations, or as it is where there are no steps to train it.

    Sizes come from there; views, density and attention from `config`. In bfloat16 where the backbone's weights stay as they are and the precision is
    that; what is trained is float32.
    """
    dtype = torch.bfloat16 if (sft.lora_rank or not sft.steps) and sft.precision == "bfloat16" else torch.float32
    if sft.steps:
        opened = published.open_base(Path(sft.start), _statistics(episodes, robot), dtype, seed, config.head)
    else:
        opened = published.open_directory(Path(sft.start), sft.dataset or None, dtype=dtype, seed=seed, images=sft.views)
    ours = {name: getattr(config, name) for name in ("images", "attention", "scale_factor", "scale_floor", "scale_ceiling")}
    settings = dataclasses.replace(opened.config, **ours)
    opened.network.config = settings
    return OpenVLAOFT(settings, opened.network.to(device), opened.tokenizer, opened.statistics)


def want_start(config: PolicyConfig, sft: SftConfig) -> None:
    """Raises what `pretrained` would of `sft.start`, before there are demonstrations and in little memory."""
    if sft.steps:
        published.want_base(Path(sft.start), config.head)
    else:
        published.open_directory(Path(sft.start), sft.dataset or None, dtype=None, images=sft.views)


def _rate(step: int, config: SftConfig) -> float:
    if config.schedule == "one_cycle":
        return one_cycle(step, config.steps, config.lr)
    return config.lr if 3 * step < 2 * config.steps else 0.1 * config.lr


def moved(observation: Observation, config: SftConfig, draw: torch.Tensor) -> Observation:
    """Moved and recoloured frames, by `draw` (B, 5) in (0, 1)."""
    frames = observation.frame
    if config.shift_px:
        frames = augment.shift(frames, (draw[:, :2] * (2 * config.shift_px + 1)).floor().long() - config.shift_px)
    if config.colour:
        frames = augment.recolour(frames, config.colour * (2.0 * draw[:, 2:] - 1.0))
    return dataclasses.replace(observation, frame=frames)


def query_at(policy: OpenVLAOFT, observation: Observation, config: SftConfig, seed: int, step: int, rows: NDArray[np.int64]) -> Query:
    """What the network is shown at `step`: `rows` of the batch, whose observations these are, with pictures and proprio changed."""
    draw = torch.from_numpy(noise.uniform(seed, 0, _PICTURE, step, noise.Stream.SFT, (config.batch, augment.DRAWS[config.augmentation]))[rows])
    if config.augmentation == "published":
        query = policy.query(observation, lambda pictures: augment.published(pictures, policy.config.crop_area, draw))
    else:
        query = policy.query(moved(observation, config, draw))
    if config.proprio_noise and query.proprio is not None:
        push = torch.from_numpy(noise.normal(seed, 0, _PROPRIO, step, noise.Stream.SFT, (config.batch, query.proprio.shape[1]))[rows])
        query = dataclasses.replace(query, proprio=query.proprio + config.proprio_noise * push.to(query.proprio))
    return query


def loss_at(
    policy: OpenVLAOFT, chunks: Chunks, config: SftConfig, seed: int, step: int, rows: NDArray[np.int64]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of `rows` of the batch of `step`, a function of (seed, step, rows) and the weights: what is learned, and L1 without gradient.

    What is learned is L1 too, or of tokens their cross-entropy [nat]; L1 is then that of the most probable ones.
    """
    observation, target = chunks.take(noise.integers(seed, noise.Stream.SFT, step, len(chunks), config.batch)[rows])
    query = query_at(policy, observation, config, seed, step, rows)
    with torch.autocast(policy.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
        hidden = policy.hidden(query)
    target = target.to(hidden.device)
    if policy.config.head == "tokens":
        logits = policy.network.token_head(hidden)
        return tokens.cross_entropy(logits, target), (tokens.to_actions(logits.argmax(-1)) - target).abs().mean()
    error = (policy.network.action_head(hidden) - target).abs().mean()
    return error, error.detach()


@torch.no_grad()
def l1(policy: OpenVLAOFT, chunks: Chunks, batch: int) -> float:
    """Mean |mu - target| over all chunk starts, pictures as they are."""
    total = 0.0
    for start in range(0, len(chunks), batch):
        observation, target = chunks.take(np.arange(start, min(start + batch, len(chunks))))
        total += float((policy.act(observation).mu - target.to(policy.device)).abs().sum())
    return total / (len(chunks) * policy.chunk * ACTION_DIM)


def sft(
    policy: OpenVLAOFT, episodes: Sequence[Episode], robot: Robot, config: SftConfig, seed: int, savepoint: Savepoint, label: str = "sft"
) -> dict[str, Any]:
    """Train `policy` in place on `episodes`; a killed stage goes on from `savepoint`, to the same bits. `label` is shown beside the progress.

    Returns JSON-ready metrics: `l1` over all chunk starts, `l1_train` of the last epoch, `steps` taken, `chunks`, `parameters`, how many of them were
    `trained`; of tokens, `cross_entropy_train` [nat per token]. FloatingPointError where the loss is not finite; ValueError where the batch cannot
    be divided among the processes.
    """
    chunks = Chunks(episodes, robot, policy.statistics, policy.chunk)
    trained, by_tokens = _trained(policy, config, seed), policy.config.head == "tokens"
    rank, count = processes.rank(), processes.count()
    if config.batch % count:
        raise ValueError(f"sft.batch={config.batch} queries over {count} processes: make it a multiple")
    processes.share(trained.values())
    mine = np.arange(config.batch)[rank::count]
    parts = [mine[start : start + config.microbatch] for start in range(0, len(mine), config.microbatch)]
    matrices, vectors = ([p for p in trained.values() if (p.dim() > 1) is wide] for wide in (True, False))
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=config.lr,
        betas=(0.9, config.beta2),
        fused=True,
    )
    begin, epoch = 0, math.ceil(len(chunks) / config.batch)
    learned, errors = deque[float](maxlen=epoch), deque[float](maxlen=epoch)
    if (kept := savepoint.load("step", "learned", "errors", "trained", "optimizer")) is not None:
        begin = kept["step"]
        learned.extend(kept["learned"])
        errors.extend(kept["errors"])
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(kept["trained"][name])
        optimizer.load_state_dict(kept["optimizer"])
    step = begin
    for step in (bar := console.track(begin, config.steps, label)):
        if len(errors) == epoch and sum(errors) / epoch < config.stop_l1:
            break
        if rank == 0 and savepoint.due():
            weights = {name: parameter.detach() for name, parameter in trained.items()}
            at = {"step": step, "learned": list(learned), "errors": list(errors)}
            savepoint.save({**at, "trained": weights, "optimizer": optimizer.state_dict()})
        for group in optimizer.param_groups:
            group["lr"] = _rate(step, config)
        optimizer.zero_grad(set_to_none=True)
        total, far = 0.0, 0.0
        for rows in parts:
            loss, error = loss_at(policy, chunks, config, seed, step, rows)
            share = len(rows) / config.batch
            total, far = total + float(loss.detach()) * share, far + float(error) * share
            (loss * share).backward()  # type: ignore[no-untyped-call]
        learned.append(processes.total(total, policy.device))
        errors.append(processes.total(far, policy.device) if by_tokens else learned[-1])
        finite(learned[-1], "sft", step, "sft.lr")
        processes.sum_up(p.grad for p in trained.values() if p.grad is not None)
        torch.nn.utils.clip_grad_norm_(trained.values(), _GRAD_CLIP)
        optimizer.step()
        bar.note(l1=sum(errors) / len(errors))
    else:
        step = config.steps
    entropy = {"cross_entropy_train": sum(learned) / len(learned) if learned else None} if by_tokens else {}
    return {
        "l1": l1(policy, chunks, config.batch),
        "l1_train": sum(errors) / len(errors) if errors else None,
        **entropy,
        "steps": step,
        "chunks": len(chunks),
        "parameters": sum(parameter.numel() for parameter in policy.network.parameters()),
        "trained": sum(parameter.numel() for parameter in trained.values()),
    }


def _trained(policy: OpenVLAOFT, config: SftConfig, seed: int) -> dict[str, torch.nn.Parameter]:
    """What is trained, by name: everything but the scale head; or fresh LoRA, put in here, with the head that acts and proprio projector."""
    network, kept = policy.network, "scale_head."
    network.recompute = config.gradient_checkpointing
    if not config.lora_rank:
        return {name: parameter for name, parameter in network.named_parameters() if not name.startswith(kept)}
    lora.attach(network, config.lora_rank, config.lora_alpha, noise.torch_seed(seed, noise.Stream.SFT))
    for part in (network.token_head if policy.config.head == "tokens" else network.action_head, network.proprio_projector):
        part.requires_grad_(True)
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}

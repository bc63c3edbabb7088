"""How long does a rollout take, chunk by chunk? Ceiling: the FLOPs of everything that ours computes, at the measured matrix rate.

One rollout: its first frame, then chunks. The baseline does the published order of work (published.py) with the same weights and noise.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch

from worldenv.benchmarks import networks, published
from worldenv.benchmarks.bench_simulator_unet import mixed, plainly
from worldenv.benchmarks.harness import Agreement, Row, Setting, Variants, Work, compare, count_flops
from worldenv.config import SimulatorConfig
from worldenv.nouns import ActionMap
from worldenv.simulator.evac import Evac

LIMITS = {torch.float32: 0.02, torch.bfloat16: 6.0}
"""Mean distance of frames [levels of 255]: in float32 a pixel in fifty may round to the next level; in bfloat16, with random weights,
all steps round, and what random weights draw is noise of about 60 levels' deviation, which a wrong order of work would miss by as much."""
CHUNKS = {"tiny": 4, "published": 1}
"""tiny: a whole episode; published: the first chunk."""


def rollout(simulator: Evac, frame: torch.Tensor, maps: Sequence[ActionMap], noise: Sequence[torch.Tensor]) -> torch.Tensor:
    """(B, chunks K, H, W, 3) uint8, as the world calls the simulator."""
    memory, frames = simulator.begin(frame), []
    for action_map, drawn in zip(maps, noise, strict=True):
        made, memory = simulator.imagine(memory, action_map, drawn)
        frames.append(made)
    return torch.cat(frames, dim=1)


@functools.cache
def rollout_flops(config: SimulatorConfig, chunks: int, loop: bool = False) -> float:
    """FLOPs of a rollout, ours or (`loop`) in the published order of work; each further denoising step costs as the second does."""
    setting = Setting(torch.device("meta"), torch.float32, "published")
    counted = []
    for steps in (1, 2):
        short = dataclasses.replace(config, denoise_steps=steps)
        simulator = networks.meta_simulator(short)
        frame, maps, noise = networks.rollout_inputs(short, setting, chunks)
        if loop:
            with torch.device("meta"):
                unet, vae = published.PublishedUNet(short.unet, short.vae.z_channels), published.PublishedVAE(short.vae)
            baseline = published.PublishedLoop(simulator, unet.eval().requires_grad_(False), vae.eval().requires_grad_(False))
            counted.append(count_flops(functools.partial(baseline.rollout, frame, maps, noise)))
        else:
            counted.append(count_flops(functools.partial(rollout, simulator, frame, maps, noise)))
    return counted[0] + (config.denoise_steps - 1) * (counted[1] - counted[0])


def _loop(name: str, config: SimulatorConfig, setting: Setting) -> Row:
    simulator = networks.simulator(config, setting)
    chunks = CHUNKS[setting.size]
    frame, maps, noise = networks.rollout_inputs(config, setting, chunks)
    baseline = published.PublishedLoop(
        simulator, published.unet_like(simulator.unet, torch.float32), published.vae_like(simulator.vae, torch.float32)
    )

    def ours() -> torch.Tensor:
        return rollout(simulator, frame, maps, noise)

    def theirs() -> torch.Tensor:
        return baseline.rollout(frame, maps, noise)

    error = float((ours().float() - theirs().float()).abs().mean())
    weights = sum(p.numel() * p.element_size() for p in simulator.parameters())
    work = Work(rollout_flops(config, chunks), weights)
    with mixed(setting):
        return compare(
            f"chunk_loop {name}, {chunks} x {config.denoise_steps} steps", setting, plainly(setting, ours),
            ("published order of work", theirs), Agreement(error, LIMITS[setting.dtype]), work,
        )  # fmt: skip


def chunk_loop(setting: Setting) -> Variants:
    """A rollout of one context from its first frame on: all chunks of an episode, or the first chunk at published sizes."""
    return {name: functools.partial(_loop, name, config, setting) for name, config in networks.configs(setting).items()}

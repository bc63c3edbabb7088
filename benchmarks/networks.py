"""The simulator with random weights, at any size and in any type, made where it will run: nothing passes through the CPU or float32."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from worldenv.benchmarks.harness import Setting
from worldenv.config import SimulatorConfig
from worldenv.nouns import ActionMap
from worldenv.presets import EVAC, PRESETS
from worldenv.simulator.evac import DELTA_DIM, Evac

_SEED = 20250923
PUBLISHED_SIZES = {"320x512": (320, 512), "256x256": (256, 256)}
"""Pictures of the released model, and of its LIBERO counterpart [px]."""
_BRIEF_STEPS = 2


def configs(setting: Setting) -> dict[str, SimulatorConfig]:
    """The simulator's sizes under `setting`, by name."""
    if setting.size == "tiny":
        tiny = PRESETS["tiny"].simulator
        found = {f"{tiny.height}x{tiny.width}": tiny}
    else:
        found = {name: dataclasses.replace(EVAC, height=height, width=width) for name, (height, width) in PUBLISHED_SIZES.items()}
    if setting.brief:
        found = {name: dataclasses.replace(one, denoise_steps=min(one.denoise_steps, _BRIEF_STEPS)) for name, one in found.items()}
    return found


def _generator(device: torch.device) -> torch.Generator | None:
    return None if device.type == "meta" else torch.Generator(device).manual_seed(_SEED)


@torch.no_grad()
def randomised(network: nn.Module) -> None:
    """Fill all parameters in place, none with zeros: matrices uniform within 1 / sqrt(inputs), norms near the identity, biases small."""
    generator = torch.Generator(next(network.parameters()).device).manual_seed(_SEED)
    for name, parameter in network.named_parameters():
        if parameter.dim() > 1:
            bound = (parameter[0].numel() if "embedding" not in name and "latents" not in name else parameter.shape[-1]) ** -0.5
            parameter.uniform_(-bound, bound, generator=generator)
        else:
            parameter.uniform_(-0.1, 0.1, generator=generator)
    for module in network.modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            module.weight.add_(1.0)


def simulator(config: SimulatorConfig, setting: Setting) -> Evac:
    """On the setting's device in its type, ready to run; the first picture's deviation and the deltas' statistics are those of a new one."""
    made = meta_simulator(config, setting.dtype)
    made.to_empty(device=setting.device)
    randomised(made)
    made.latent_scale.fill_(config.latent_scale)
    made.delta_mean.zero_()
    made.delta_std.fill_(1.0)
    return made.eval()


def meta_simulator(config: SimulatorConfig, dtype: torch.dtype = torch.float32) -> Evac:
    """Without memory: for counts."""
    with torch.device("meta"):
        made = Evac(config)
    for part in made.requires_grad_(False).children():
        part.to(dtype)  # not the buffers: what scales latents and deltas stays in float32
    return made.eval()


def inputs(config: SimulatorConfig, setting: Setting, batch: int = 1) -> dict[str, torch.Tensor]:
    """One call of the UNet: x (B, 3 z + 7, T, h, w), tokens (B, L, context), timesteps, fps, domain (B,)."""
    generator = _generator(setting.device)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=setting.device).to(setting.dtype)

    context = config.unet.context_dim
    return {
        "x": normal(batch, 3 * config.vae.z_channels + 7, config.memory + config.chunk, *config.latent),
        "image": normal(batch, config.image_resampler.queries, context),
        "action": normal(batch, config.action_resampler.queries, context),
        "timesteps": torch.full((batch,), 777, device=setting.device),
        "fps": torch.full((batch,), config.fps_token, device=setting.device),
        "domain": torch.full((batch,), config.domain, device=setting.device),
    }


def rollout_inputs(config: SimulatorConfig, setting: Setting, chunks: int) -> tuple[torch.Tensor, list[ActionMap], list[torch.Tensor]]:
    """First frame (1, H, W, 3) uint8, and for each chunk its action map and noise."""
    generator = _generator(setting.device)

    def pictures(*shape: int) -> torch.Tensor:
        return torch.randint(0, 256, (*shape, config.height, config.width, 3), generator=generator, device=setting.device, dtype=torch.uint8)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=setting.device)

    steps = 1 + (config.denoise_steps if config.eta > 0 else 0) + (2 if config.posterior == "sample" else 0)
    maps = [ActionMap(pictures(1, config.chunk), normal(1, 6, *config.latent), normal(1, config.chunk, DELTA_DIM)) for _ in range(chunks)]
    noise = [normal(1, steps, config.vae.z_channels, config.chunk, *config.latent) for _ in range(chunks)]
    return pictures(1), maps, noise

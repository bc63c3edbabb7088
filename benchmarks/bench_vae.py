"""How long do encoding a chunk's maps and decoding its frames take? Ceiling: the FLOPs of the published autoencoder at the matrix rate.

The baseline encodes two pictures at a time and decodes one, as the published loop does; both are given the same pictures.
"""

from __future__ import annotations

import functools

import torch

from worldenv.benchmarks import networks, published
from worldenv.benchmarks.bench_simulator_unet import mixed, plainly
from worldenv.benchmarks.harness import Agreement, Row, Setting, Variants, Work, compare, count_flops
from worldenv.config import SimulatorConfig
from worldenv.engines.recipe import relative_error
from worldenv.simulator.vae import VAE

LIMITS = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
"""Relative L2 of means or pictures to the baseline's in float32."""
_SEED = 7


def _work(vae: VAE, call: str, shape: torch.Size, dtype: torch.dtype) -> Work:
    with torch.device("meta"):
        twin = VAE(vae.config).to(dtype)
        flops = count_flops(lambda: getattr(twin, call)(torch.empty(shape, dtype=dtype)))
    weights = sum(p.numel() * p.element_size() for p in (twin.encoder if call == "encode" else twin.decoder).parameters())
    return Work(flops, weights)


def _vae(name: str, call: str, config: SimulatorConfig, setting: Setting) -> Row:
    simulator = networks.simulator(config, setting)
    generator = torch.Generator(setting.device).manual_seed(_SEED)
    shape = (config.chunk, 3, config.height, config.width) if call == "encode" else (config.chunk, config.vae.z_channels, *config.latent)
    given = torch.randn(shape, generator=generator, device=setting.device)
    with torch.no_grad():
        baseline = published.vae_like(simulator.vae, torch.float32)
        if call == "encode":
            agreement = Agreement(relative_error(simulator.encode(given), baseline.encode(given)[0] * config.latent_scale), LIMITS[setting.dtype])
            ours, theirs = (lambda: simulator.encode(given)), (lambda: baseline.encode(given)[0])
        else:
            want = baseline.decode(given / config.latent_scale)
            agreement = Agreement(relative_error(simulator.decode(given), want), LIMITS[setting.dtype])
            ours, theirs = (lambda: simulator.decode(given)), (lambda: baseline.decode(given / config.latent_scale))
        work = _work(simulator.vae, call, given.shape, setting.dtype)
        with mixed(setting):
            return compare(f"vae {call} {name}", setting, plainly(setting, ours), ("published order, eager", theirs), agreement, work)


def vae(setting: Setting) -> Variants:
    """A chunk's pictures through the encoder, and its latents through the decoder."""
    return {
        f"{call} {name}": functools.partial(_vae, name, call, config, setting)
        for name, config in networks.configs(setting).items()
        for call in ("encode", "decode")
    }

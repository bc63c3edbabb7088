"""How long is one denoising step? Ceiling: its FLOPs, with nothing computed twice, at the measured matrix rate."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import torch

from worldenv.benchmarks import networks, published
from worldenv.benchmarks.harness import Agreement, Row, Setting, Variants, Work, compare, count_flops
from worldenv.config import SimulatorConfig
from worldenv.engines.recipe import relative_error
from worldenv.simulator.evac import Evac
from worldenv.simulator.unet import UNet

LIMITS = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
"""Relative L2 of a whole forward pass to that of the baseline in float32: rounding of some 400 operations in a row, no more."""


def hoisted(unet: UNet, given: dict[str, torch.Tensor], memory: int) -> Callable[[], torch.Tensor]:
    """One step as the chunk loop calls it: time embeddings, keys and values are there already."""
    levels = torch.cat([torch.zeros_like(given["timesteps"]), given["timesteps"]])
    memory_row, chunk_row = unet.time_rows(levels, given["fps"].repeat(2), given["domain"].repeat(2)).chunk(2)
    pairs = unet.keys_values(given["image"], given["action"])
    return lambda: unet.denoise(given["x"], memory_row, chunk_row, pairs, memory)


def unhoisted(unet: published.PublishedUNet, given: dict[str, torch.Tensor], memory: int) -> Callable[[], torch.Tensor]:
    """One step as the published loop calls it."""
    context = torch.cat([given["image"], given["action"]], dim=1)
    return lambda: unet(given["x"], given["timesteps"], context, given["fps"], given["domain"], memory, given["action"].shape[1])


@functools.cache
def step_work(config: SimulatorConfig, dtype: torch.dtype) -> Work:
    """The least that a step has to do: our FLOPs, every weight read once."""
    unet = networks.meta_simulator(config, dtype).unet
    given = networks.inputs(config, Setting(torch.device("meta"), dtype, "published"))
    with torch.no_grad():
        flops = count_flops(hoisted(unet, given, config.memory))
    return Work(flops, sum(p.numel() * p.element_size() for p in unet.parameters()))


def mixed(setting: Setting) -> contextlib.AbstractContextManager[object]:
    """The published way to run in less than float32: float32 weights under autocast, cast once for as long as this is open."""
    if setting.dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(setting.device.type, setting.dtype)


def plainly(setting: Setting, call: Callable[[], object]) -> Callable[[], object]:
    """`call` outside of autocast."""

    def outside() -> object:
        with torch.autocast(setting.device.type, enabled=False):
            return call()

    return outside if setting.dtype != torch.float32 else call


def _step(name: str, config: SimulatorConfig, setting: Setting) -> Row:
    simulator: Evac = networks.simulator(config, setting)
    with torch.no_grad():
        given = networks.inputs(config, setting)
        ours = hoisted(simulator.unet, given, config.memory)
        exact = published.unet_like(simulator.unet, torch.float32)
        wide = {key: value.float() if value.is_floating_point() else value for key, value in given.items()}
        theirs = unhoisted(exact, wide, config.memory)
        agreement = Agreement(relative_error(ours(), theirs()), LIMITS[setting.dtype])
        with mixed(setting):
            return compare(
                f"simulator_unet {name}", setting, plainly(setting, ours), ("published order, eager", theirs), agreement,
                step_work(config, setting.dtype),
            )  # fmt: skip


def simulator_unet(setting: Setting) -> Variants:
    """One UNet step of one rollout, against a straightforward eager module of the same network with nothing hoisted."""
    return {name: functools.partial(_step, name, config, setting) for name, config in networks.configs(setting).items()}

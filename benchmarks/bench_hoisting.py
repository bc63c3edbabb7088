"""What does it save to compute once what is constant? FLOPs and bytes at the published sizes, counted without running anything.

Bytes are those that eager operators read and write: of every operation that is not a view, its tensor arguments and its results.
Attention counts as the one fused kernel that it is on a GPU: queries, keys, values and results.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from worldenv.benchmarks import networks, published
from worldenv.benchmarks.bench_chunk_loop import rollout_flops
from worldenv.benchmarks.bench_simulator_unet import hoisted, unhoisted
from worldenv.benchmarks.harness import Row, Setting, Variants, count_flops
from worldenv.config import SimulatorConfig
from worldenv.presets import PAPER

_TERA, _GIGA = 1e12, 1e9
_DTYPE = torch.bfloat16
_CONSTANT = ("time_embed", "fps_embedding", "domain_embedding", "emb_layers", "to_k_ip", "to_v_ip", "to_k_tp", "to_v_tp")


def _size(*values: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor))


class _Attention(TorchFunctionMode):
    """Calls no attention, but counts it: on the meta device it would fall apart into products that store all scores."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:  # fmt: skip
        if function is not F.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        out = args[0].new_empty(args[0].shape)  # counted as written by the mode below
        self.bytes += _size(args)
        return out


class Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sums the bytes that the operations inside read and write."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:  # fmt: skip
        out = operation(*args, **(kwargs or {}))
        if operation is torch.ops.aten.new_empty.default:
            self.bytes += _size(out)
        elif not operation.is_view and operation is not torch.ops.aten._unsafe_view.default:
            self.bytes += _size(args, kwargs, out)
        return out


def _bytes(call: Callable[[], object], network: nn.Module | None = None) -> tuple[int, int]:
    """Of `call`, and of what it does in those parts of the published `network` that are constant over steps or frames."""
    constant = 0
    with Traffic() as traffic, _Attention() as attention:

        def enter(module: nn.Module, args: object) -> None:
            nonlocal constant
            constant -= traffic.bytes

        def leave(module: nn.Module, args: object, out: object) -> None:
            nonlocal constant
            constant += traffic.bytes

        hooked = [module for name, module in network.named_modules() if name.rsplit(".", 1)[-1] in _CONSTANT] if network is not None else []
        handles = [handle for module in hooked for handle in (module.register_forward_pre_hook(enter), module.register_forward_hook(leave))]
        call()
        for handle in handles:
            handle.remove()
    return traffic.bytes + attention.bytes, constant


@functools.cache
@torch.no_grad()
def step_counts(config: SimulatorConfig) -> dict[str, tuple[int, int, int]]:
    """FLOPs, bytes, and bytes for what is constant, of one UNet step in bfloat16, "hoisted" and "published"."""
    setting = Setting(torch.device("meta"), _DTYPE, "published")
    given = networks.inputs(config, setting)
    with torch.device("meta"):
        unet = published.PublishedUNet(config.unet, config.vae.z_channels).to(_DTYPE).eval()
    ours = networks.meta_simulator(config, _DTYPE).unet
    calls = {"hoisted": hoisted(ours, given, config.memory), "published": unhoisted(unet, given, config.memory)}
    counted = {name: (count_flops(call), *_bytes(call, unet if name == "published" else None)) for name, call in calls.items()}
    repeated = config.memory + config.chunk + 1  # the context, read once and written for every frame
    flops, moved, constant = counted["published"]
    tokens = config.image_resampler.queries + config.action_resampler.queries
    counted["published"] = flops, moved, constant + repeated * tokens * config.unet.context_dim * _DTYPE.itemsize
    return counted


def _row(what: str, ours: float, theirs: float, unit: str) -> Row:
    return Row(f"hoisting {what}", "counted", ours, unit, "published order of work", theirs, theirs / ours)


def _step(name: str, config: SimulatorConfig) -> Row:
    counts = step_counts(config)
    return _row(f"step FLOPs {name}", counts["hoisted"][0] / _TERA, counts["published"][0] / _TERA, "TFLOP")


def _moved(name: str, config: SimulatorConfig) -> Row:
    counts = step_counts(config)
    return _row(f"step bytes {name}", counts["hoisted"][1] / _GIGA, counts["published"][1] / _GIGA, "GB")


def _spared(name: str, config: SimulatorConfig) -> Row:
    """The published step, and the same less what it does for what is constant."""
    _, moved, constant = step_counts(config)["published"]
    return _row(f"step bytes without what is constant {name}", (moved - constant) / _GIGA, moved / _GIGA, "GB")


def _chunk(name: str, config: SimulatorConfig) -> Row:
    ours, theirs = (rollout_flops(config, 1, loop) / _TERA for loop in (False, True))
    return _row(f"first chunk FLOPs {name}, {config.denoise_steps} steps", ours, theirs, "TFLOP")


def _second(name: str, config: SimulatorConfig) -> Row:
    ours, theirs = ((rollout_flops(config, 2, loop) - rollout_flops(config, 1, loop)) / _TERA for loop in (False, True))
    return _row(f"second chunk FLOPs {name}, {config.denoise_steps} steps", ours, theirs, "TFLOP")


def hoisting(setting: Setting) -> Variants:
    """Counts at the published sizes, whatever the setting."""
    found: dict[str, Callable[[], Row]] = {}
    sizes = networks.configs(dataclasses.replace(setting, size="published", brief=False)) | {"of preset paper": PAPER.simulator}
    for name, config in sizes.items():
        found[f"step FLOPs {name}"] = functools.partial(_step, name, config)
        found[f"step bytes {name}"] = functools.partial(_moved, name, config)
        found[f"step bytes without what is constant {name}"] = functools.partial(_spared, name, config)
        found[f"first chunk {name}"] = functools.partial(_chunk, name, config)
        found[f"second chunk {name}"] = functools.partial(_second, name, config)
    return found

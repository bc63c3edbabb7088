"""LoRA on the policy (Hu et al. 2022, arXiv:2106.09685): where it sits, how it goes into weights and out again, and PEFT's files.

    W' = W + alpha / rank B A        for every nn.Linear of the vision towers, the projector and the language model

That is what the paper calls the vision-language backbone. The published fine-tuning adapts more, by an accident of names: both patch convolutions,
the output layer, and what is never read (last blocks, SigLIP's pooling). None of these but the convolutions can get a gradient from the L1 loss.
The proprio projector and the heads are small and are trained in full. Published adapters are read whole, convolutions included.

Weights are always made from the pristine W, which is kept; the sum is done in float32 and rounded once, to the type of W.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from worldenv import checkpoint

BACKBONE = ("vision_backbone", "projector", "language_model")
"""The parts of `Network` that get LoRA."""
_ADAPTER = "default"
_PEFT = "base_model.model."
_OUTPUT_LAYER = tuple(f"{_PEFT}language_model.lm_head.{name}" for name in ("weight", "base_layer.weight"))
"""PEFT adds the output layer itself where that is adapted, under one of these names; it is never read."""
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",), "fan_in_fan_out": (False, None), "use_rslora": (False, None), "use_dora": (False, None), "bias": ("none", None),
    "rank_pattern": ({}, None), "alpha_pattern": ({}, None), "modules_to_save": (None, []), "layers_to_transform": (None, []),
}  # fmt: skip
"""Settings of PEFT under which a weight is W + alpha / rank B A and nothing else."""


def targets(network: nn.Module) -> list[str]:
    """Names of the layers that get LoRA."""
    return [name for name, module in network.named_modules() if name.startswith(BACKBONE) and isinstance(module, nn.Linear)]


def attach(network: nn.Module, rank: int, alpha: int, torch_seed: int) -> dict[str, nn.Parameter]:
    """Put fresh LoRA that changes nothing yet into `network`, in place: A gaussian, a function of `torch_seed`, B zero; both float32.

    Returns its parameters by name. No other parameter takes gradients afterwards.
    """
    from peft import inject_adapter_in_model

    with torch.random.fork_rng(devices=[]):  # PEFT draws from torch's global generator
        torch.manual_seed(torch_seed)
        inject_adapter_in_model(_peft_config(rank, alpha, targets(network)), network, adapter_name=_ADAPTER)
    found = {}
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(".lora_" in name)
        if ".lora_" in name:
            parameter.data = parameter.data.float()  # PEFT takes the type of W, in which steps of 1e-4 would be lost
            found[name] = parameter
    return found


def _peft_config(rank: int, alpha: int, modules: list[str]) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, init_lora_weights="gaussian", target_modules=modules)


@dataclass(frozen=True)
class Adapter:
    """LoRA apart from any network."""

    rank: int
    alpha: float
    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    """By name of the layer: A (rank, in), B (out, rank); of a convolution A (rank, in, k, k), B (out, rank, 1, 1)."""

    @classmethod
    def of(cls, network: nn.Module) -> Adapter:
        """What `attach` put into `network`, as it is now: the same tensors, not copies."""
        found, rank, alpha = {}, 0, 0.0
        for name, module in network.named_modules():
            if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
                rank, alpha = module.r[_ADAPTER], module.lora_alpha[_ADAPTER]
                found[name] = (module.lora_A[_ADAPTER].weight.detach(), module.lora_B[_ADAPTER].weight.detach())
        return cls(rank, alpha, found)

    def delta(self, name: str) -> torch.Tensor:
        """What is added to the weight of layer `name`: (out, in) or (out, in, k, k), float32."""
        a, b = (factor.float() for factor in self.factors[name])
        return (b.flatten(1) @ a.flatten(1) * (self.alpha / self.rank)).view(b.shape[0], *a.shape[1:])

    def write(self, directory: Path) -> None:
        """PEFT's format: `adapter_model.safetensors` and `adapter_config.json`."""
        directory.mkdir(parents=True, exist_ok=True)
        weights = {
            f"{_PEFT}{name}.lora_{which}.weight": factor.cpu().contiguous()
            for name, factors in self.factors.items()
            for which, factor in zip("AB", factors, strict=True)
        }
        checkpoint.write_tensors(directory / _WEIGHTS, weights, {"format": "pt"})
        plain = _peft_config(self.rank, int(self.alpha), sorted(self.factors)).to_dict()
        plain = {key: sorted(value) if isinstance(value, set) else value for key, value in plain.items()}
        checkpoint.write_text(directory / _CONFIG, json.dumps(plain, indent=1, sort_keys=True))

    @classmethod
    def read(cls, directory: Path) -> Adapter:
        """What `write` or PEFT wrote. CheckpointError names a file that is missing, damaged or no plain LoRA, and a layer that is not whole."""
        config, weights = directory / _CONFIG, directory / _WEIGHTS
        try:
            stated = json.loads(config.read_text(encoding="utf-8"))
            tensors = load_file(weights)
        except (OSError, ValueError, SafetensorError) as error:
            raise checkpoint.CheckpointError(f"{directory}: no LoRA in PEFT's format ({_CONFIG}, {_WEIGHTS}): {error}") from error
        if strange := [f"{key}={stated.get(key)!r}" for key, allowed in _PLAIN.items() if stated.get(key) not in allowed]:
            raise checkpoint.CheckpointError(f"{config}: {', '.join(strange)}: only plain LoRA is read")
        factors: dict[str, dict[str, torch.Tensor]] = {}
        unknown = []
        for key, tensor in tensors.items():
            name, _, which = key.removeprefix(_PEFT).removesuffix(".weight").rpartition(".lora_")
            if key.startswith(_PEFT) and which in ("A", "B"):
                factors.setdefault(name, {})[which] = tensor
            elif key not in _OUTPUT_LAYER:
                unknown.append(key)
        broken = sorted(name for name, pair in factors.items() if len(pair) < 2 or not pair["A"].shape[0] == pair["B"].shape[1] == stated["r"])
        if unknown or broken or not factors:
            raise checkpoint.CheckpointError(f"{weights}: unknown {unknown[:3]}, not whole or not of rank {stated['r']} {broken[:3]}")
        return cls(stated["r"], stated["lora_alpha"], {name: (pair["A"], pair["B"]) for name, pair in factors.items()})


def added(pristine: Mapping[str, torch.Tensor], adapter: Adapter) -> dict[str, torch.Tensor]:
    """Of `pristine` (weights under plain names) those that `adapter` changes, with it. ValueError names layers that do not fit."""
    return _all_sums(pristine, adapter, 1.0)


def unmerge(merged: Mapping[str, torch.Tensor], adapter: Adapter) -> dict[str, torch.Tensor]:
    """`merged` (weights under plain names) with `adapter` taken out again, to rounding in the weights' type: for published directories, which hold
    merged weights and no others. ValueError names layers that do not fit.
    """
    return {**merged, **_all_sums(merged, adapter, -1.0)}


@torch.no_grad()
def _all_sums(weights: Mapping[str, torch.Tensor], adapter: Adapter, sign: float) -> dict[str, torch.Tensor]:
    changed = {}
    for name in adapter.factors:
        weight, delta = weights.get(f"{name}.weight"), adapter.delta(name)
        if weight is None or weight.shape != delta.shape:
            shape = "there is no such layer" if weight is None else f"is {tuple(weight.shape)}, the adapter {tuple(delta.shape)}"
            raise ValueError(f"LoRA does not fit these weights: {name}: {shape}")
        changed[f"{name}.weight"] = _sum(weight, delta, sign)
    return changed


def _sum(weight: torch.Tensor, delta: torch.Tensor, sign: float) -> torch.Tensor:
    return (weight.float() + sign * delta.to(weight.device)).to(weight.dtype)


class Plain(Mapping[str, torch.Tensor]):
    """A network's present weights under their plain names, with what `attach` put in added to the pristine ones, which stay as they are.

    A sum is made each time that it is asked for, and not kept: of billions there is no room for all at once. What has no LoRA is the network's own
    tensor, not a copy.
    """

    def __init__(self, network: nn.Module) -> None:
        self._own = {name.replace(".base_layer.", "."): tensor for name, tensor in network.state_dict().items() if ".lora_" not in name}
        self._adapter = Adapter.of(network)
        self.changed = {f"{layer}.weight" for layer in self._adapter.factors}
        """Names of those that have LoRA."""

    @torch.no_grad()
    def __getitem__(self, name: str) -> torch.Tensor:
        weight = self._own[name]
        return _sum(weight, self._adapter.delta(name.removesuffix(".weight")), 1.0) if name in self.changed else weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._own)

    def __len__(self) -> int:
        return len(self._own)


def merged(network: nn.Module) -> dict[str, torch.Tensor]:
    """All of `Plain` as copies on the CPU, one after another: beside what trains, a GPU has no room for a second network."""
    plain = Plain(network)
    return {name: tensor.to("cpu", copy=name not in plain.changed) for name, tensor in plain.items()}

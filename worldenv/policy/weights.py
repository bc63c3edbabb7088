"""A policy on disk: ours whole in one file, and the published checkpoints' names turned to ours."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from worldenv import checkpoint, config
from worldenv.config import PolicyConfig
from worldenv.policy import lora, tokens
from worldenv.policy.openvla_oft import Network, OpenVLAOFT
from worldenv.policy.processing import PUBLISHED_PAD, PromptTokenizer, Statistics

_KIND = "worldenv policy"
_CHANGE = "worldenv policy change"
_WRAPPERS = re.compile(r"^(module\.)+")


def never_read(name: str, config: PolicyConfig) -> bool:
    """Whether a published tensor has no influence on actions: last vision blocks, final vision norms, SigLIP's pooling, output layer.

    Of the output layer a policy of tokens reads its own rows, under another name (`from_published`).
    """
    dead = [r"language_model\.lm_head\.", r"vision_backbone\.(fused_)?featurizer\.(norm|attn_pool)\."]
    for tower, vision in (("featurizer", config.dino), ("fused_featurizer", config.siglip)):
        dead.append(rf"vision_backbone\.{tower}\.blocks\.{vision.depth - 1}\.")
    return re.match("|".join(dead), name) is not None


def from_published(
    vla: Mapping[str, torch.Tensor],
    action_head: Mapping[str, torch.Tensor],
    proprio_projector: Mapping[str, torch.Tensor],
    scale_head: Mapping[str, torch.Tensor],
    config: PolicyConfig,
) -> dict[str, torch.Tensor]:
    """Published state dicts as one of `Network`: prefixes put on, wrappers and what is never read taken off; LayerScale's gamma renamed.

    For a policy of tokens `vla` has an output layer, of which the rows of the last `tokens.BINS` tokens before the padding are its head.
    """
    parts = {"": vla, "action_head.": action_head, "proprio_projector.": proprio_projector, "scale_head.": scale_head}
    named = {prefix + _WRAPPERS.sub("", name): tensor for prefix, part in parts.items() for name, tensor in part.items()}
    renamed = {re.sub(r"(\.ls[12])\.gamma$", r"\1.scale_factor", name): tensor for name, tensor in named.items()}
    if config.head == "tokens" and (words := renamed.get("language_model.lm_head.weight")) is not None:
        renamed["token_head.weight"] = words[PUBLISHED_PAD - tokens.BINS : PUBLISHED_PAD]
    return {name: tensor for name, tensor in renamed.items() if not never_read(name, config)}


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def fill(network: nn.Module, state: Mapping[str, torch.Tensor], source: str, assign: bool = False) -> None:
    """Copy `state` into `network`, keeping its dtypes; or `assign` the tensors themselves, as a network on the meta device needs.

    ValueError that names every kind of misfit; nothing is changed then.
    """
    own = network.state_dict()
    problems = []
    if missing := sorted(own.keys() - state.keys()):
        problems.append(f"missing {_few(missing)}")
    if unknown := sorted(state.keys() - own.keys()):
        problems.append(f"unknown {_few(unknown)}")
    if wrong := [
        f"{n} {tuple(state[n].shape)}, want {tuple(own[n].shape)}"
        for n in sorted(own.keys() & state.keys())
        if state[n].shape != own[n].shape
    ]:
        problems.append(f"wrong shape {_few(wrong)}")
    if problems:
        raise ValueError(f"{source}: these weights are not of this network: {'; '.join(problems)}")
    network.load_state_dict(dict(state), assign=assign)


def save(path: Path, policy: OpenVLAOFT, weights: Mapping[str, torch.Tensor] | None = None) -> None:
    """Write the whole policy: weights, configuration, statistics and tokenizer, atomically.

    `weights` (the network's names) stand in for the network's own: merged LoRA, say.
    """
    tree = {
        "kind": _KIND,
        "config": config.to_dict(policy.config),
        "weights": dict(policy.network.state_dict() if weights is None else weights),
        "statistics": policy.statistics.tree(),
        "tokenizer": policy.tokenizer.tree(),
    }
    checkpoint.save(path, tree)


def save_change(path: Path, base: Path, adapter: lora.Adapter, whole: Mapping[str, torch.Tensor]) -> None:
    """Write the policy that file `base` becomes with `adapter` and with the tensors of `whole` in the place of its own, atomically.

    Of the published size 1.6 GB, where all of it is 16. `base` must stay where it is, seen from `path`. LoRA is added when it is read, on the CPU:
    what acted on a GPU may differ by a rounding of the weights' type. Raises what `checkpoint.checksum` does.
    """
    tree = {
        "kind": _CHANGE,
        "base": os.path.relpath(base, path.parent),
        "sha256": checkpoint.checksum(base),
        "adapter": {"rank": adapter.rank, "alpha": adapter.alpha, "factors": dict(adapter.factors)},
        "whole": dict(whole),
    }
    checkpoint.save(path, tree)


def _changed(path: Path, change: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of a whole policy that a `change` in `path` makes."""
    base = path.parent / change["base"]
    if not base.is_file() or checkpoint.checksum(base) != change["sha256"]:
        raise checkpoint.CheckpointError(
            f"{path}: holds what LOOP changed of {base}, which is not there or another by now; put both back, or give policy.safetensors of a stage"
        )
    tree: dict[str, Any] = checkpoint.load(base)
    adapter = lora.Adapter(**change["adapter"])
    tree["weights"] = {**tree["weights"], **lora.added(tree["weights"], adapter), **change["whole"]}
    return tree


def load(path: Path, device: torch.device) -> OpenVLAOFT:
    """Read what `save` or `save_change` wrote.

    CheckpointError where the file is missing, damaged or no policy, and where what it changes is not there; ValueError naming weights that misfit.
    """
    tree = checkpoint.load(path)
    if isinstance(tree, dict) and tree.get("kind") == _CHANGE:
        tree = _changed(path, tree)
    if not isinstance(tree, dict) or tree.get("kind") != _KIND:
        raise checkpoint.CheckpointError(f"{path}: not a policy; give the file that stage sft, scale or loop wrote")
    settings = config.from_dict(PolicyConfig, tree["config"])
    with torch.device("meta"):
        network = Network(settings)
    fill(network, tree["weights"], str(path), assign=True)
    return OpenVLAOFT(settings, network.to(device), PromptTokenizer.from_tree(tree["tokenizer"]), Statistics.from_tree(tree["statistics"]))

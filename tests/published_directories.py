"""Directories in the layouts of published OpenVLA-OFT and LLaVA-OneVision checkpoints, at small sizes: what tests open in their place."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from worldenv import checkpoint
from worldenv.config import PolicyConfig
from worldenv.policy import lora
from worldenv.policy.openvla_oft import Network, OpenVLAOFT
from worldenv.policy.processing import Bounds
from worldenv.policy.weights import never_read
from worldenv.reflector.judge import LlavaReflector


class _Pooling(nn.Module):
    """SigLIP's attention pooling, for its names and shapes alone."""

    def __init__(self, width: int, mlp: int) -> None:
        super().__init__()
        self.latent = nn.Parameter(torch.empty(1, 1, width))
        self.q, self.kv, self.proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, mlp), "fc2": nn.Linear(mlp, width)})


def shapes(config: PolicyConfig) -> dict[str, torch.Size]:
    """Every tensor of a published model's files, those that are never read among them, by name; takes no memory."""
    dino, siglip = (replace(tower, depth=tower.depth + 1) for tower in (config.dino, config.siglip))
    with torch.device("meta"):
        network = Network(replace(config, dino=dino, siglip=siglip))
        vision = network.vision_backbone
        vision.featurizer.norm, vision.fused_featurizer.norm = nn.LayerNorm(config.dino.width), nn.LayerNorm(config.siglip.width)
        vision.fused_featurizer.attn_pool = _Pooling(config.siglip.width, config.siglip.mlp)
        network.language_model.lm_head = nn.Linear(config.llama.width, config.llama.vocab, bias=False)
    parts = ("vision_backbone.", "projector.", "language_model.")
    return {name: tensor.shape for name, tensor in network.state_dict().items() if name.startswith(parts)}


def _stated(bounds: Bounds) -> dict[str, Any]:
    return {"q01": bounds.q01.tolist(), "q99": bounds.q99.tolist(), "mask": bounds.mask.tolist()}


def write_policy(directory: Path, policy: OpenVLAOFT, step: int, adapter: lora.Adapter | None = None, shard_bytes: int = 5 * 10**9) -> None:
    """`policy`, which has an L1 head, in OpenVLA-OFT's layout; `adapter`, if given, is the LoRA in its merged weights. What has no influence on
    actions is there as zeros.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config, state = policy.config, lora.merged(policy.network)
    for name in ("action_head", "proprio_projector", "scale_head"):
        part = {f"module.{key.removeprefix(f'{name}.')}": t for key, t in state.items() if key.startswith(f"{name}.")}
        with checkpoint.atomic(directory / f"{name}--{step}_checkpoint.pt") as file:
            torch.save(part, file)
    dtype = state["projector.fc1.weight"].dtype
    whole = {name: torch.zeros(shape, dtype=dtype) if never_read(name, config) else state[name] for name, shape in shapes(config).items()}
    _write_shards(directory, whole, shard_bytes)
    policy.tokenizer.tokenizer.save(str(directory / "tokenizer.json"))
    norm = {"mean": [config.dino_mean, (0.5,) * 3], "std": [config.dino_std, (0.5,) * 3]}
    pixels = [{"inplace": False, "mean": list(norm["mean"][i]), "std": list(norm["std"][i])} for i in range(2)]
    text = {
        "model_type": "llama", "hidden_size": config.llama.width, "num_hidden_layers": config.llama.layers, "num_attention_heads": config.llama.heads,
        "intermediate_size": config.llama.ffn, "vocab_size": config.llama.vocab, "num_key_value_heads": config.llama.kv_heads or config.llama.heads,
        "rms_norm_eps": config.llama.rms_eps, "rope_theta": config.llama.rope_theta, "pad_token_id": policy.tokenizer.pad,
    }  # fmt: skip
    statistics = {"action": _stated(policy.statistics.action), "proprio": _stated(policy.statistics.proprio)}
    files = {
        "preprocessor_config.json": {"tvf_normalize_params": pixels, "input_sizes": [[3, config.image, config.image]] * 2},
        "dataset_statistics.json": {policy.statistics.source: statistics},
        "config.json": {
            "model_type": "openvla", "architectures": ["OpenVLAForActionPrediction"], "text_config": text, "use_fused_vision_backbone": True,
            "image_sizes": [config.image, config.image], "norm_stats": {policy.statistics.source: statistics},
            "worldenv_towers": [asdict(config.dino), asdict(config.siglip)],
        },
    }  # fmt: skip
    if adapter is not None:
        adapter.write(directory / "lora_adapter")
    for name, content in files.items():
        checkpoint.write_text(directory / name, json.dumps(content, indent=2))


def _write_shards(directory: Path, state: Mapping[str, torch.Tensor], shard_bytes: int) -> None:
    """In the order of names, a file of at most so many bytes after another, the index last."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name in sorted(state):
        size += state[name].nbytes
        if size > shard_bytes and shards[-1]:
            shards.append({})
            size = state[name].nbytes
        shards[-1][name] = state[name].contiguous()
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        checkpoint.write_tensors(directory / name, shard, {"format": "pt"})
    place = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    total = {"total_size": sum(tensor.nbytes for tensor in state.values())}
    checkpoint.write_text(directory / "model.safetensors.index.json", json.dumps({"metadata": total, "weight_map": place}, indent=2))


def write_reflector(directory: Path, reflector: LlavaReflector) -> None:
    """Its backbone in LLaVA-OneVision's layout, which transformers reads; the head is not part of it."""
    directory.mkdir(parents=True, exist_ok=True)
    reflector.llava.model.save_pretrained(directory)
    reflector.llava.prompt.tokenizer.save(str(directory / "tokenizer.json"))
    side = {"height": reflector.config.image, "width": reflector.config.image}
    pixels = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": side, "do_rescale": True, "rescale_factor": 1 / 255, "resample": 3}
    checkpoint.write_text(directory / "preprocessor_config.json", json.dumps(pixels, indent=2))

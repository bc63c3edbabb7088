"""Published checkpoint directories of OpenVLA-OFT, read; nothing of them is unpickled but tensors, and no code of theirs runs.

    config.json, tokenizer.json, preprocessor_config.json    the model, its words, what its pixels are normalised by
    model.safetensors, or shards and their index             the model's weights, LoRA merged
    action_head--N_checkpoint.pt                             after N steps of fine-tuning
    proprio_projector--N_checkpoint.pt
    scale_head--N_checkpoint.pt                              ours; RIPT-VLA's `*_scale_header.pth` is read too, where it is named
    dataset_statistics.json                                  of the data sets that it was fine-tuned on, by name
    lora_adapter/                                            the LoRA that was merged, in PEFT's format

The output layer, the last vision blocks, the final vision norms and SigLIP's pooling have no influence on actions: they are not read. Sizes of a
model other than the released one, whose towers have a name in timm, stand in config.json under `worldenv_towers`.
Source: the published code's behaviour (moojink/openvla-oft), Kim et al. 2025 (arXiv:2502.19645).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from worldenv import checkpoint, noise
from worldenv.checkpoint import CheckpointError
from worldenv.config import PolicyConfig, VisionConfig
from worldenv.policy import lora
from worldenv.policy.heads import L1Head, ProprioProjector, ScaleHead, begin
from worldenv.policy.openvla_oft import Network, OpenVLAOFT
from worldenv.policy.processing import PromptTokenizer, Statistics
from worldenv.policy.weights import fill, from_published
from worldenv.presets import OPENVLA_OFT

_TIMM = ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"]
"""The released towers, DINOv2 first."""
_SMALL = ("action_head", "proprio_projector", "scale_head")
"""What is not the backbone, and has a file of its own."""
_START = 1  # number of this draw in Stream.WEIGHTS; a whole policy's is 0


def _json(path: Path) -> dict[str, Any]:
    return checkpoint.read_published(path, "an OpenVLA-OFT checkpoint directory")


def _towers(stated: Mapping[str, Any], where: Path) -> tuple[VisionConfig, VisionConfig]:
    if "worldenv_towers" in stated:
        dino, siglip = (VisionConfig(**one) for one in stated["worldenv_towers"])
        return dino, siglip
    if stated.get("timm_model_ids") != _TIMM:
        raise CheckpointError(f"{where}: timm_model_ids {stated.get('timm_model_ids')}, want {_TIMM}: DINOv2 first, then SigLIP")
    return OPENVLA_OFT.dino, OPENVLA_OFT.siglip


def _model(directory: Path) -> PolicyConfig:
    """What config.json and preprocessor_config.json state."""
    where = directory / "config.json"
    stated = _json(where)
    if stated.get("model_type") != "openvla":
        raise CheckpointError(f"{where}: model_type {stated.get('model_type')!r}, want 'openvla'")
    dino, siglip = _towers(stated, where)
    text, known = stated.get("text_config", {}), OPENVLA_OFT.llama  # what is not stated is transformers' LlamaConfig's default, Llama-2-7B's
    if text.get("model_type") != "llama" or text.get("rope_scaling") is not None:
        raise CheckpointError(f"{where}: text_config {text.get('model_type')!r}, rope_scaling {text.get('rope_scaling')}: want a plain llama")
    names = {
        "width": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads", "ffn": "intermediate_size", "vocab": "vocab_size",
        "kv_heads": "num_key_value_heads", "rms_eps": "rms_norm_eps", "rope_theta": "rope_theta",
    }  # fmt: skip
    llama = replace(known, **{ours: text[theirs] for ours, theirs in names.items() if theirs in text})
    where = directory / "preprocessor_config.json"
    pixels = _json(where).get("tvf_normalize_params", [])
    if len(pixels) != 2 or set(pixels[1].get("mean", [])) | set(pixels[1].get("std", [])) != {0.5}:
        raise CheckpointError(f"{where}: tvf_normalize_params {pixels}: want DINOv2's mean and std, then 0.5 throughout for SigLIP")
    return replace(
        OPENVLA_OFT, image=stated.get("image_sizes", [OPENVLA_OFT.image])[0], dino=dino, siglip=siglip, llama=llama,
        dino_mean=tuple(pixels[0]["mean"]), dino_std=tuple(pixels[0]["std"]),
    )  # fmt: skip


def _weights(directory: Path) -> dict[str, torch.Tensor]:
    """The model's tensors by published name, from one file or from all shards of the index; their bytes are read when they are looked at."""
    index = directory / "model.safetensors.index.json"
    place = _json(index).get("weight_map", {}) if index.is_file() else None
    files = sorted(set(place.values())) if place is not None else ["model.safetensors"]
    found: dict[str, torch.Tensor] = {}
    for name in files:
        path = directory / str(name)
        if path.parent != directory or not path.is_file():
            raise CheckpointError(f"{path}: no such file; {'the index names it' if place else 'the weights are there, or in shards with an index'}")
        try:
            with safe_open(path, framework="pt") as opened:
                found |= {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 -- not a dict
        except SafetensorError as error:
            raise CheckpointError(f"{path}: truncated or damaged ({error}); download it again") from error
    if place and (lost := sorted(place.keys() - found.keys())):
        raise CheckpointError(f"{directory / str(place[lost[0]])}: {len(lost)} tensors that the index promises are not there: {lost[:3]}")
    return found


def _tensors(path: Path) -> dict[str, Any]:
    """A `.pt` file of tensors by name. CheckpointError as `checkpoint.read_foreign`, and where it holds anything else."""
    found = checkpoint.read_foreign(path)
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: a {type(found).__name__}, want tensors by name")
    return found


def _step(directory: Path, step: int | None) -> str:
    """N of `action_head--N_checkpoint.pt`: the one that is there, or `step`."""
    there = sorted(path.name.removeprefix("action_head--").removesuffix("_checkpoint.pt") for path in directory.glob("action_head--*_checkpoint.pt"))
    if not there or (step is not None and str(step) not in there):
        raise CheckpointError(f"{directory}/action_head--{'N' if step is None else step}_checkpoint.pt: no such file; there are {there or 'none'}")
    if step is None and len(there) > 1:
        raise CheckpointError(f"{directory}: action heads of steps {', '.join(there)}: say which (--step of worldenv-eval run), or keep one")
    return there[0] if step is None else str(step)


def _scale_tensors(path: Path) -> dict[str, torch.Tensor]:
    """A scale head of either form under our names."""
    found = _tensors(path)
    if found.keys() == {"scale_trunk", "log_b_head"}:  # RIPT-VLA's
        return {f"{ours}.{name}": t for ours, theirs in (("trunk", "scale_trunk"), ("log_b_head", "log_b_head")) for name, t in found[theirs].items()}
    return found


def open_directory(
    directory: Path, dataset: str | None = None, step: int | None = None, scale_head: Path | None = None, dtype: torch.dtype | None = torch.bfloat16,
    base: bool = False, seed: int = 0, images: int = 1,
) -> OpenVLAOFT:  # fmt: skip
    """The policy in a published directory, on the CPU: backbone in `dtype`, heads and proprio projector in float32. Without a `dtype` the backbone is
    as its files have it, which are read when it is looked at: nobody has to hold what is only to be checked.

    `dataset` and `step` choose where the directory holds several; `images` says how many views the model was trained with, of which the directory
    says nothing (the released LIBERO models: 2). Without a scale head, in the directory or at `scale_head`, there is the published
    start of one, a function of `seed`. `base` takes the LoRA in `lora_adapter/` out again, to rounding. CheckpointError or ValueError with one line
    names a file that is missing, damaged or foreign, and tensors that are missing, unknown or of another shape.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory; give an OpenVLA-OFT checkpoint's")
    if film := sorted(directory.glob("vision_backbone--*_checkpoint.pt")):
        raise CheckpointError(f"{film[0]}: this policy has FiLM layers, which are not built here; use a checkpoint without")
    config, number = _model(directory), _step(directory, step)
    tokenizer = PromptTokenizer.published(directory / "tokenizer.json")
    statistics = _statistics(directory / "dataset_statistics.json", dataset)
    head, proprio = (_tensors(directory / f"{name}--{number}_checkpoint.pt") for name in ("action_head", "proprio_projector"))
    own = directory / f"scale_head--{number}_checkpoint.pt"
    scale = _scale_tensors(scale_head or own) if scale_head or own.is_file() else {}
    weights = _weights(directory)
    if base:
        weights = lora.unmerge(weights, lora.Adapter.read(directory / "lora_adapter"))
    config = replace(
        config,
        images=images,
        proprio=len(statistics.proprio.q01),
        head_width=_length(head, "fc1.bias", config.head_width),
        head_blocks=len({name.split("mlp_resnet_blocks.")[1].split(".")[0] for name in head if "mlp_resnet_blocks." in name}),
        scale_form="trunk" if "log_b_head.weight" in scale else "mlp",
    )
    with torch.device("meta"):
        network = Network(config)
    state = from_published(weights, head, proprio, scale or _fresh(config, seed)["scale_head"], config)
    _assign(network, state, dtype, directory)
    return OpenVLAOFT(config, network, tokenizer, statistics)


def open_base(
    directory: Path, statistics: Statistics, dtype: torch.dtype, seed: int = 0, head: Literal["laplace", "tokens"] = "laplace"
) -> OpenVLAOFT:
    """The model in a published directory as a start of fine-tuning on the demonstrations of `statistics`, on the CPU, with fresh heads.

    OpenVLA's own directories, which have no heads, are read too. The `head` of tokens is not fresh: it is the model's own output layer, in float32.
    Errors as in `open_directory`.
    """
    config, state, tokenizer = _base(directory, head)
    config = replace(config, proprio=len(statistics.proprio.q01))
    with torch.device("meta"):
        network = Network(config)
    fresh = _fresh(config, seed)
    readers = [fresh[name] for name in ("action_head", "scale_head")] if head == "laplace" else [{}, {}]
    _assign(network, state | from_published({}, readers[0], fresh["proprio_projector"], readers[1], config), dtype, directory)
    return OpenVLAOFT(config, network, tokenizer, statistics)


def want_base(directory: Path, head: Literal["laplace", "tokens"] = "laplace") -> None:
    """Raises what `open_base` would, by names and shapes alone: in seconds, and in no memory to speak of."""
    config, state, _ = _base(directory, head)
    with torch.device("meta"):
        network = Network(config)
    fresh = {name: tensor for name, tensor in network.state_dict().items() if name.startswith(_SMALL)}
    fill(network, fresh | state, str(directory), assign=True)


def _base(directory: Path, head: Literal["laplace", "tokens"]) -> tuple[PolicyConfig, dict[str, torch.Tensor], PromptTokenizer]:
    """Sizes, weights of the backbone (and of the `head` of tokens) by our names, and words of a start of fine-tuning; the weights are read when they
    are looked at. Errors as in `open_directory`.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory; give an OpenVLA or OpenVLA-OFT checkpoint's")
    config = _model(directory)
    config = replace(config, head_width=config.llama.width, head=head)  # the published heads are as wide as the model
    state = from_published(_weights(directory), {}, {}, {}, config)
    if head == "tokens" and not ("token_head.weight" in state and state["token_head.weight"].any()):
        raise CheckpointError(
            f"{directory}: language_model.lm_head.weight is missing or zero for the action tokens, as where a policy with an L1 head was written; "
            "start from OpenVLA's own"
        )
    return config, state, PromptTokenizer.published(directory / "tokenizer.json")


def _fresh(config: PolicyConfig, seed: int) -> dict[str, dict[str, torch.Tensor]]:
    """Random heads and proprio projector, a function of `seed`, the scale head at the published start."""
    generator = torch.Generator().manual_seed(noise.torch_seed(seed, noise.Stream.WEIGHTS, _START))
    scale = ScaleHead(config.llama.width, config.head_width, config.head_blocks, config.scale_form)
    made: dict[str, nn.Module] = {
        "scale_head": scale,
        "action_head": L1Head(config.llama.width, config.head_width, config.head_blocks),
        "proprio_projector": ProprioProjector(config.proprio, config.llama.width),
    }
    for module in made.values():
        begin(module, generator)
    scale.begin()
    return {name: module.state_dict() for name, module in made.items()}


def _assign(network: Network, state: Mapping[str, torch.Tensor], dtype: torch.dtype | None, directory: Path) -> None:
    wide = (*_SMALL, "token_head")
    cast = {name: t.to(torch.float32 if name.startswith(wide) else dtype or t.dtype) for name, t in state.items()}
    fill(network, cast, str(directory), assign=True)


def _length(tensors: Mapping[str, torch.Tensor], ending: str, otherwise: int) -> int:
    return next((len(tensor) for name, tensor in tensors.items() if name.endswith(ending)), otherwise)


def dataset_of(directory: Path, suite: str) -> str | None:
    """The data set of LIBERO's `suite` in the statistics of `directory`, by its published names; None where it has none of them."""
    file = directory / "dataset_statistics.json"
    there = _json(file) if file.is_file() else {}
    return next((name for name in (f"{suite}_no_noops", suite) if name in there), None)


def _statistics(file: Path, dataset: str | None) -> Statistics:
    names = sorted(_json(file))
    if dataset is None and len(names) != 1:
        flags = "--dataset of worldenv-eval run, --sft.dataset of worldenv-train"
        raise CheckpointError(f"{file}: statistics of {', '.join(names)}: say which data set ({flags})")
    return Statistics.published(file, names[0] if dataset is None else dataset)

"""Where a reflector comes from and goes to: fresh weights, our one-file checkpoints, published directories, and files with the head alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from worldenv import checkpoint, noise
from worldenv.config import ReflectorConfig, to_dict
from worldenv.reflector import classifier
from worldenv.reflector.classifier import ClassifierReflector
from worldenv.reflector.head import RewardHead
from worldenv.reflector.judge import LlavaReflector
from worldenv.reflector.llava import Llava, architecture, backbone, described
from worldenv.reflector.prompt import Prompt, word_tokenizer

if TYPE_CHECKING:  # see llava.py
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

KIND = "llava reflector 1"
_BACKBONE, _HEAD = 100, 101  # numbers of these networks in Stream.WEIGHTS


class ReflectorError(checkpoint.CheckpointError):
    """A reflector's file or directory that cannot be used. The message names it and the cure."""


def fresh_head(config: ReflectorConfig, seed: int) -> RewardHead:
    """A reward head with weights of its own, a function of `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(noise.torch_seed(seed, noise.Stream.WEIGHTS, _HEAD))
        return RewardHead(config.width, config.head_width)


def initialise(config: ReflectorConfig, instructions: Sequence[str], seed: int) -> LlavaReflector:
    """A reflector of the given size with random weights, a function of `seed`, that knows the words of `instructions`; on the CPU, without a head."""
    prompt = Prompt(word_tokenizer(instructions))
    hf = architecture(config, prompt.tokenizer.get_vocab_size(), prompt.image, prompt.video)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(noise.torch_seed(seed, noise.Stream.WEIGHTS, _BACKBONE))
        model = backbone(hf)
    with torch.no_grad():  # by default much weaker than what a patch shows, and then some seeds do not learn for hundreds of steps where things are
        model.model.vision_tower.embeddings.position_embedding.weight.mul_(config.vision_width**0.5)
    return LlavaReflector(config, Llava(model, prompt), None)


def load_judge(path: Path) -> LlavaReflector | ClassifierReflector:
    """What the stage reward left in `path`, on the CPU, whichever judge that is. Raises CheckpointError, which names the file and the cure."""
    tree = checkpoint.load(path)
    if isinstance(tree, dict) and tree.get("kind") == classifier.KIND:
        return classifier.from_tree(tree, str(path))
    return from_tree(tree, str(path))


def to_tree(reflector: LlavaReflector) -> dict[str, Any]:
    """The whole reflector as a tree for `checkpoint`."""
    return {
        "kind": KIND,
        "config": to_dict(reflector.config),
        "backbone": json.loads(reflector.llava.model.config.to_json_string(use_diff=False)),
        "tokenizer": reflector.llava.prompt.tokenizer.to_str(),
        "weights": dict(reflector.llava.model.state_dict()),
        "head": None if reflector.head is None else dict(reflector.head.state_dict()),
    }


def from_tree(tree: Any, name: str) -> LlavaReflector:
    """The inverse of `to_tree`; `name` says in errors where the tree came from."""
    from transformers import LlavaOnevisionConfig

    if not isinstance(tree, dict) or tree.get("kind") != KIND:
        raise ReflectorError(f"{name}: no reflector ({KIND}); was it written by the stage reward?")
    config = ReflectorConfig(**tree["config"])
    model = _unfilled(LlavaOnevisionConfig.from_dict(tree["backbone"]))
    _fill(model, tree["weights"], f"{name}: backbone")
    model.tie_weights()
    head = None
    if tree["head"] is not None:
        with torch.device("meta"):
            head = RewardHead(config.width, config.head_width)
        _fill(head, tree["head"], f"{name}: reward head")
    return LlavaReflector(config, Llava(model, Prompt(Tokenizer.from_str(tree["tokenizer"]))), head)


def _unfilled(config: LlavaOnevisionConfig) -> LlavaOnevisionForConditionalGeneration:
    """transformers' model whose weights are to be filled: no memory is taken and no number drawn for them, of which there may be 8 billion.

    What is in no file is computed: places, and rotary frequencies, in float32 whatever the weights are.
    """
    with torch.device("meta"):
        model = backbone(config)
    language, places = model.model.language_model, model.model.vision_tower.embeddings
    language.rotary_emb = type(language.rotary_emb)(config.text_config)
    places.position_ids = torch.arange(places.num_positions).expand((1, -1))
    return model


def _fill(module: torch.nn.Module, weights: dict[str, torch.Tensor], name: str) -> None:
    """Put all of `weights` into `module`, in their types, or ReflectorError with the names that are missing, unknown or of another shape."""
    own = module.state_dict()
    missing, unknown = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    other = sorted(key for key in own.keys() & weights.keys() if own[key].shape != weights[key].shape)
    if missing or unknown or other:
        raise ReflectorError(f"{name}: missing {missing[:3]}, unknown {unknown[:3]}, of another shape {other[:3]}")
    module.load_state_dict(weights, assign=True)


def _json(path: Path) -> dict[str, Any]:
    return checkpoint.read_published(path, "a LLaVA-OneVision directory in the layout of transformers", ReflectorError)


def _published_prompt(path: Path) -> Prompt:
    if not path.is_file():
        raise ReflectorError(f"{path}: no such file; a LLaVA-OneVision directory in the layout of transformers holds it")
    try:
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_padding()  # a file keeps what its tokenizer was last used with, and would pad or cut the question by that
        tokenizer.no_truncation()
        return Prompt(tokenizer)
    except Exception as error:  # tokenizers raises plain Exception
        raise ReflectorError(f"{path}: {error}") from error


def open_directory(directory: Path, like: ReflectorConfig, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> LlavaReflector:
    """A published LLaVA-OneVision directory as it is, frozen, on `device` and without a reward head. On "meta" weights are not read, which takes no
    memory to speak of: for who would know whether it can be opened.

    Sizes come from the directory, the rest (frames, sampler, pooling, head_width, threshold) from `like`. Only safetensors are read, nothing is
    downloaded and no code of the directory runs. Raises ReflectorError, one line, for a missing or damaged file, another kind of model, weights that
    are missing, unknown or of another shape, a tokenizer of another model, or pixels normalised otherwise than with mean = std = 0.5.
    """
    from transformers import LlavaOnevisionForConditionalGeneration

    stated, pixels = (_json(directory / name) for name in ("config.json", "preprocessor_config.json"))
    if stated.get("model_type") != "llava_onevision":
        raise ReflectorError(f"{directory}/config.json: model_type {stated.get('model_type')!r}, want 'llava_onevision'")
    if any(set(pixels.get(name) or []) != {0.5} for name in ("image_mean", "image_std")):
        raise ReflectorError(
            f"{directory}/preprocessor_config.json: image_mean {pixels.get('image_mean')}, image_std {pixels.get('image_std')}: "
            "the vision tower was trained with 0.5 for all; restore the published file"
        )
    prompt = _published_prompt(directory / "tokenizer.json")
    for path in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise ReflectorError(f"{path}: truncated or damaged ({error}); download it again") from error
    try:
        model, report = LlavaOnevisionForConditionalGeneration.from_pretrained(
            directory, local_files_only=True, use_safetensors=True, dtype=dtype, attn_implementation="sdpa", output_loading_info=True,
            ignore_mismatched_sizes=True, device_map=None if device == "cpu" else device,  # which wants accelerate
        )  # fmt: skip
        config = described(model.config, like)
    except Exception as error:  # transformers has many kinds for a config or a file that it cannot use
        raise ReflectorError(f"{directory}: {' '.join(str(error).split())}") from error
    for what, keys in (("no weights", "missing_keys"), ("weights of another shape", "mismatched_keys"), ("unknown weights", "unexpected_keys")):
        if names := sorted(key if isinstance(key, str) else f"{key[0]} {tuple(key[1])}, want {tuple(key[2])}" for key in report[keys]):
            raise ReflectorError(f"{directory}: {what} for {len(names)} tensors of config.json's model: {names[:3]}; is a file of another model?")
    numbers = {name: getattr(model.config, f"{name}_token_index") for name in ("video", "image")}
    if numbers != {"video": prompt.video, "image": prompt.image}:
        raise ReflectorError(f"{directory}/tokenizer.json: <video> {prompt.video}, <image> {prompt.image}; config.json says {numbers}")
    return LlavaReflector(config, Llava(model, prompt), None).freeze()

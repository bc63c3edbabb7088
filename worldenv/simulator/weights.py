"""Somebody else's names and files to our simulator: EnerVerse-AC's checkpoints in both layouts, and DynamiCrafter as an initialisation.

Our networks keep the published parameter names, so the table is one of prefixes; what is left out of a file, too much in it or of another
shape is named, all of it. Nothing in a file is executed; ours are safetensors (worldenv.checkpoint).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from worldenv import checkpoint, console
from worldenv import config as configs
from worldenv.checkpoint import CheckpointError
from worldenv.simulator.evac import Evac

Tensors = dict[str, torch.Tensor]

PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "action_resampler": "cond_stage_model.",
    "image_resampler": "image_proj_model.",
    "clip": "embedder.model.visual.",
}
"""Part of `Evac` -> prefix of its tensors in a released file."""

_WRAPPERS = re.compile(r"^(_forward_module\.|module\.)+")  # DeepSpeed's and DistributedDataParallel's
_NO_WEIGHTS = re.compile(
    r"^(betas|alphas_cumprod|alphas_cumprod_prev|sqrt_alphas_cumprod|sqrt_one_minus_alphas_cumprod|log_one_minus_alphas_cumprod"
    r"|sqrt_recip_alphas_cumprod|sqrt_recipm1_alphas_cumprod|posterior_variance|posterior_log_variance_clipped|posterior_mean_coef[12]"
    r"|scale_arr|scale_factor|logvar|lvlb_weights|embedder\.(mean|std)|embedder\.model\.(?!visual\.).*)$"
)
"""Schedule tables, which we compute, and the text half of CLIP, which is never run."""
DEAD = {
    "unet": re.compile(r"\.attn2\.to_[kv](_ip|_tp)?\.weight$"),  # the keys and values of the tokens that a block does not attend to
    "clip": re.compile(r"^(ln_post\.(weight|bias)|proj)$"),  # after the last layer
}
"""Tensors of released files that have no influence on anything; matched only where our networks have no such name."""
_CLIP_TEXT = re.compile(r"^(transformer\.|token_embedding\.|ln_final\.|positional_embedding$|text_projection$|logit_scale$|attn_mask$)")
"""The text half of an open_clip file."""
_FEW = 8  # names of tensors that are passed over
Misfits = dict[str, list[str]]
"""Kind ("missing", "too much", "mis-shaped") -> names of tensors."""


def read(path: Path) -> Tensors:
    """All tensors of a released checkpoint under their Lightning names: .safetensors, or a torch file in Lightning or DeepSpeed layout.

    Their bytes are read when they are looked at: the file must stay as it is. Raises CheckpointError as `checkpoint.read_foreign`, and where there
    are no tensors in it.
    """
    state = checkpoint.read_foreign(path)
    for layer in ("state_dict", "module"):
        if isinstance(state, dict) and isinstance(state.get(layer), dict):
            state = state[layer]
    tensors = {str(name): value for name, value in state.items() if isinstance(value, torch.Tensor)} if isinstance(state, dict) else {}
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors under 'state_dict', 'module' or at its top")
    return {_WRAPPERS.sub("", name): value for name, value in tensors.items()}


def split(state: Mapping[str, torch.Tensor], name: str) -> dict[str, Tensors]:
    """`state` by part of `Evac`, without prefixes; `name` says whose they are. A line on the console tells of tensors of no known part (averages
    beside the weights, what only training needs), which are passed over. Raises CheckpointError where there are no others.
    """
    parts: dict[str, Tensors] = {part: {} for part in PREFIXES}
    strange = []
    for key, value in state.items():
        part = next((part for part, prefix in PREFIXES.items() if key.startswith(prefix)), None)
        if part is not None:
            parts[part][key.removeprefix(PREFIXES[part])] = value
        elif not _NO_WEIGHTS.match(key):
            strange.append(key)
    if strange:
        few = ", ".join(sorted(strange)[:_FEW]) + (f" and {len(strange) - _FEW} more" if len(strange) > _FEW else "")
        if not any(parts.values()):
            raise CheckpointError(f"{name}: all tensors are of no known part: {few}; want a released EVAC, or DynamiCrafter-512")
        console.say(f"{name}: passed over {len(strange)} tensors of no known part: {few}")
    return parts


def _fitting(module: nn.Module, weights: Mapping[str, torch.Tensor], dead: re.Pattern[str] | None) -> tuple[Tensors, Misfits]:
    """Those of `weights` that are for `module`, without `dead` ones, and how they do not fit it."""
    own = dict(module.state_dict())
    given = {key: value for key, value in weights.items() if key in own or not (dead and dead.search(key))}
    mis_shaped = [
        f"{key} {tuple(given[key].shape)}, want {tuple(own[key].shape)}"
        for key in sorted(own)
        if key in given and given[key].shape != own[key].shape
    ]
    wrong = {"missing": sorted(own.keys() - given.keys()), "too much": sorted(given.keys() - own.keys()), "mis-shaped": mis_shaped}
    return given, {kind: names for kind, names in wrong.items() if names}


def _copy(module: nn.Module, given: Mapping[str, torch.Tensor]) -> None:
    """Into `module`; on the meta device, where names and shapes are all that there is, nothing is."""
    if not any(tensor.is_meta for tensor in module.state_dict().values()):
        module.load_state_dict(given)


def _listed(misfits: Misfits) -> str:
    return "; ".join(f"{kind}: {', '.join(names)}" for kind, names in misfits.items())


def fill(module: nn.Module, weights: Mapping[str, torch.Tensor], name: str, dead: re.Pattern[str] | None = None) -> None:
    """Copy `weights` into `module`, all or nothing; names that match `dead` and are not ours are dropped.

    Raises CheckpointError that names every tensor that is missing, too much or of another shape.
    """
    given, misfits = _fitting(module, weights, dead)
    if misfits:
        raise CheckpointError(f"{name}: {_listed(misfits)}")
    _copy(module, given)


def _fill_parts(simulator: Evac, parts: Mapping[str, Tensors], name: str) -> None:
    """As `fill`, several parts of `simulator` at once: all of them or none."""
    fitting = {part: _fitting(getattr(simulator, part), weights, DEAD.get(part)) for part, weights in parts.items()}
    if wrong := {part: misfits for part, (_, misfits) in fitting.items() if misfits}:
        cure, latents = "", parts.get("image_resampler", {}).get("latents")
        if latents is not None and any(one.startswith("latents ") for one in wrong.get("image_resampler", {}).get("mis-shaped", [])):
            cure = f". It has {latents.shape[1]} image tokens, these settings {simulator.config.image_resampler.queries}: "
            cure += "take simulator.image_resampler.queries from the file (128: RLinf's fine-tuned EVAC, presets.EVAC_RLINF)"
        if not parts.get("clip", True):
            cure += ". It holds no image tower of CLIP: give open_clip's file beside it (world.clip; --clip of worldenv-imagine)"
        raise CheckpointError(f"{name}: " + "; ".join(f"{part}: {_listed(misfits)}" for part, misfits in wrong.items()) + cure)
    for part, (given, _) in fitting.items():
        _copy(getattr(simulator, part), given)


def load_published(simulator: Evac, state: Mapping[str, torch.Tensor], name: str, without: Iterable[str] = ()) -> None:
    """Copy a released checkpoint's tensors (from `read`) into `simulator`.

    `without` names parts that the file may lack, such as "clip", whose weights come from elsewhere; they stay as they are. Raises
    CheckpointError as `split` and `fill` do. The file has no statistics of deltas: set `delta_mean`, `delta_std` from the robot's data.
    """
    parts, optional = split(state, name), set(without)
    if unknown := optional - PREFIXES.keys():
        raise ValueError(f"without={sorted(unknown)}: parts are {', '.join(PREFIXES)}")
    _fill_parts(simulator, {part: weights for part, weights in parts.items() if weights or part not in optional}, name)


def load_clip(simulator: Evac, state: Mapping[str, torch.Tensor], name: str) -> None:
    """Copy an open_clip file's image tower (ViT-H/14, from `read`) into `simulator`: for a released file that has none."""
    tower = {key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.") or not _CLIP_TEXT.match(key)}
    _fill_parts(simulator, {"clip": tower}, name)


def load_dynamicrafter(simulator: Evac, state: Mapping[str, torch.Tensor], name: str) -> list[str]:
    """Initialise from DynamiCrafter-512's tensors (from `read`); returns the names that it has no weights for, which stay as they are.

    Those are the domain embedding and the action tokens' keys and values; the first convolution's new input channels start at zero.
    Its text encoder is not used. Raises CheckpointError where anything else is missing, too much or mis-shaped.
    """
    parts = split({key: value for key, value in state.items() if not key.startswith(PREFIXES["action_resampler"])}, name)
    own, given = simulator.unet.state_dict(), dict(parts["unet"])
    new = [key for key in own if key.startswith("domain_embedding.") or re.search(r"\.attn2\.to_[kv]_tp\.weight$", key)]
    first = "input_blocks.0.0.weight"
    if first in given and given[first].shape[1] < own[first].shape[1]:
        widened = torch.zeros_like(own[first])
        widened[:, : given[first].shape[1]] = given[first]
        given[first] = widened
    others = {part: parts[part] for part in ("vae", "image_resampler", "clip")}
    _fill_parts(simulator, {"unet": given | {key: own[key] for key in new}, **others}, name)
    kept = [f"unet.{key}" for key in new]
    return [*kept, *(f"action_resampler.{key}" for key in simulator.action_resampler.state_dict())]


def begin_from(
    path: Path, config: configs.SimulatorConfig, seed: int, device: torch.device, clip: Path | None = None
) -> tuple[Evac, list[str]]:
    """A simulator on `device` that begins from `path`, for training: ours, released EVAC, or DynamiCrafter-512, told apart by what they hold.

    `clip` is an open_clip file, for a released EVAC without its image tower. Returns also the names that the file has no weights for, which are
    random, a function of `seed`. Raises CheckpointError as the functions for each, and where `clip` is given beside another file.
    """
    ours = is_ours(path)
    state = {} if ours else read(path)
    released = f"{PREFIXES['unet']}domain_embedding.weight" in state
    if clip is not None and not released:
        raise CheckpointError(f"{clip}: is for a released EVAC that lacks its image tower, and {path} is none; leave it away")
    if not ours and not released:
        simulator = Evac.unfilled(config, device) if device.type == "meta" else Evac.initialised(config, seed)
        new = load_dynamicrafter(simulator, state, str(path))
        return simulator.to(device), new
    simulator = Evac.unfilled(config, device)  # from the file to the device: of many processes, each would have a copy on the host
    if ours:
        fill(simulator, _ours(checkpoint.load(path), str(path))["weights"], str(path))
    else:
        _load_released(simulator, state, str(path), clip)
    return simulator, []


def want_beginning(config: configs.SimulatorConfig, path: Path, clip: Path | None = None) -> None:
    """Raises what `begin_from` would raise of a simulator of `config`, by names and shapes alone: in seconds, and in no memory to speak of."""
    begin_from(path, config, 0, torch.device("meta"), clip)


def _load_released(simulator: Evac, state: Mapping[str, torch.Tensor], name: str, clip: Path | None) -> None:
    """A released EVAC's tensors, its image tower from file `clip` where that is given."""
    load_published(simulator, state, name, without=["clip"] if clip else [])
    if clip is not None:
        load_clip(simulator, read(clip), str(clip))


def _ours(tree: Any, name: str) -> dict[str, Any]:
    if not isinstance(tree, dict) or tree.keys() != {"config", "weights"}:
        raise CheckpointError(f"{name}: not a simulator; give the simulator.safetensors of a run's stage world")
    return tree


def to_tree(simulator: Evac) -> dict[str, Any]:
    """What `worldenv.checkpoint.save` keeps of a simulator."""
    return {"config": configs.to_dict(simulator.config), "weights": dict(simulator.state_dict())}


def from_tree(tree: Any, name: str) -> Evac:
    """The simulator that `to_tree` kept, on the CPU. Raises CheckpointError where it is of something else or its tensors do not fit."""
    tree = _ours(tree, name)
    try:
        config = configs.from_dict(configs.SimulatorConfig, tree["config"])
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{name}: {error}") from error
    simulator = Evac.unfilled(config)
    fill(simulator, tree["weights"], name)
    return simulator.eval()


def is_ours(path: Path) -> bool:
    """Whether `path` is a file of `worldenv.checkpoint`, by its header."""
    try:
        with safe_open(path, framework="pt") as opened:
            return checkpoint.FORMAT in (opened.metadata() or {})
    except (SafetensorError, OSError):
        return False


def load(path: Path, released: configs.SimulatorConfig, clip: Path | None = None) -> Evac:
    """The simulator in `path`, on the CPU: ours, with the settings that it keeps, or a released EVAC with the settings `released`.

    `clip` is an open_clip file, for a released file without its image tower. Raises CheckpointError as `read` and `load_published` do.
    """
    if is_ours(path):
        return from_tree(checkpoint.load(path), str(path))
    state = read(path)
    simulator = Evac.unfilled(released)
    _load_released(simulator, state, str(path), clip)
    return simulator.eval()

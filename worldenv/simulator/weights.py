"""Somebody else's names and files to our simulator: EnerVerse-AC's checkpoints in both layouts, and DynamiCrafter as an initialisation.

Our networks keep the published parameter names, so the table is one of prefixes; what is left out of a file, too much in it or of another
shape is named, all of it. Files are read without executing anything (`weights_only=True`); ours are safetensors (worldenv.checkpoint).
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

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

_DEEPSPEED = "_forward_module."
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
_LISTED = 8


def read(path: Path) -> Tensors:
    """All tensors of a released checkpoint under their Lightning names: .safetensors, or a torch file in Lightning or DeepSpeed layout.

    Raises CheckpointError where the file is missing, truncated, damaged, or holds anything but plain tensors and containers.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        state: Any = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: truncated, damaged, or not made of plain tensors ({reason}); get it again") from error
    for layer in ("state_dict", "module"):
        if isinstance(state, dict) and isinstance(state.get(layer), dict):
            state = state[layer]
    tensors = {str(name): value for name, value in state.items() if isinstance(value, torch.Tensor)} if isinstance(state, dict) else {}
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors under 'state_dict', 'module' or at its top")
    return {name.removeprefix(_DEEPSPEED): value for name, value in tensors.items()}


def split(state: Mapping[str, torch.Tensor], name: str) -> dict[str, Tensors]:
    """`state` by part of `Evac`, without prefixes. Raises CheckpointError for tensors of no known part; `name` says whose they are."""
    parts: dict[str, Tensors] = {part: {} for part in PREFIXES}
    strange = []
    for key, value in state.items():
        part = next((part for part, prefix in PREFIXES.items() if key.startswith(prefix)), None)
        if part is not None:
            parts[part][key.removeprefix(PREFIXES[part])] = value
        elif not _NO_WEIGHTS.match(key):
            strange.append(key)
    if strange:
        raise CheckpointError(f"{name}: tensors of no known part: {_some(strange)}")
    return parts


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
    return ", ".join(listed[:_LISTED]) + more


def fill(module: nn.Module, weights: Mapping[str, torch.Tensor], name: str, dead: re.Pattern[str] | None = None) -> None:
    """Copy `weights` into `module`, all or nothing; names that match `dead` and are not ours are dropped.

    Raises CheckpointError that names every tensor (the first few of each kind) that is missing, too much or of another shape.
    """
    own = dict(module.state_dict())
    given = {key: value for key, value in weights.items() if key in own or not (dead and dead.search(key))}
    mis_shaped = [
        f"{key} {tuple(given[key].shape)}, want {tuple(own[key].shape)}"
        for key in own
        if key in given and given[key].shape != own[key].shape
    ]
    wrong = {"missing": own.keys() - given.keys(), "too much": given.keys() - own.keys(), "mis-shaped": mis_shaped}
    if any(wrong.values()):
        raise CheckpointError(f"{name}: " + "; ".join(f"{kind}: {_some(names)}" for kind, names in wrong.items() if names))
    module.load_state_dict(given)


def load_published(simulator: Evac, state: Mapping[str, torch.Tensor], name: str, without: Iterable[str] = ()) -> None:
    """Copy a released checkpoint's tensors (from `read`) into `simulator`.

    `without` names parts that the file may lack, such as "clip", whose weights come from elsewhere; they stay as they are. Raises
    CheckpointError as `split` and `fill` do. The file has no statistics of deltas: set `delta_mean`, `delta_std` from the robot's data.
    """
    parts, optional = split(state, name), set(without)
    if unknown := optional - PREFIXES.keys():
        raise ValueError(f"without={sorted(unknown)}: parts are {', '.join(PREFIXES)}")
    for part, weights in parts.items():
        if weights or part not in optional:
            fill(getattr(simulator, part), weights, f"{name} ({part})", DEAD.get(part))


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
    fill(simulator.unet, given | {key: own[key] for key in new}, f"{name} (unet)", DEAD["unet"])
    for part in ("vae", "image_resampler", "clip"):
        fill(getattr(simulator, part), parts[part], f"{name} ({part})", DEAD.get(part))
    kept = [f"unet.{key}" for key in new]
    return [*kept, *(f"action_resampler.{key}" for key in simulator.action_resampler.state_dict())]


def to_tree(simulator: Evac) -> dict[str, Any]:
    """What `worldenv.checkpoint.save` keeps of a simulator."""
    return {"config": configs.to_dict(simulator.config), "weights": dict(simulator.state_dict())}


def from_tree(tree: Mapping[str, Any], name: str) -> Evac:
    """The simulator that `to_tree` kept, on the CPU. Raises CheckpointError where tensors do not fit the settings beside them."""
    simulator = Evac(configs.from_dict(configs.SimulatorConfig, tree["config"]))
    fill(simulator, tree["weights"], name)
    return simulator.eval()

"""OpenVLA-OFT, its heads, LOOP and its picture chain, as the golden cases want them: case directory in, named tensors out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from worldenv.config import LlamaConfig, PolicyConfig, VisionConfig
from worldenv.kernels.frames import centre_crop, resize_lanczos3
from worldenv.learning.loop.advantage import baseline, leave_one_out
from worldenv.learning.loop.loss import surrogate
from worldenv.policy import laplace
from worldenv.policy.heads import L1Head, ProprioProjector, ScaleHead
from worldenv.policy.jpeg import jpeg_round_trip
from worldenv.policy.openvla_oft import Network
from worldenv.policy.processing import Bounds, resized
from worldenv.policy.weights import fill, from_published

Tensors = dict[str, torch.Tensor]
HEADS = ("action_head.", "proprio_projector.", "scale_head.")


def _weights(folder: Path) -> Tensors:
    return {name: w.float() if w.is_floating_point() else w for name, w in load_file(folder / "weights.safetensors").items()}


def _below(weights: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}


def oft_head(folder: Path, case: dict[str, Any]) -> Tensors:
    """Both heads and the proprio projector in float32; density and LOOP in float64."""
    config, t, weights = case["config"], load_file(folder / "tensors.safetensors"), _weights(folder)
    sizes = (config["llm_dim"], config["hidden_dim"], config["num_blocks"])
    modules = [L1Head(*sizes), ProprioProjector(config["proprio_dim"], config["llm_dim"]), ScaleHead(*sizes, form="trunk")]
    for module, prefix in zip(modules, HEADS, strict=True):
        fill(module, _below(weights, prefix), f"{folder.name} {prefix}")
    action_head, proprio, scale_head = modules
    out: Tensors = {}
    with torch.no_grad():
        out["head.mu"] = action_head(t["head.hidden"])
        out["proprio.out"] = proprio(t["proprio.in"])
        out["scale.log_b"] = scale_head(t["head.hidden"])

    mu, beta = t["lap.mu"].requires_grad_(), t["lap.beta"].requires_grad_()
    log_scale = laplace.scale(beta, 1.0, 0.0)
    density = laplace.log_density(t["lap.action"], mu, log_scale)
    out["lap.dlogp_dmu"], out["lap.dlogp_dbeta"] = torch.autograd.grad(density.sum(), (mu, beta), retain_graph=True)
    out["lap.logp"] = density.detach()
    out["lap.logp_sum7"] = laplace.log_prob(t["lap.action"], mu, log_scale).detach()
    out["lap.nll_mean"] = laplace.nll(t["lap.action"], mu, log_scale).detach().reshape(1)
    out["lap.inverse_cdf_sample"] = laplace.sample(mu, log_scale, t["lap.u"]).detach()

    group, live, eps = torch.zeros(len(t["loop.rewards"]), dtype=torch.int64), t["loop.mask"].bool(), config["clip_eps"]
    out["loop.baseline"] = baseline(t["loop.rewards"], group)
    out["loop.advantage"] = leave_one_out(t["loop.rewards"], group)
    new = t["loop.new_logp"].requires_grad_()
    result = surrogate(new, t["loop.old_logp"], out["loop.advantage"], live, eps)
    out["loop.ratio"], out["loop.loss"] = result.ratio, result.loss.detach().reshape(1)
    (out["loop.grad_new_logp"],) = torch.autograd.grad(result.loss, new)

    mu_new, beta_new = t["e2e.mu_new"].requires_grad_(), t["e2e.beta_new"].requires_grad_()
    old = laplace.log_prob(t["e2e.action"], t["e2e.mu_old"], laplace.scale(t["e2e.beta_old"], 1.0, 0.0))
    scored = laplace.log_prob(t["e2e.action"], mu_new, laplace.scale(beta_new, 1.0, 0.0))
    result = surrogate(scored, old, out["loop.advantage"], live, eps)
    out["e2e.ratio"], out["e2e.loss"] = result.ratio, result.loss.detach().reshape(1)
    out["e2e.grad_mu_new"], out["e2e.grad_beta_new"] = torch.autograd.grad(result.loss, (mu_new, beta_new))
    return out


def network_of(folder: Path, case: dict[str, Any], **changes: Any) -> Network:
    """The case's network; `changes` replace fields of its PolicyConfig."""
    c, weights = case["config"], _weights(folder)
    dino, siglip, llm = c["dino"], c["siglip"], c["llm"]
    towers = [
        VisionConfig(
            s["embed_dim"], s["depth"], s["num_heads"], int(s["embed_dim"] * s.get("mlp_ratio", 4)), s["patch_size"], s.get("reg_tokens", 0)
        )
        for s in (dino, siglip)
    ]
    llama = LlamaConfig(
        llm["hidden_size"], llm["num_hidden_layers"], llm["num_attention_heads"], llm["intermediate_size"], llm["vocab_size"],
        llm["num_key_value_heads"], llm["rms_norm_eps"], llm["rope_theta"],
    )  # fmt: skip
    head = _below(weights, "action_head.model.")
    values: dict[str, Any] = {
        "image": c["image_size"], "dino": towers[0], "siglip": towers[1], "llama": llama, "head_width": len(head["fc1.bias"]),
        "head_blocks": len({name.split(".")[1] for name in head if name.startswith("mlp_resnet_blocks")}),
        "proprio": weights["proprio_projector.fc1.weight"].shape[1], "scale_form": "trunk",
    }  # fmt: skip
    embedding = torch.zeros(llama.vocab, llama.width)
    embedding[weights.pop("embed_tokens_used_rows.ids")] = weights.pop("embed_tokens_used_rows.values")
    vla = {name: w for name, w in weights.items() if not name.startswith(HEADS)} | {"language_model.model.embed_tokens.weight": embedding}
    config = PolicyConfig(**values | changes)
    network = Network(config)
    fill(network, from_published(vla, *(_below(weights, prefix) for prefix in HEADS), config=config), folder.name)
    return network


@torch.no_grad()
def oft_model(folder: Path, case: dict[str, Any]) -> Tensors:
    """End to end: single queries, and a right-padded batch with the published training layout, of which only the prompts are taken."""
    network, t = network_of(folder, case), load_file(folder / "tensors.safetensors")
    bounds = case["config"]["norm_stats"]["action"]
    action = Bounds(np.array(bounds["q01"]), np.array(bounds["q99"]), np.array(bounds["mask"]))
    out: Tensors = {}
    for name in sorted({key.split(".")[0] for key in t}):
        given = name if f"{name}.input_ids" in t else name.removesuffix("_noproprio")
        ids, lengths = t[f"{given}.input_ids"], None
        if f"{given}.labels" in t:
            lengths = (t[f"{given}.labels"] != -100).int().argmax(dim=1)  # the first action token comes right after the prompt
            ids = ids[:, : int(lengths.max())]
        pixels = t[f"{given}.pixel_values"].float()
        hidden = network(pixels, ids, lengths, None if name.endswith("_noproprio") else t[f"{given}.proprio"])
        out[f"{name}.vision_features"] = network.vision_backbone(pixels)
        out[f"{name}.projected"] = network.image_tokens(pixels)
        out[f"{name}.actions_hidden"] = hidden
        out[f"{name}.mu"] = network.action_head(hidden)
        out[f"{name}.log_b"] = network.scale_head(hidden)
        actions = action.unnormalise(out[f"{name}.mu"])
        out[f"{name}.actions_unnormalised"] = actions[0] if len(actions) == 1 else actions  # a single query is stored without its batch
    return {name: tensor for name, tensor in out.items() if name in t}


def preprocess(folder: Path, case: dict[str, Any]) -> dict[str, NDArray[np.uint8]]:
    """The published chain from the raw picture, stage by stage, with and without JPEG, at the case's sizes."""
    out: dict[str, NDArray[np.uint8]] = {}
    with np.load(folder / "images.npz", allow_pickle=False) as images:
        for name in sorted({key.split(".")[0] for key in images.files}):
            rotated = torch.from_numpy(images[f"{name}.raw"]).flip(0, 1)[None]
            written = jpeg_round_trip(rotated)
            size = case["tensors"][f"{name}.final"]["shape"][0]
            out[f"{name}.rotated"], out[f"{name}.after_jpeg"] = rotated[0].numpy(), written[0].numpy()
            out[f"{name}.after_resize"] = resize_lanczos3(written, size)[0].numpy()
            out[f"{name}.resize_no_jpeg"] = resize_lanczos3(rotated, size)[0].numpy()
            out[f"{name}.final_no_jpeg"] = centre_crop(resized(rotated, size, jpeg=False), 0.9)[0].numpy()
            out[f"{name}.final"] = centre_crop(resized(rotated, size, jpeg=True), 0.9)[0].numpy()
    return out


KINDS: dict[str, Callable[[Path, dict[str, Any]], dict[str, Any]]] = {
    "oft_head": oft_head,
    "oft_model": oft_model,
    "preprocess": preprocess,
}

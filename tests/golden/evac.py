"""EVAC's networks, sampler, chunk loop and action maps, as the golden cases want them: case directory in, named tensors out."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import nn

from worldenv import action_map
from worldenv.config import ClipConfig, ResamplerConfig, SimulatorConfig, UNetConfig, VAEConfig
from worldenv.nouns import Camera
from worldenv.robots.agibot_g1 import AGIBOT_G1, openness
from worldenv.simulator import schedule
from worldenv.simulator.conditioning import Resampler
from worldenv.simulator.evac import Condition, Evac, chunk_deltas, memory_indices
from worldenv.simulator.unet import UNet
from worldenv.simulator.vae import VAE
from worldenv.simulator.weights import DEAD, PREFIXES, fill

Tensors = dict[str, torch.Tensor]

IMAGE_TOKENS = 256
"""Where the released context of 272 tokens is cut: image tokens first."""

# What the released U-Net is; a case with another value is no case of this network.
_FIXED = {
    "transformer_depth": 1, "use_linear": True, "temporal_conv": True, "temporal_attention": True, "temporal_selfatt_only": True,
    "use_causal_attention": False, "addition_attention": True, "image_cross_attention": True, "traj_cross_attention": True,
    "fs_condition": True, "resblock_updown": False, "n_view": 1, "causal_temp_conv": True, "use_block_idx": True, "use_domain_embedding": True,
}  # fmt: skip


def by_rule(seed: int, manifest: Mapping[str, tuple[list[int], float, float]]) -> Tensors:
    """Weights of a case that stores only key -> [shape, mean, amplitude]: sha256 of the key, splitmix64, rounded to float16."""
    out = {}
    for key, (shape, mean, amplitude) in manifest.items():
        start = np.frombuffer(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8], "<u8")[0]
        with np.errstate(over="ignore"):
            z = start + np.arange(1, math.prod(shape) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        unit = ((z ^ (z >> np.uint64(31))) >> np.uint64(40)).astype(np.float64) / 2.0**23 - 1.0
        out[key] = torch.from_numpy((mean + amplitude * unit).astype(np.float16).reshape(shape).astype(np.float32))
    return out


def weights(folder: Path, case: Mapping[str, Any]) -> Tensors:
    """A case's weights, stored or by rule, under their published names."""
    if (folder / "weights.safetensors").is_file():
        return {name: value.float() for name, value in load_file(folder / "weights.safetensors").items()}
    return by_rule(case["weights_seed"], case["weights_manifest"])


def part(state: Mapping[str, torch.Tensor], name: str) -> Tensors:
    """The tensors of one part of the simulator, without their prefix."""
    return {key.removeprefix(PREFIXES[name]): value for key, value in state.items() if key.startswith(PREFIXES[name])}


def unet_config(config: Mapping[str, Any]) -> UNetConfig:
    """Of a case's `config`; ValueError where it is of another network."""
    if other := {key: config[key] for key, value in _FIXED.items() if config.get(key, value) != value}:
        raise ValueError(f"not the released U-Net: {other}")
    return UNetConfig(
        config["model_channels"], tuple(config["channel_mult"]), config["num_res_blocks"], tuple(config["attention_resolutions"]),
        config["num_head_channels"], config["context_dim"], dropout=config["dropout"],
    )  # fmt: skip


def unet(config: UNetConfig, latent: int, state: Tensors) -> UNet:
    """With the case's weights; what it must not lack or have too much is checked."""
    network = UNet(config, latent).eval()
    fill(network, part(state, "unet"), "golden", DEAD["unet"])
    return network


def sibling_unet(folder: Path, case: Mapping[str, Any]) -> Tensors:
    """U-Net weights of the case next door that `unet_weights` names."""
    found = re.search(r"\.\./([\w.-]+)/", case["unet_weights"])
    if found is None:
        raise ValueError(f"unet_weights={case['unet_weights']!r}: names no folder")
    other = folder.parent / found.group(1)
    return weights(other, json.loads((other / "case.json").read_text(encoding="utf-8")))


@torch.no_grad()
def evac_unet(folder: Path, case: dict[str, Any]) -> Tensors:
    """One forward pass, a different timestep per sample."""
    t, config = load_file(folder / "tensors.safetensors"), case["config"]
    network = unet(unet_config(config), config["out_channels"], weights(folder, case))
    image, action = t["context"][:, :IMAGE_TOKENS], t["context"][:, IMAGE_TOKENS:]
    memory = t["x"].shape[2] - config["chunk"]
    return {"output": network(t["x"], t["timesteps"], image, action, t["fs"], t["domain_id"], memory)}


def resampler(config: Mapping[str, Any], queries: int, channels_in: int, state: Tensors) -> Resampler:
    """With the case's weights."""
    network = Resampler(
        ResamplerConfig(config["dim"], config["depth"], config["heads"], config["dim_head"], queries), channels_in, config["output_dim"]
    )
    fill(network, state, "golden")
    return network.eval()


@torch.no_grad()
def evac_resamplers(folder: Path, case: dict[str, Any]) -> Tensors:
    """Both resamplers; action rows of any number."""
    t, config, state = load_file(folder / "tensors.safetensors"), case["config"], weights(folder, case)
    image = resampler(config, config["image"]["total_queries"], config["image"]["embedding_dim"], part(state, "image_resampler"))
    action = resampler(config, config["action"]["num_queries"], config["action"]["embedding_dim"], part(state, "action_resampler"))
    out = {"image_out": image(t["image_tokens"])}
    for name in t:
        if re.fullmatch(r"action\d+", name):
            out[f"{name}_out"] = action(t[name])
    return out


def vae_config(config: Mapping[str, Any]) -> VAEConfig:
    """Of a case's `config`; ValueError where it is of another autoencoder."""
    if config["attn_resolutions"] or config.get("embed_dim", config["z_channels"]) != config["z_channels"]:
        raise ValueError(f"not the released autoencoder: {config}")
    return VAEConfig(config["ch"], tuple(config["ch_mult"]), config["num_res_blocks"], config["z_channels"])


@torch.no_grad()
def evac_vae(folder: Path, case: dict[str, Any]) -> Tensors:
    """Moments, a posterior sample, and a decoded latent."""
    t = load_file(folder / "tensors.safetensors")
    network = VAE(vae_config(case["config"])).eval()
    fill(network, part(weights(folder, case), "vae"), "golden")
    posterior = network.encode(t["image"])
    return {
        "mean": posterior.mean, "logvar": posterior.logvar, "posterior_sample": posterior.sample(t["noise"]), "decoded": network.decode(t["z"]),
    }  # fmt: skip


def given_condition(simulator: Evac, given: Tensors, branch: str = "") -> Condition:
    """What a sampler case gives, as the sampler takes it."""
    z, mask, context = given["in.memory_and_cond_latent"], given[f"in.mask{branch}"], given[f"in.context{branch}"]
    fixed = torch.cat([z * mask, mask, given["in.traj_latent"], given["in.ray_dir"], given["in.ray_origin"]], dim=1)
    image, action = context[:, :IMAGE_TOKENS], context[:, IMAGE_TOKENS:]
    return Condition(z[:, :, : simulator.config.memory], fixed, image, action, tuple(simulator.unet.keys_values(image, action)))


_NO_RESAMPLER = ResamplerConfig(32, 1, 1, 32, queries=1)
_NO_CLIP = ClipConfig(image=8, patch=8, width=32, layers=1, heads=1)


@torch.no_grad()
def evac_sampler(folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    """Schedule, sampler tables, and whole denoising loops from given conditions and noise."""
    t, state = load_file(folder / "tensors.safetensors"), sibling_unet(folder, case)
    out: dict[str, Any] = {
        "sched.betas": schedule.betas(),
        "sched.alphas_cumprod": schedule.alphas_cumprod(),
        "sched.sqrt_alphas_cumprod": np.sqrt(schedule.alphas_cumprod()),
        "sched.sqrt_one_minus_alphas_cumprod": np.sqrt(1.0 - schedule.alphas_cumprod()),
    }
    scales = schedule.latent_scales()
    out["sched.scale_arr"] = np.pad(
        scales, (0, len(t["sched.scale_arr"]) - len(scales)), "edge"
    )  # the reference's goes on past the last level
    for name, run in case["runs"].items():
        if run["spacing"] != "uniform_trailing":
            raise ValueError(f"spacing {run['spacing']!r}")
        given = {key.removeprefix(f"{name}."): value for key, value in t.items() if key.startswith(f"{name}.")}
        z, chunk = given["in.memory_and_cond_latent"], case["unet_config"]["chunk"]
        latent, memory = z.shape[1], z.shape[2] - chunk
        made = torch.empty_like(given["noise.init"])
        told = torch.stack([given["in.fs"], given["in.domain_id"]], dim=1)
        for fs, domain in told.unique(dim=0).tolist():  # samples of one batch may differ in them; a simulator is told them once
            config = SimulatorConfig(
                unet_config(case["unet_config"]), VAEConfig(32, (1,), 1, latent), _NO_CLIP, _NO_RESAMPLER, _NO_RESAMPLER, *z.shape[-2:],
                memory=memory, chunk=chunk, denoise_steps=run["steps"], eta=run["eta"], guidance=run["cfg_scale"],
                guidance_rescale=run["guidance_rescale"], fps_token=fs, domain=domain,
            )  # fmt: skip
            simulator = Evac(config).eval()
            fill(simulator.unet, part(state, "unet"), "golden", DEAD["unet"])

            rows = (told == torch.tensor([fs, domain])).all(dim=1)
            some = {key: value[rows] for key, value in given.items() if key.startswith("in.")}
            noise = given["noise.init"][rows][:, None]
            if run["eta"] > 0:
                noise = torch.cat([noise, given["noise.steps"][:, rows, :, memory:].transpose(0, 1)], dim=1)
            other = given_condition(simulator, some, "_uncond") if "in.context_uncond" in some else None
            made[rows] = simulator.denoise(given_condition(simulator, some), noise, other)
        out[f"{name}.out.latents"] = torch.cat([z[:, :, :memory], made], dim=2)
        tables = simulator.sampler
        out |= {
            f"{name}.tab.ddim_timesteps": tables.timesteps,
            f"{name}.tab.ddim_alphas": tables.alphas,
            f"{name}.tab.ddim_alphas_prev": tables.alphas_prev,
            f"{name}.tab.ddim_sigmas": tables.sigmas,
            f"{name}.tab.ddim_sqrt_one_minus_alphas": np.sqrt(1.0 - tables.alphas),
            f"{name}.tab.ddim_scale_arr": tables.scales,
            f"{name}.tab.ddim_scale_arr_prev": tables.scales_prev,
        }
    return out


class TinyEmbed(nn.Module):
    """The cases' stand-in for the CLIP tower: averages over a 4x4 grid, projected."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(3, width)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """(B, 16, width)."""
        out: torch.Tensor = self.proj(F.adaptive_avg_pool2d(pictures, 4).flatten(2).transpose(1, 2))
        return out


def loop_simulator(folder: Path, case: Mapping[str, Any]) -> Evac:
    """The simulator of a chunk-loop case, every switch as in the released sampler."""
    run, aux, state = case["run"], case["aux_config"], weights(folder, case)
    stage = {name: aux[f"{name}_config"]["params"] for name in ("first_stage", "cond_stage", "image_proj_stage", "img_cond_stage")}

    def queries(of: Mapping[str, Any]) -> ResamplerConfig:
        return ResamplerConfig(of["dim"], of["depth"], of["heads"], of["dim_head"], of["num_queries"] * (of.get("video_length") or 1))

    config = SimulatorConfig(
        unet_config(case["unet_config"]), vae_config(stage["first_stage"]["ddconfig"]),
        ClipConfig(8, 8, stage["img_cond_stage"]["d"], 0, 1), queries(stage["image_proj_stage"]), queries(stage["cond_stage"]),
        *run["canvas"], memory=run["n_previous"], chunk=run["chunk"], denoise_steps=run["ddim_steps"], eta=run["eta"],
        guidance=run["cfg_scale"], guidance_rescale=run["guidance_rescale"], latent_scale=run["scale_factor"], fps_token=run["fs"],
        domain=run["domain_id"], posterior="sample", first_tokens="decoded", delta_rows="published",
    )  # fmt: skip
    simulator = Evac(config)
    simulator.clip = TinyEmbed(stage["img_cond_stage"]["d"])  # type: ignore[assignment]
    fill(simulator.clip, {key.removeprefix("embedder."): value for key, value in state.items() if key.startswith("embedder.")}, "golden")
    for name in ("vae", "image_resampler", "action_resampler"):
        fill(getattr(simulator, name), part(state, name), "golden")
    fill(simulator.unet, part(sibling_unet(folder, case), "unet"), "golden", DEAD["unet"])
    return simulator.eval()


@torch.no_grad()
def evac_chunk_loop(folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    """The whole autoregressive loop, each chunk from what the ones before it gave."""
    t, run = load_file(folder / "tensors.safetensors"), case["run"]
    simulator = loop_simulator(folder, case)
    config = simulator.config
    memory, chunk = config.memory, config.chunk
    first = simulator.fit(t["in.image"][None])
    posterior = simulator.vae.encode(first)
    maps = simulator.picture(t["in.traj_maps_u8"])
    moments = simulator.vae.encode(maps)
    camera = Camera(t["in.K_source"].double().numpy(), np.eye(4), *run["source"])
    all_rays = torch.stack([
        action_map.rays(dataclasses.replace(camera, camera_to_world=pose.double().numpy()), config.latent) for pose in t["in.c2w"]
    ])  # fmt: skip
    history, seen = torch.empty(0, config.vae.z_channels, *config.latent), list(range(memory))
    out, video = {}, []
    for number in range(run["num_chunk"]):
        name = f"chunk{number}"
        coming = [min(memory + number * chunk + k, len(maps) - 1) for k in range(chunk)]
        if number == 0:
            video_noise = t[f"{name}.noise.vae_video"]
            z = simulator.latent_scale * torch.cat([posterior.sample(one[None]) for one in video_noise])
            past, at, tokens = z[:memory], seen, simulator.image_tokens(first)
        else:
            at = memory_indices(len(history), memory)
            past = history[at]
            z = torch.cat([past, past[-1:].expand(chunk, -1, -1, -1)])
            tokens = simulator.image_tokens(simulator.decode(history[:1]).clamp(-1.0, 1.0))
            at = [seen[i] for i in at]
        map_noise = t[f"{name}.noise.vae_traj"][memory:]
        traj = simulator.latent_scale * (moments.mean[coming] + torch.exp(0.5 * moments.logvar[coming]) * map_noise)
        deltas = chunk_deltas(t["in.delta_normalised"][None], number, config)
        condition = simulator.condition(
            past.transpose(0, 1)[None],
            traj.transpose(0, 1)[None],
            all_rays[at + coming].transpose(0, 1)[None],
            tokens,
            simulator.action_tokens(deltas),
        )
        noise = t[f"{name}.noise.init"][:, None]
        if run["eta"] > 0:
            noise = torch.cat([noise, t[f"{name}.noise.steps"][:, :, :, memory:].transpose(0, 1)], dim=1)
        made = simulator.denoise(condition, noise)
        samples = torch.cat([condition.memory, made], dim=2)
        latent = config.vae.z_channels
        parts = condition.fixed.split([latent, 1, latent, 3, 3], dim=1)
        out |= {
            f"{name}.cond.{key}": value
            for key, value in zip(("cond_latent", "mask", "traj_latent", "ray_dir", "ray_origin"), parts, strict=True)
        }
        decoded = simulator.decode(samples[0].transpose(0, 1))
        out |= {
            f"{name}.z": z.transpose(0, 1)[None],
            f"{name}.context": torch.cat([condition.image, condition.action], dim=1),
            f"{name}.delta_action": deltas,
            f"{name}.samples": samples,
            f"{name}.decoded": decoded.transpose(0, 1)[None],
        }
        video.append(simulator.frames(made[0].transpose(0, 1)))
        history, seen = torch.cat([history if number else past, made[0].transpose(0, 1)]), seen + coming
    out["out.video_u8"] = torch.cat(video)
    return out


def action_maps(folder: Path, case: dict[str, Any]) -> dict[str, NDArray[Any]]:
    """Maps, rays and deltas of the AgiBot G1 from raw poses and the source camera, at the case's canvas and drawing sizes."""
    t = {name: value.numpy() for name, value in load_file(folder / "tensors.safetensors").items()}
    out: dict[str, NDArray[Any]] = {}
    for tag, sizes in case["cameras"].items():
        height, width = sizes["canvas"]
        source = Camera(t[f"{tag}.K_source"], t[f"{tag}.c2w"].astype(np.float64), *sizes["source_size"])
        camera = action_map.resized(source, height, width)
        states = t[f"{tag}.pose_raw16"].reshape(-1, len(AGIBOT_G1.arms), 8)
        pose, gripper = states[..., :7], openness(states[..., 7])
        arms = [dataclasses.replace(arm, radius_px=sizes["radius"], thickness_px=sizes["line_thickness"]) for arm in AGIBOT_G1.arms]
        rays = action_map.rays(source, (height // 8, width // 8)).numpy()
        out |= {
            f"{tag}.maps": action_map.pictures(pose, gripper, camera, AGIBOT_G1, arms).numpy(),
            f"{tag}.ray_dir": rays[:3],
            f"{tag}.ray_origin": rays[3:],
            f"{tag}.delta14_pad4": action_map.deltas(pose, gripper, arms),
        }
    return out


KINDS: dict[str, Callable[[Path, dict[str, Any]], dict[str, Any]]] = {
    "evac_unet": evac_unet,
    "evac_resamplers": evac_resamplers,
    "evac_vae": evac_vae,
    "evac_sampler": evac_sampler,
    "evac_chunk_loop": evac_chunk_loop,
    "action_maps": action_maps,
}

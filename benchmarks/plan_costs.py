"""What the planner knows of stages and GPUs: a preset's FLOPs and bytes, counted on the meta device, and data sheets; or seconds measured here.

A batch of b items takes fixed + per_item b: the weights are read once, the FLOPs are done per item at a share of the peak rate
(`efficiency`, an assumption until a profile says otherwise). Weight reads are not hidden behind FLOPs: a slight pessimism at batch 1.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from worldenv.benchmarks import networks
from worldenv.benchmarks.bench_simulator_unet import step_work
from worldenv.benchmarks.harness import count_flops
from worldenv.config import PolicyConfig, ReflectorConfig, RunConfig
from worldenv.learning.loop.memory import PROMPT
from worldenv.learning.loop.update import HEADS
from worldenv.policy import lora
from worldenv.policy.openvla_oft import Network
from worldenv.presets import LLAVA_VOCAB
from worldenv.reflector import cache, flops
from worldenv.reflector.frames import needed, shown
from worldenv.simulator.evac import DELTA_DIM


@dataclass(frozen=True)
class Gpu:
    """One GPU as its maker describes it."""

    flops: float
    """Dense bfloat16 matrix products, float32 accumulation [1/s]."""
    flops32: float
    """In float32, which no tensor core computes: runs do not round it to TF32 [1/s]."""
    bytes_per_s: float
    """Memory bandwidth [1/s]."""
    memory: float
    """[byte]"""
    source: str


GPUS = {
    "h20": Gpu(148e12, 44e12, 4.0e12, 96e9, "NVIDIA H20 data sheet as vendors quote it: 148 TFLOPS (float32 44), 4.0 TB/s, 96 GB"),
    "a100": Gpu(312e12, 19.5e12, 2.039e12, 80e9, "NVIDIA A100 80GB SXM data sheet: 312 TFLOPS (float32 19.5), 2039 GB/s, 80 GB"),
    "h100": Gpu(989e12, 67e12, 3.35e12, 80e9, "NVIDIA H100 SXM data sheet: 989 TFLOPS without sparsity (float32 67); 3.35 TB/s, 80 GB"),
    "h200": Gpu(989e12, 67e12, 4.8e12, 141e9, "NVIDIA H200 SXM data sheet: 989 TFLOPS without sparsity (float32 67); 4.8 TB/s, 141 GB"),
    "b200": Gpu(2250e12, 75e12, 8.0e12, 180e9, "NVIDIA HGX B200 data sheet: 2250 TFLOPS without sparsity (float32 75); 8 TB/s, 180 GB"),
    "rtx4090": Gpu(165.2e12, 82.6e12, 1.008e12, 24e9, "NVIDIA Ada whitepaper, appendix A: 165.2 TFLOPS dense (float32 82.6), 1008 GB/s, 24 GB"),
}


@dataclass(frozen=True)
class StageWork:
    """One stage of a chunk: what one visit of one rollout takes."""

    name: str
    network: str
    """Stages of one network share its weights, and a device."""
    flops: float
    """One multiply-add is 2."""
    weights: float
    """Read once per batch [byte]."""
    workspace: float
    """Activations per item while it runs, an estimate [byte]."""
    steps: int = 1
    """Visits per chunk."""


@dataclass(frozen=True)
class Workload:
    """A rollout as the planner sees it."""

    stages: tuple[StageWork, ...]
    """In the order of a chunk; the last judges."""
    weights: dict[str, float]
    """All weights of each network [byte]."""
    state: dict[str, float]
    """What each network remembers of a rollout, at its longest [byte]."""
    chunk: int
    """Frames."""
    limit: int
    """[frames]"""
    update_flops: float
    """Of the policy's update, per query of a rollout."""


PASSES = 5
"""LOOP's update in forward passes of the policy: one for the densities that ratios are taken to (a bfloat16 backbone), one to learn from, the
same computed again in the backward pass (checkpointing), and two back, which frozen weights make less."""
_GB = 1e9
_BYTES = 2  # bfloat16
_FLOAT32 = 4


@dataclass(frozen=True)
class Counts:
    """Operations of the networks of a rollout, one multiply-add being 2, counted on the meta device; and bytes, in bfloat16."""

    query: float
    """The policy's, of one view."""
    encode: float
    """The simulator's before a chunk's steps: action maps, action tokens, keys and values."""
    step: float
    """One denoising step of a chunk."""
    decode: float
    """A chunk's frames."""
    picture: float
    """Encoding one picture."""
    tokens: float
    """Image tokens of one picture."""
    judged: tuple[float, ...]
    """The reflector's of each chunk of a rollout to the limit: with `uniform` those that begin at 32 frames and more cost 20 times the first."""
    embedding: float
    """The reflector's, of one video from its first pixel, as many frames as it is shown at most."""
    weights: dict[str, float]
    """All of each network [byte]; the policy's heads are float32, and so is the simulator, but for what runs it beside."""
    changed: float
    """What LOOP changes of the policy, LoRA and heads [byte]."""
    kept: dict[str, float]
    """What each network remembers of a rollout, at its longest [byte]."""
    read: dict[str, float]
    """Weights of the simulator's stages [byte]."""

    def imagined(self, steps: int) -> float:
        """A chunk of the simulator, denoised in `steps`."""
        return self.encode + steps * self.step + self.decode


@functools.cache
@torch.no_grad()
def _policy(config: PolicyConfig, rank: int) -> tuple[float, float, float]:
    """Of a query [FLOP]; its weights, and those that LOOP changes with LoRA of `rank` [byte]."""
    with torch.device("meta"):
        network = Network(config).to(torch.bfloat16).eval()
        for part in (network.action_head, network.scale_head, network.proprio_projector):
            part.float()
        pixels, ids = torch.empty(1, 6 * config.images, config.image, config.image), torch.empty(1, PROMPT, dtype=torch.int64)
        proprio = torch.empty(1, config.proprio)

        def act() -> None:
            hidden = network(pixels, ids, None, proprio).float()
            network.action_head(hidden), network.scale_head(hidden)

        weights = network.state_dict()
        sides = sum(sum(weights[f"{name}.weight"].shape) for name in lora.targets(network))
        return count_flops(act), _size(network), _FLOAT32 * rank * sides + sum(_size(network.get_submodule(name)) for name in HEADS)


@torch.no_grad()
def _reflector(config: ReflectorConfig, limit: int, chunk: int) -> tuple[tuple[float, ...], float, float, float]:
    """Of each chunk, of one video from its first pixel [FLOP]; its weights, and the most that it keeps of a video [byte]."""
    reflector = flops.on_meta(config, LLAVA_VOCAB)
    llava, geometry = reflector.llava, reflector._geometry(flops.INSTRUCTION)
    with torch.device("meta"):
        vision = count_flops(lambda: llava.encode(torch.empty(1, config.image, config.image, 3, dtype=torch.uint8)))
    token = llava.empty_past().shape[0] * 2 * config.kv_heads * (config.width // config.heads) * _BYTES
    trunk, judged, kept = None, list[float](), 0
    for seen in range(1, limit + 1, chunk):
        rows = cache.plan(config.sampler, config.frames, seen, chunk, trunk, geometry)
        judged.append(sum(row.flops(geometry) for row in rows) + chunk * vision)
        last = seen + chunk - 1
        trunk = cache.trunk_after(config.sampler, config.frames, last)
        features = sum(needed(config.sampler, last, config.frames, i) for i in range(last + 1)) * llava.frame_tokens * config.width * _BYTES
        kept = max(kept, features + (geometry.before + len(trunk) * geometry.frame) * token)
    path = shown(config.sampler, config.frames - 1, config.frames)
    embedding = cache.single(path, path[-1]).flops(geometry) + len(path) * vision
    return tuple(judged), embedding, sum(p.numel() for p in llava.model.parameters()) * _BYTES, kept


@functools.cache
@torch.no_grad()
def counts(settings: RunConfig) -> Counts:
    """Of the networks of `settings`, some seconds of one core."""
    config, limit = settings.simulator, settings.env.steps
    query, policy, changed = _policy(settings.policy, settings.loop.lora_rank)
    judged, embedding, reflector, watch = _reflector(settings.reflector, limit, config.chunk)
    step, evac = step_work(config, torch.bfloat16), networks.meta_simulator(config, torch.bfloat16)
    with torch.device("meta"):
        picture, latent = torch.empty(1, 3, config.height, config.width), torch.empty(1, config.vae.z_channels, *config.latent)
        deltas = torch.empty(1, config.chunk, DELTA_DIM)
        queries = (config.image_resampler.queries, config.action_resampler.queries)
        image, action = (torch.empty(1, n, config.unet.context_dim, dtype=torch.bfloat16) for n in queries)
        encoded, decoded = count_flops(lambda: evac.encode(picture)), count_flops(lambda: evac.decode(latent))
        told = count_flops(lambda: evac.action_tokens(deltas)) + count_flops(lambda: evac.unet.keys_values(image, action))
    pairs = sum(part.nbytes for pair in evac.unet.keys_values(image, action) for part in pair)
    frames = config.memory + config.chunk
    latents = limit + evac.noise_shape()[0] * config.chunk + 5 * frames  # all frames so far, noise; noisy, and what a chunk is denoised under
    read = {"denoise": step.bytes, "encode": _size(evac.vae.encoder), "decode": _size(evac.vae.decoder)}
    return Counts(
        query=query, encode=config.chunk * encoded + told, step=step.flops, decode=config.chunk * decoded, picture=encoded,
        tokens=count_flops(lambda: evac.image_tokens(picture)), judged=judged, embedding=embedding,
        weights={"policy": policy, "simulator": 2 * _size(evac) + sum(read.values()), "reflector": reflector},
        changed=changed, kept={"policy": 3.0 * settings.env.image**2, "simulator": float(latents * latent.nbytes + pairs), "reflector": watch},
        read=read,
    )  # fmt: skip


def _size(module: torch.nn.Module) -> float:
    """Of its weights [byte]."""
    return float(sum(parameter.nbytes for parameter in module.parameters()))


def workload(settings: RunConfig, lengths: Sequence[int]) -> Workload:
    """Rollouts of `settings` that end after `lengths` [frames]: a chunk is judged at the mean of theirs. ValueError: they are longer than the limit.

    Activations are estimates; the simulator's, 0.6 to 1 GB at 320 x 512, go with its pixels.
    """
    found, chunk = counts(settings), settings.policy.chunk
    pixels = settings.simulator.height * settings.simulator.width / (320 * 512)
    chunks = [math.ceil(length / chunk) for length in lengths]
    if max(chunks) > len(found.judged):
        raise ValueError(f"lengths of up to {max(lengths)} frames, of a limit of {settings.env.steps}")
    judged = np.concatenate([[0.0], np.cumsum(found.judged)])[chunks].sum() / sum(chunks)
    stages = (
        StageWork("policy", "policy", found.query, found.weights["policy"], 0.1 * _GB),
        StageWork("encode", "simulator", found.encode, found.read["encode"], 0.5 * pixels * _GB),
        StageWork("denoise", "simulator", found.step, found.read["denoise"], 0.6 * pixels * _GB, settings.simulator.denoise_steps),
        StageWork("decode", "simulator", found.decode, found.read["decode"], 1.0 * pixels * _GB),
        StageWork("reflector", "reflector", float(judged), found.weights["reflector"], 0.4 * _GB),
    )
    return Workload(stages, found.weights, found.kept, chunk, settings.env.steps, PASSES * found.query)


Affine = tuple[float, float]
"""fixed, per item [s]."""


def on_gpu(stage: StageWork, gpu: Gpu, efficiency: float) -> Affine:
    """What a batch takes [s], from FLOPs and bytes."""
    return stage.weights / gpu.bytes_per_s, stage.flops / (gpu.flops * efficiency)


def fitted(seconds: dict[int, float]) -> Affine:
    """The affine law nearest to measured `seconds` by batch size, in relative terms; no part of it is below 0. ValueError: nothing measured."""
    if not seconds or min(seconds) < 1 or not all(0 < one < math.inf for one in seconds.values()):
        raise ValueError(f"profile {seconds}: want at least one batch size of 1 or more with its seconds")
    b, t = np.array(list(seconds), dtype=np.float64), np.array(list(seconds.values()))
    if len(seconds) > 1:
        fixed, per_item = np.linalg.lstsq(np.stack([1 / t, b / t], axis=1), np.ones_like(t), rcond=None)[0].tolist()
        if fixed >= 0 and per_item >= 0:
            return fixed, per_item
        if per_item < 0:
            return float(np.sum(1 / t) / np.sum(1 / t**2)), 0.0
    return 0.0, float(np.sum(b / t) / np.sum((b / t) ** 2))


@dataclass(frozen=True)
class Profile:
    """Stages as they were measured on one device."""

    workload: Workload
    costs: tuple[Affine, ...]
    """By stage."""
    buckets: tuple[tuple[int, ...], ...]
    """By stage."""


def read_profile(path: Path) -> Profile:
    """A JSON file {"chunk", "limit", "stages": [{"name", "steps", "buckets", "seconds": {batch: seconds}}, ...]}; ValueError names what is wrong."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        stages = found["stages"]
        works = tuple(StageWork(str(one["name"]), "all", 0.0, 0.0, 0.0, int(one["steps"])) for one in stages)
        costs = tuple(fitted({int(b): float(t) for b, t in one["seconds"].items()}) for one in stages)
        buckets = tuple(tuple(int(b) for b in one["buckets"]) for one in stages)
        chunk, limit = int(found["chunk"]), int(found["limit"])
        counts = [chunk, limit, len(works), *(work.steps for work in works), *(min(sizes, default=0) for sizes in buckets)]
        if min(counts) < 1 or any(sizes != tuple(sorted(set(sizes))) for sizes in buckets):
            raise ValueError("want a chunk, a limit, stages, steps and buckets of at least 1, buckets ascending")
        return Profile(Workload(works, {"all": 0.0}, {"all": 0.0}, chunk, limit, 0.0), costs, buckets)
    except OSError as error:
        raise ValueError(f"--profile {path}: {error.strerror}") from None
    except (KeyError, TypeError, AttributeError, OverflowError, ValueError) as error:
        raise ValueError(f"--profile {path}: no profile of stages ({type(error).__name__}: {error}); see docs/scheduler.md") from None

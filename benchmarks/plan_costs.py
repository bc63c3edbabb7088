"""What the planner knows of stages and GPUs: FLOPs, bytes and data sheets, or seconds measured here.

A batch of b items takes fixed + per_item b: the weights are read once, the FLOPs are done per item at a share of the peak rate
(`efficiency`, an assumption until a profile says otherwise). Weight reads are not hidden behind FLOPs: a slight pessimism at batch 1.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Gpu:
    """One GPU as its maker describes it."""

    flops: float
    """Dense bfloat16 matrix products, float32 accumulation [1/s]."""
    bytes_per_s: float
    """Memory bandwidth [1/s]."""
    memory: float
    """[byte]"""
    source: str


GPUS = {
    "h20": Gpu(148e12, 4.0e12, 96e9, "NVIDIA H20 data sheet as vendors quote it: 148 TFLOPS, 4.0 TB/s, 96 GB"),
    "a100": Gpu(312e12, 2.039e12, 80e9, "NVIDIA A100 80GB SXM data sheet: 312 TFLOPS, 2039 GB/s, 80 GB"),
    "h100": Gpu(989e12, 3.35e12, 80e9, "NVIDIA H100 SXM data sheet: 1979 TFLOPS with sparsity, half of it without; 3.35 TB/s, 80 GB"),
    "h200": Gpu(989e12, 4.8e12, 141e9, "NVIDIA H200 SXM data sheet: 1979 TFLOPS with sparsity, half of it without; 4.8 TB/s, 141 GB"),
    "b200": Gpu(2250e12, 8.0e12, 180e9, "NVIDIA HGX B200 data sheet: 4.5 PFLOPS with sparsity, half of it without; 8 TB/s, 180 GB"),
    "rtx4090": Gpu(165.2e12, 1.008e12, 24e9, "NVIDIA Ada whitepaper, appendix A: 165.2 TFLOPS dense, 1008 GB/s, 24 GB"),
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


_TF, _GB = 1e12, 1e9
_PASSES = 5  # forward for the densities that ratios are taken to (a bfloat16 backbone), forward again, twice that back, and what is computed again
_POLICY = 4.96 * _TF  # one view and proprio, 346 tokens: OpenVLA-OFT 7.5B
_FRAME_MAPS, _FRAME_DECODE = 0.690 * _TF, 1.5635 * _TF  # the SD autoencoder at 320 x 512, per frame
_REFLECTOR = {
    # 8 new frames through SigLIP, then one pass of the language model over them and 8 questions, the past kept; doublings of the stride included
    "stable_dyadic": 30.5 * _TF,
    # the paper's frames: at more than 32, each of 8 questions reads a video of 32 frames anew (6323 tokens)
    "uniform": 8 * 90.5 * _TF + 8 * 0.667 * _TF,
}


def paper(limit: int, denoise_steps: int, sampler: str) -> Workload:
    """OpenVLA-OFT 7.5B, EVAC (320 x 512, 4 memory + 8 new frames), LLaVA-OneVision 7B, all bfloat16. ValueError: an unknown `sampler`.

    FLOPs: counted over the published shapes; state: 8 frames of latents per chunk and the attention's keys and values; key-value cache and
    features of 32 frames.
    """
    if sampler not in _REFLECTOR:
        raise ValueError(f"--sampler {sampler}: want {' or '.join(_REFLECTOR)}")
    stages = (
        StageWork("policy", "policy", _POLICY, 15.7 * _GB, 0.1 * _GB),
        StageWork("encode", "simulator", 8 * _FRAME_MAPS + 0.007 * _TF, 0.26 * _GB, 0.5 * _GB),
        StageWork("denoise", "simulator", 9.49 * _TF, 2.83 * _GB, 0.6 * _GB, denoise_steps),
        StageWork("decode", "simulator", 8 * _FRAME_DECODE, 0.1 * _GB, 1.0 * _GB),
        StageWork("reflector", "reflector", _REFLECTOR[sampler], 16.1 * _GB, 0.4 * _GB),
    )
    weights = {"policy": 15.7 * _GB, "simulator": 4.66 * _GB, "reflector": 16.1 * _GB}
    state = {"policy": 0.01 * _GB, "simulator": 0.05 * _GB, "reflector": 0.41 * _GB}
    return Workload(stages, weights, state, chunk=8, limit=limit, update_flops=_PASSES * _POLICY)


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

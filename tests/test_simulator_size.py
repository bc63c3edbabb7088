"""The simulator at its published size, counted on the meta device, and on a GPU where there is one."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from worldenv.benchmarks import bench_chunk_loop, networks, published
from worldenv.benchmarks.bench_chunk_loop import rollout_flops
from worldenv.benchmarks.bench_hoisting import step_counts
from worldenv.benchmarks.harness import Setting
from worldenv.benchmarks.networks import PUBLISHED_SIZES
from worldenv.presets import EVAC, PRESETS

DEAD = 51_118_080
"""Parameters of the 64 matrices of the released U-Net that no block reads."""
CLIP_OUTPUT = 2 * 1280 + 1280 * 1024
"""Last norm and projection of ViT-H/14's image tower, which no token passes."""
PUBLISHED_TFLOP = {"320x512": 15.833, "256x256": 6.186}
"""Of one step of the released code (one multiply-add is 2), 20 frames, 272 tokens."""


def test_parameter_counts() -> None:
    simulator = networks.meta_simulator(EVAC)
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in simulator.named_children()}
    assert counts["unet"] == 1_464_484_100 - DEAD
    assert counts["vae"] == 83_653_863
    assert counts["clip"] == 632_076_800 - CLIP_OUTPUT
    assert counts["image_resampler"] == 48_787_456
    assert counts["action_resampler"] == 47_245_312
    with torch.device("meta"):
        baseline = published.PublishedUNet(EVAC.unet, EVAC.vae.z_channels)
        vae = published.PublishedVAE(EVAC.vae)
    assert sum(p.numel() for p in baseline.parameters()) == 1_464_484_100
    assert len(baseline.state_dict()) == 1549
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863


@pytest.mark.parametrize("size", ["256x256"])
def test_flops_of_a_step(size: str) -> None:
    height, width = PUBLISHED_SIZES[size]
    counts = step_counts(dataclasses.replace(EVAC, height=height, width=width))
    (ours, moved, _), (flops, baseline_moved, constant) = counts["hoisted"], counts["published"]
    assert flops / 1e12 == pytest.approx(PUBLISHED_TFLOP[size], rel=1e-3)
    # keys and values of 20 frames; time embeddings are what is left of the difference
    assert (flops - ours) / 1e12 == pytest.approx(0.136, rel=0.02)
    assert constant < baseline_moved
    assert moved < 1.1 * baseline_moved


def test_flops_of_a_tiny_rollout() -> None:
    """The published order of work does more: memory frames encoded and decoded, a clip of first frames, tokens in every chunk."""
    config = PRESETS["tiny"].simulator
    assert rollout_flops(config, 2) < 0.9 * rollout_flops(config, 2, loop=True)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "levels"), [(torch.float32, 0.1), (torch.bfloat16, 3.0)], ids=str)
def test_a_rollout_on_a_gpu_equals_that_on_a_cpu(dtype: torch.dtype, levels: float) -> None:
    config = dataclasses.replace(PRESETS["tiny"].simulator, denoise_steps=3, eta=1.0, final="x_prev")
    on_cpu = Setting(torch.device("cpu"), torch.float32, "tiny")
    frame, maps, noise = networks.rollout_inputs(config, on_cpu, 2)
    simulator = networks.simulator(config, on_cpu)
    want = bench_chunk_loop.rollout(simulator, frame, maps, noise)
    gpu = torch.device("cuda")
    twin = networks.simulator(config, Setting(gpu, dtype, "tiny"))
    twin.load_state_dict(simulator.state_dict())
    moved = [dataclasses.replace(one, **{f.name: getattr(one, f.name).to(gpu) for f in dataclasses.fields(one)}) for one in maps]
    got = bench_chunk_loop.rollout(twin, frame.to(gpu), moved, [one.to(gpu) for one in noise]).cpu()
    assert float((got.float() - want.float()).abs().mean()) < levels


@pytest.mark.gpu
def test_the_published_size_fits_a_gpu() -> None:
    """One step in bfloat16: weights of 2.8 GB, and room for the activations of a chunk; no float32 copy of the weights is made."""
    torch.cuda.reset_peak_memory_stats()
    setting = Setting(torch.device("cuda"), torch.bfloat16, "published")
    simulator = networks.simulator(EVAC, setting)
    held = torch.cuda.max_memory_allocated()
    weights = sum(p.numel() * p.element_size() for p in simulator.parameters())
    assert held < 1.1 * weights

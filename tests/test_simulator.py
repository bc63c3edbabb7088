"""The simulator's contract, its networks against other implementations of them, its schedule, and published files read as they are."""

from __future__ import annotations

import argparse
import dataclasses
import pickle
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from worldenv import checkpoint, noise
from worldenv.config import ClipConfig, ResamplerConfig, SimulatorConfig, UNetConfig, VAEConfig
from worldenv.engines.recipe import relative_error
from worldenv.kernels.group_norm import _as_graph, group_norm, group_norm_ref
from worldenv.nouns import ActionMap
from worldenv.presets import EVAC, EVAC_RLINF, PRESETS
from worldenv.simulator import evac, schedule, weights
from worldenv.simulator.conditioning import ClipTower, Resampler, clip_picture
from worldenv.simulator.contract import Simulator
from worldenv.simulator.evac import DELTA_DIM, Evac, chunk_deltas, memory_indices
from worldenv.simulator.graphs import ENCODER
from worldenv.simulator.layers import UpsampleConv, upsample
from worldenv.simulator.unet import CausalConv, UNet
from worldenv.simulator.vae import VAE

SMALL = SimulatorConfig(
    unet=UNetConfig(64, (1, 1), 1, (1,), 32, 32, init_heads=2),
    vae=VAEConfig(8, (1, 2), 1, 4, norm_groups=4),
    clip=ClipConfig(image=16, patch=8, width=32, layers=1, heads=2),
    image_resampler=ResamplerConfig(32, 1, 2, 16, queries=6),
    action_resampler=ResamplerConfig(32, 1, 2, 16, queries=5),
    height=16,
    width=24,
    chunk=4,
    denoise_steps=3,
)
LATENT = (4, 8, 12)


def trained(config: SimulatorConfig = SMALL, seed: int = 0) -> Evac:
    """A simulator none of whose layers is zero: as initialised, residual branches end in zeros and would hide mistakes."""
    simulator = Evac.initialised(config, seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in simulator.parameters():
            if parameter.dim() > 1 and not parameter.any():
                parameter.normal_(0.0, 0.05, generator=generator)
    return simulator


def pictures(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def maps(batch: int, seed: int = 2) -> ActionMap:
    generator = torch.Generator().manual_seed(seed)
    rays = torch.randn(batch, 6, *LATENT[1:], generator=generator)
    return ActionMap(pictures(batch, 4, 16, 24, seed=seed), rays, 0.1 * torch.randn(batch, 4, DELTA_DIM, generator=generator))


def draw(simulator: Evac, numbers: Sequence[int], chunk: int) -> torch.Tensor:
    draws, *shape = simulator.noise_shape()
    rows = [noise.normal(0, np.array(numbers), chunk, step, noise.Stream.SIMULATOR, shape) for step in range(draws)]
    return torch.from_numpy(np.stack(rows, axis=1))


def part(of: ActionMap, rows: Sequence[int]) -> ActionMap:
    return ActionMap(*(getattr(of, field.name)[list(rows)] for field in dataclasses.fields(of)))


# The contract


@pytest.mark.parametrize(
    "changes",
    [{}, {"eta": 0.0, "final": "pred_x0", "posterior": "sample", "first_tokens": "decoded", "guidance": 2.0}],
    ids=["default", "switches"],
)
def test_rollouts_do_not_depend_on_their_batch(changes: dict[str, Any]) -> None:
    simulator: Simulator = trained(dataclasses.replace(SMALL, **changes))
    assert isinstance(simulator, Evac)
    first, steps = pictures(3, 16, 24), [maps(3, seed=10 + c) for c in range(3)]
    # rollouts 0, 1, 2 in one batch, where 2 joins a chunk later than the others
    memory = simulator.begin(first)
    frames: dict[tuple[int, int], torch.Tensor] = {}
    for chunk in range(3):
        rows = [0, 1] if chunk == 0 else [0, 1, 2]
        own = [chunk, chunk, chunk - 1][: len(rows)]
        given = torch.cat([draw(simulator, [r], c) for r, c in zip(rows, own, strict=True)])
        mixed = ActionMap(
            *(torch.stack([getattr(steps[c], f.name)[r] for r, c in zip(rows, own, strict=True)]) for f in dataclasses.fields(ActionMap))
        )
        made, now = simulator.imagine([memory[r] for r in rows], mixed, given)
        for i, (r, c) in enumerate(zip(rows, own, strict=True)):
            frames[r, c], memory[r] = made[i], now[i]
    for r, count in ((0, 3), (1, 3), (2, 2)):
        (alone,) = simulator.begin(first[r : r + 1])
        for c in range(count):
            made, (alone,) = simulator.imagine([alone], part(steps[c], [r]), draw(simulator, [r], c))
            assert made.dtype == torch.uint8
            assert made.shape == (1, 4, 16, 24, 3)
            assert (made[0].int() - frames[r, c].int()).abs().max() <= 1, "beyond rounding to the next level"
            assert (made[0] != frames[r, c]).float().mean() < 0.01
        torch.testing.assert_close(alone.history, memory[r].history, rtol=1e-4, atol=1e-4)
    assert (frames[0, 0] != frames[1, 0]).any()


def test_nothing_is_changed_in_place() -> None:
    simulator = trained(dataclasses.replace(SMALL, posterior="sample", guidance=2.0))
    first, step, given = pictures(2, 16, 24), maps(2), draw(trained(dataclasses.replace(SMALL, posterior="sample")), [0, 1], 0)
    memory = simulator.begin(first)
    kept = [(m.history.clone(), None if m.tokens is None else m.tokens.clone()) for m in memory]
    before = [t.clone() for t in (first, step.picture, step.rays, step.delta, given)]
    once, after = simulator.imagine(memory, step, given)
    again, _ = simulator.imagine(memory, step, given)
    assert torch.equal(once, again)
    assert all(torch.equal(a, b) for a, b in zip((first, step.picture, step.rays, step.delta, given), before, strict=True))
    for one, (history, tokens) in zip(memory, kept, strict=True):
        assert torch.equal(one.history, history)
        assert one.tokens is not None
        assert tokens is not None
        assert torch.equal(one.tokens, tokens)
    assert all(len(new.history) == 8 for new in after)


def test_memory_grows_in_latent_space_and_is_what_the_sampler_gave() -> None:
    """The frames that come out are the decoded latents that go into memory; nothing is encoded again."""
    simulator = trained()
    memory = simulator.begin(pictures(2, 16, 24))
    for chunk in range(2):
        frames, memory = simulator.imagine(memory, maps(2, seed=chunk), draw(simulator, [0, 1], chunk))
    for i, one in enumerate(memory):
        assert one.history.shape == (12, *LATENT)
        assert torch.equal(one.history[0], one.history[3]), "the first frame fills the first memory"
        assert torch.equal(simulator.frames(one.history[-4:]), frames[i])


@pytest.mark.parametrize(("first_tokens", "calls"), [("given", 1), ("decoded", 2)])
def test_what_is_constant_is_computed_once(first_tokens: Literal["given", "decoded"], calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over three chunks: image tokens per rollout, keys and values per chunk; only new maps are encoded, only new frames decoded."""
    simulator = trained(dataclasses.replace(SMALL, first_tokens=first_tokens))
    counted = {"clip": 0, "keys_values": 0, "encoded": 0, "decoded": 0}

    def count(owner: Any, method: str, name: str, size: bool = False) -> None:
        original = getattr(owner, method)

        def counting(*args: Any, **kwargs: Any) -> Any:
            counted[name] += len(args[0]) if size else 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, method, counting)

    count(simulator.clip, "forward", "clip")
    count(simulator.unet, "keys_values", "keys_values")
    count(simulator.vae, "encode", "encoded", size=True)
    count(simulator.vae, "decode", "decoded", size=True)
    memory = simulator.begin(pictures(2, 16, 24))
    for chunk in range(3):
        _, memory = simulator.imagine(memory, maps(2), draw(simulator, [0, 1], chunk))
    again = 2 * (calls - 1)  # the first frame, decoded once for its tokens
    assert counted == {"clip": calls, "keys_values": 3, "encoded": 2 + 3 * 2 * 4, "decoded": 3 * 2 * 4 + again}


@pytest.mark.parametrize(
    ("changes", "draws"), [({}, 4), ({"eta": 0.0}, 1), ({"posterior": "sample"}, 6), ({"eta": 0.0, "posterior": "sample"}, 3)]
)
def test_noise_shape_counts_the_draws(changes: dict[str, Any], draws: int) -> None:
    simulator = trained(dataclasses.replace(SMALL, **changes))
    assert simulator.noise_shape() == (draws, 4, 4, 8, 12)
    memory, step, given = simulator.begin(pictures(1, 16, 24)), maps(1), draw(simulator, [0], 0)
    base, _ = simulator.imagine(memory, step, given)
    for i in range(draws):  # every draw has an effect
        other = given.clone()
        other[:, i] += 1.0
        assert (simulator.imagine(memory, step, other)[0] != base).any(), i


def test_everything_that_is_told_has_an_effect() -> None:
    simulator = trained()
    memory, step, given = simulator.begin(pictures(1, 16, 24)), maps(1), draw(simulator, [0], 0)
    base, _ = simulator.imagine(memory, step, given)
    for name in ("picture", "rays", "delta"):
        changed = dataclasses.replace(step, **{name: getattr(maps(1, seed=77), name)})
        assert (simulator.imagine(memory, changed, given)[0] != base).any(), name
    other = [dataclasses.replace(memory[0], history=memory[0].history + 0.5)]
    assert (simulator.imagine(other, step, given)[0] != base).any()
    assert memory[0].tokens is not None
    other = [dataclasses.replace(memory[0], tokens=memory[0].tokens.flip(0) * 2)]
    assert (simulator.imagine(other, step, given)[0] != base).any()


def test_wrong_shapes_are_refused() -> None:
    simulator = trained()
    memory, step, given = simulator.begin(pictures(2, 16, 24)), maps(2), draw(simulator, [0, 1], 0)
    with pytest.raises(ValueError, match="imagine"):
        simulator.imagine(memory[:1], step, given)
    with pytest.raises(ValueError, match="imagine"):
        simulator.imagine(memory, step, given[:, :2])
    with pytest.raises(ValueError, match="imagine"):
        simulator.imagine(memory, ActionMap(step.picture[:, :3], step.rays, step.delta[:, :3]), given)


def test_frames_of_another_size_are_resized() -> None:
    simulator = trained()
    large = pictures(1, 4, 6).repeat_interleave(16, 1).repeat_interleave(16, 2)
    small = pictures(1, 4, 6).repeat_interleave(4, 1).repeat_interleave(4, 2)
    a, b = simulator.picture(large), simulator.picture(small)
    assert a.shape == b.shape == (1, 3, 16, 24)
    inner = torch.tensor([1, 2])[:, None] + 4 * torch.arange(6)  # of each block of 4 px, the ones that its neighbours do not blend into
    rows, columns = inner[:, :4].flatten(), inner.flatten()
    torch.testing.assert_close(a[:, :, rows][..., columns], b[:, :, rows][..., columns])
    assert not torch.equal(a, b), "edges are blended: antialiased"
    assert len(simulator.begin(large)) == 1


def test_whatever_is_encoded_the_autoencoder_is_given_few_pictures_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rollouts that begin together too: there may be more than its engine takes, or than there is memory for."""
    simulator, frames, counts = trained(), pictures(5, 16, 24), list[int]()
    want, whole = simulator.begin(frames), simulator.encode(simulator.picture(frames))
    right = simulator.runs[ENCODER]
    monkeypatch.setattr(evac, "_MOST_PICTURES", 2)
    simulator.runs[ENCODER] = lambda given: (counts.append(len(given)), right(given))[1]
    torch.testing.assert_close(simulator.encode(simulator.picture(frames)), whole)
    for one, other in zip(simulator.begin(frames), want, strict=True):
        torch.testing.assert_close(one.history, other.history)
    assert counts == [2, 2, 1] * 2


def test_guidance_hides_the_chunk_and_the_picture_but_not_the_motion() -> None:
    simulator = trained(dataclasses.replace(SMALL, guidance=3.0))
    generator = torch.Generator().manual_seed(3)
    memory, chunk = torch.randn(2, 4, 4, 8, 12, generator=generator), torch.randn(2, 4, 4, 8, 12, generator=generator)
    image, action = torch.randn(2, 6, 32, generator=generator), torch.randn(2, 5, 32, generator=generator)
    told = simulator.condition(memory, chunk, torch.randn(2, 6, 8, 12, generator=generator), image, action)
    hidden = simulator._unconditional(told)
    latent, mask, rest = hidden.fixed.split([4, 1, 10], dim=1)
    assert torch.equal(latent[:, :, :4], memory)
    assert not latent[:, :, 4:].any()
    assert mask[:, :, :4].all()
    assert not mask[:, :, 4:].any()
    assert torch.equal(rest, told.fixed[:, 5:])
    assert torch.equal(hidden.action, action)
    assert not torch.equal(hidden.image, image)
    seen = simulator.condition(memory, chunk, told.fixed[:, 9:, 0], image, action, torch.tensor([True, False]))
    torch.testing.assert_close(seen.fixed[1, :5], hidden.fixed[1, :5])
    torch.testing.assert_close(seen.fixed[0, :5], told.fixed[0, :5])


def test_memory_indices_are_first_thirds_and_last() -> None:
    assert memory_indices(20, 4) == [0, 6, 13, 19]
    assert memory_indices(36, 4) == [0, 12, 24, 35]
    assert memory_indices(4, 4) == [0, 1, 2, 3]


def test_deltas_of_a_known_path() -> None:
    rows = torch.arange(42.0)[None, :, None].expand(-1, -1, DELTA_DIM)
    released = dataclasses.replace(SMALL, chunk=16, memory=4, delta_rows="published")

    def told(number: int, config: SimulatorConfig = released) -> list[float]:
        return chunk_deltas(rows, number, config)[0, :, 0].tolist()

    assert told(0) == list(range(16))
    assert told(1) == list(range(19, 36)), "17 rows, shifted by three"
    assert told(2) == [*range(35, 42), *[0.0] * 9], "filled up where the path ends inside the chunk"
    assert told(1, dataclasses.replace(released, delta_rows="aligned")) == list(range(16, 32))
    assert chunk_deltas(rows[:, :32], 1, released).shape == (1, 13, DELTA_DIM), "not filled up where the path ends with the chunk"


def test_normalised_deltas_leave_the_grippers_alone() -> None:
    simulator = trained(dataclasses.replace(SMALL, delta_stride=3.0))
    simulator.delta_mean.fill_(0.5)
    simulator.delta_std.fill_(2.0)
    out = simulator.normalise(torch.full((1, 1, DELTA_DIM), 7.5))[0, 0]
    assert out[[6, 13]].tolist() == [7.5, 7.5]
    assert out[[0, 5, 7, 12]].tolist() == [1.0] * 4


# Networks


def test_vae_equals_diffusers() -> None:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    ours = VAE(VAEConfig(32, (1, 2, 2), 2, 4)).eval()
    theirs = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, block_out_channels=(32, 64, 64),
        layers_per_block=2, latent_channels=4, norm_num_groups=32,
    ).eval()  # fmt: skip
    renamed = {}
    for name, value in ours.state_dict().items():
        for old, new in (
            ("mid.block_1", "mid_block.resnets.0"), ("mid.block_2", "mid_block.resnets.1"), ("mid.attn_1.norm", "mid_block.attentions.0.group_norm"),
            ("mid.attn_1.q", "mid_block.attentions.0.to_q"), ("mid.attn_1.k", "mid_block.attentions.0.to_k"),
            ("mid.attn_1.v", "mid_block.attentions.0.to_v"), ("mid.attn_1.proj_out", "mid_block.attentions.0.to_out.0"),
            ("nin_shortcut", "conv_shortcut"), ("norm_out", "conv_norm_out"), (".downsample.", ".downsamplers.0."), (".upsample.", ".upsamplers.0."),
            (".block.", ".resnets."), ("encoder.down.", "encoder.down_blocks."),
        ):  # fmt: skip
            name = name.replace(old, new)
        for level in range(3):
            name = name.replace(f"decoder.up.{level}.", f"decoder.up_blocks.{2 - level}.")
        renamed[name] = value.flatten(1) if "attentions" in name and value.dim() == 4 else value
    theirs.load_state_dict(renamed)
    given = torch.rand(2, 3, 16, 24) * 2 - 1
    with torch.no_grad():
        posterior = ours.encode(given)
        want = theirs.encode(given).latent_dist
        torch.testing.assert_close(posterior.mean, want.mean, rtol=0, atol=2e-5)
        torch.testing.assert_close(posterior.logvar, want.logvar, rtol=0, atol=2e-5)
        torch.testing.assert_close(posterior.kl(), want.kl(), rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(ours.decode(want.mean), theirs.decode(want.mean).sample, rtol=0, atol=3e-5)


def test_clip_tower_equals_transformers() -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    ours = ClipTower(ClipConfig(image=16, patch=4, width=32, layers=3, heads=4)).eval()
    theirs = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=16,
            patch_size=4,
            hidden_act="gelu",
        )
    ).eval()
    state = ours.state_dict()
    named = {
        "embeddings.class_embedding": state["class_embedding"], "embeddings.patch_embedding.weight": state["conv1.weight"],
        "embeddings.position_embedding.weight": state["positional_embedding"], "pre_layrnorm.weight": state["ln_pre.weight"],
        "pre_layrnorm.bias": state["ln_pre.bias"],
    }  # fmt: skip
    for i in range(3):
        own, other = f"transformer.resblocks.{i}.", f"encoder.layers.{i}."
        for kind in ("weight", "bias"):
            for letter, value in zip("qkv", state[f"{own}attn.in_proj_{kind}"].chunk(3), strict=True):
                named[f"{other}self_attn.{letter}_proj.{kind}"] = value
            for ours_name, name in (
                ("attn.out_proj", "self_attn.out_proj"), ("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"), ("mlp.c_fc", "mlp.fc1"),
                ("mlp.c_proj", "mlp.fc2")
            ):  # fmt: skip
                named[f"{other}{name}.{kind}"] = state[f"{own}{ours_name}.{kind}"]
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in theirs.state_dict()) else ""
    missing = theirs.load_state_dict({prefix + name: value for name, value in named.items()}, strict=False)
    assert not missing.unexpected_keys
    assert all("post_layernorm" in name or "position_ids" in name for name in missing.missing_keys)
    given = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        want = theirs(clip_picture(given, 16), output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(ours(given), want, rtol=0, atol=1e-5)


def test_clip_picture_equals_kornia() -> None:
    """kornia.geometry.resize(p, (28, 28), "bicubic", align_corners=True, antialias=True), then CLIP's mean and deviation (kornia 0.8)."""
    y, x = torch.meshgrid(torch.arange(50.0), torch.arange(80.0), indexing="ij")
    given = torch.stack([torch.sin(0.31 * x + 0.17 * y), torch.cos(0.05 * x * y / 10), torch.sin(0.9 * x) * torch.cos(0.7 * y)])[None]
    want = {
        (0, 0, 0): 0.390991, (0, 13, 5): 1.488677, (0, 27, 27): 1.799369, (1, 3, 20): 0.111666, (1, 20, 3): 0.132011, (2, 9, 9): -0.315018,
        (2, 27, 0): -0.37136, (2, 14, 26): -0.094367,
    }  # fmt: skip
    made = clip_picture(given, 28)
    assert made.shape == (1, 3, 28, 28)
    for place, value in want.items():
        assert abs(float(made[0][place]) - value) < 2e-5, place


def test_published_sizes() -> None:
    """The released checkpoint's parameter counts; 64 matrices of the U-Net that no block reads (51,118,080) are left out of ours."""
    with torch.device("meta"):
        latent, context = EVAC.vae.z_channels, EVAC.unet.context_dim
        unet, vae, clip = UNet(EVAC.unet, latent), VAE(EVAC.vae), ClipTower(EVAC.clip)
        image, action = Resampler(EVAC.image_resampler, EVAC.clip.width, context), Resampler(EVAC.action_resampler, DELTA_DIM, context)

    def count(network: nn.Module) -> int:
        return sum(parameter.numel() for parameter in network.parameters())

    assert count(unet) == 1_464_484_100 - 51_118_080
    assert count(vae) == 83_653_863
    assert count(image) == 48_787_456
    assert count(action) == 47_245_312
    assert count(clip) == 632_076_800 - 2 * 1280 - 1280 * 1024, "open_clip's ViT-H/14 without its last norm and projection"
    assert len(unet.state_dict()) == 1549 - 64


def test_samples_of_a_batch_have_their_own_timestep() -> None:
    unet = trained().unet
    generator = torch.Generator().manual_seed(5)
    x, image, action = (torch.randn(*shape, generator=generator) for shape in ((2, 19, 7, 8, 12), (2, 6, 32), (2, 5, 32)))
    levels, fps, domain = torch.tensor([17, 803]), torch.tensor([2, 5]), torch.tensor([11, 3])
    with torch.no_grad():
        both = unet(x, levels, image, action, fps, domain, 3)
        for i in range(2):
            one = unet(*(t[i : i + 1] for t in (x, levels, image, action, fps, domain)), 3)
            torch.testing.assert_close(both[i : i + 1], one, rtol=1e-4, atol=1e-5)
        swapped = unet(x, levels.flip(0), image, action, fps, domain, 3)
    assert (both - swapped).abs().max() > 1e-3
    with pytest.raises(ValueError, match="want"):
        unet(x[:, :18], levels, image, action, fps, domain, 3)


def test_only_the_temporal_convolution_is_causal() -> None:
    convolution, x = CausalConv(4), torch.randn(1, 6, 2, 3, 4)
    later = x.clone()
    later[:, 4:] += 1.0
    assert torch.equal(convolution(x)[:, :4], convolution(later)[:, :4])
    plain = nn.functional.conv3d(
        nn.functional.pad(x.permute(0, 4, 1, 2, 3), (0, 0, 0, 0, 2, 0), mode="replicate"), convolution.weight, convolution.bias
    )
    torch.testing.assert_close(convolution(x), plain.permute(0, 2, 3, 4, 1))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2), (torch.float64, 1e-12)], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 8), (3, 17, 8), (2, 64, 64), (3, 801, 32)])
def test_group_norm_matches_its_definition(shape: tuple[int, int, int], dtype: torch.dtype, tolerance: float) -> None:
    """Small samples, and large ones, which are summed otherwise."""
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(shape) * 3 + 5).to(dtype), torch.randn(shape[-1], dtype=dtype), torch.randn(shape[-1], dtype=dtype)
    made = group_norm(x, 4, weight, bias, 1e-5)
    assert made.dtype == dtype
    torch.testing.assert_close(made.double(), group_norm_ref(x, 4, weight, bias, 1e-5), rtol=tolerance, atol=tolerance)
    with pytest.raises(ValueError, match="groups"):
        group_norm(x, 3, weight, bias, 1e-5)


@pytest.mark.parametrize("offset", [30.0, 300.0])
@pytest.mark.parametrize("way", [group_norm, _as_graph])
def test_group_norm_is_as_exact_as_torchs_far_from_zero(way: Callable[..., torch.Tensor], offset: float) -> None:
    """Means so many deviations from 0, of a group or of each channel: E[x^2] - E[x]^2 was off by a thousand times as much."""
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.ones(64), torch.zeros(64)
    for center in (torch.full((64,), offset), offset * torch.linspace(-1, 1, 64)):
        x = torch.randn(2, 801, 64, generator=generator) + center
        torchs = F.group_norm(x.transpose(1, 2).contiguous(), 4, weight, bias, 1e-5).transpose(1, 2)
        want = group_norm_ref(x, 4, weight, bias, 1e-5)
        assert relative_error(way(x, 4, weight, bias, 1e-5), want) < 2 * relative_error(torchs, want) + 1e-7


def test_upsampling_before_a_convolution_is_one_transposed_convolution() -> None:
    torch.manual_seed(0)
    joined, x = UpsampleConv(6), torch.randn(2, 3, 5, 7, 6)
    pictures = upsample(x).flatten(0, 1).permute(0, 3, 1, 2)
    want = nn.functional.conv2d(pictures, joined.weight, joined.bias, padding=1).permute(0, 2, 3, 1)
    torch.testing.assert_close(joined(x).flatten(0, 1), want, rtol=1e-5, atol=1e-5)


def test_upsampling_repeats_pixels() -> None:
    x = torch.arange(6.0).view(1, 2, 3, 1)
    assert torch.equal(upsample(x)[0, :, :, 0], x[0, :, :, 0].repeat_interleave(2, 0).repeat_interleave(2, 1))


# The schedule


def test_the_last_level_is_pure_noise() -> None:
    alphas = schedule.alphas_cumprod()
    assert alphas[-1] == 0.0
    assert abs(alphas[0] - 0.99915) < 1e-6
    assert (np.diff(alphas) < 0).all()


@pytest.mark.parametrize("steps", [1, 2, 7, 11, 14, 15, 20, 25, 27, 50, 60])
def test_ancestral_sampling_stays_finite(steps: int) -> None:
    """In float32 the first step's radicand is below 0 for 7, 11, 14, 15, 20, 25 steps."""
    sampler = schedule.Sampler.ddim(steps, eta=1.0)
    x, v, given = torch.randn(3, 1, 4, 2, 3, 3)
    for index in reversed(range(steps)):
        x, _ = sampler.step(x, v, torch.tensor([index]), given)
        assert torch.isfinite(x).all()


@pytest.mark.parametrize("steps", [61, 0, 1001])
def test_counts_that_make_no_table_are_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=f"denoise_steps={steps}"):
        schedule.trailing_timesteps(steps)


def test_every_other_count_has_its_table() -> None:
    refused = 0
    for steps in range(1, 1001):
        try:
            levels = schedule.trailing_timesteps(steps)
        except ValueError as error:
            refused += 1
            cure = int(str(error).rsplit(" ", 1)[1])
            assert len(schedule.trailing_timesteps(cure)) == cure
            continue
        assert len(levels) == steps
        assert levels[-1] == 999
        assert levels[0] >= 0
        assert (np.diff(levels) > 0).all()
    assert 0 < refused < 100


def test_a_perfect_prediction_is_recovered_in_one_step() -> None:
    """Given the true v, every DDIM step finds the true clean latent, and lies on its path."""
    sampler, clean, epsilon = schedule.Sampler.ddim(5, eta=0.0, dynamic_rescale=False), torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    index = torch.tensor([4, 2])
    a, b = (torch.from_numpy(t[index.numpy()]).float().view(2, 1, 1, 1) for t in (sampler.alphas, sampler.alphas_prev))
    x, v = a.sqrt() * clean + (1 - a).sqrt() * epsilon, a.sqrt() * epsilon - (1 - a).sqrt() * clean
    before, found = sampler.step(x, v, index, None)
    torch.testing.assert_close(found, clean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(before, b.sqrt() * clean + (1 - b).sqrt() * epsilon, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PRESETS)
def test_a_presets_sampler_ends_at_the_clean_latent(name: str) -> None:
    """Given the true v at every step; with dynamic rescale and few steps it would end at 0.7 of it."""
    config = PRESETS[name].simulator
    sampler = schedule.Sampler.ddim(config.denoise_steps, config.eta, config.dynamic_rescale)
    scales, clean = schedule.latent_scales(config.dynamic_rescale), torch.randn(1, 4, 8, 3, 3)
    x = x_0 = torch.randn(1, 4, 8, 3, 3)
    for index in reversed(range(len(sampler))):
        a, scaled = float(sampler.alphas[index]), clean * float(scales[sampler.timesteps[index]])
        epsilon = (x - a**0.5 * scaled) / (1 - a) ** 0.5
        x, x_0 = sampler.step(
            x, a**0.5 * epsilon - (1 - a) ** 0.5 * scaled, torch.tensor([index]), torch.randn_like(x) if config.eta else None
        )
    ended = x_0 if config.final == "pred_x0" else x
    assert float((ended * clean).sum() / (clean * clean).sum()) > 0.95


def test_a_sampled_first_frame_deviates_in_latents() -> None:
    """Mean and deviation are scaled alike: a sample is of the scaled posterior."""
    simulator = trained(dataclasses.replace(SMALL, posterior="sample"))
    frame = pictures(1, 16, 24)
    posterior = simulator._posterior(simulator.picture(frame))
    (memory,) = simulator.begin(frame)
    scale = float(simulator.latent_scale)
    assert abs(scale - 1.0) > 0.1
    torch.testing.assert_close(memory.history[-1], posterior.mean[0] * scale)
    assert memory.deviation is not None
    torch.testing.assert_close(memory.deviation, torch.exp(0.5 * posterior.logvar[0]) * scale)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_does_not_dim_what_it_remembers(name: str) -> None:
    """A network that is right, and reads the clean latent off its last memory frame, keeps it for 27 chunks. With scales by noise level, as EVAC's
    release has them, 27 steps would leave 0.47 of it.
    """
    asked, tiny = PRESETS[name].simulator, PRESETS["tiny"].simulator
    sampler = {field: getattr(asked, field) for field in ("denoise_steps", "eta", "dynamic_rescale", "final", "scale_memory")}
    simulator = Evac.initialised(dataclasses.replace(tiny, **sampler), 0).eval()
    config, channels, memories = simulator.config, tiny.vae.z_channels, tiny.memory
    alphas, scales = torch.from_numpy(schedule.alphas_cumprod()), torch.from_numpy(schedule.latent_scales(asked.dynamic_rescale))
    levels: list[int] = []

    def right(x: torch.Tensor, *_: Any) -> torch.Tensor:
        level = levels.pop(0)
        noisy, copied = x[:, :channels, memories:].double(), x[:, channels : 2 * channels, memories - 1 : memories].double()
        a, clean = alphas[level], scales[level] * copied
        v = (a.sqrt() * noisy - clean) / (1 - a).sqrt()
        return torch.cat([torch.zeros_like(x[:, :channels, :memories]).double(), v.expand_as(noisy)], 2).float()

    simulator.runs["simulator_unet"] = right
    shown = torch.randn(channels, *config.latent, generator=torch.Generator().manual_seed(0))
    memory = simulator.begin(torch.zeros(1, config.height, config.width, 3, dtype=torch.uint8))
    memory = [dataclasses.replace(memory[0], history=shown.expand(memories, -1, -1, -1).contiguous())]
    step = ActionMap(
        torch.zeros(1, config.chunk, config.height, config.width, 3, dtype=torch.uint8), torch.zeros(1, 6, *config.latent),
        torch.zeros(1, config.chunk, DELTA_DIM),
    )  # fmt: skip
    for chunk in range(27):
        levels = simulator.sampler.timesteps.tolist()[::-1]
        noises = torch.randn(1, *simulator.noise_shape(), generator=torch.Generator().manual_seed(chunk))
        _, memory = simulator.imagine(memory, step, noises)
    gain = float((memory[0].history[-1] * shown).sum() / shown.square().sum())
    assert gain == pytest.approx(1.0, abs=0.02)


def test_eta_outside_of_its_range_is_refused() -> None:
    with pytest.raises(ValueError, match="eta"):
        schedule.Sampler.ddim(4, eta=1.5)


# Files


def released(simulator: Evac, extra: bool = True) -> dict[str, torch.Tensor]:
    """`simulator` as the released files have it: prefixes, dead matrices, tables, and CLIP's text half."""
    state = {}
    for part_name, prefix in weights.PREFIXES.items():
        state |= {prefix + name: value.clone() for name, value in getattr(simulator, part_name).state_dict().items()}
    if extra:
        for name in [name for name in state if ".attn2.to_q." in name and name.rsplit(".attn2", 1)[0].count(".1.transformer_blocks")]:
            for dead in ("to_k", "to_v", "to_k_ip", "to_v_ip", "to_k_tp", "to_v_tp"):
                state.setdefault(name.replace("to_q", dead), torch.ones(3, 3))
        state |= {"betas": torch.zeros(3), "scale_arr": torch.ones(2), "embedder.model.token_embedding.weight": torch.zeros(2, 2)}
        state |= {"embedder.model.visual.ln_post.weight": torch.zeros(2), "embedder.model.visual.proj": torch.zeros(2, 2)}
    return state


@pytest.mark.parametrize("layout", ["lightning", "deepspeed", "deepspeed module", "data parallel", "both", "safetensors"])
def test_released_layouts_load(tmp_path: Path, layout: str) -> None:
    source, target = trained(seed=1), trained(seed=2)
    state, path = released(source), tmp_path / "weights.pt"
    if layout == "safetensors":
        from safetensors.torch import save_file

        path = tmp_path / "weights.safetensors"
        save_file({name: value.contiguous() for name, value in state.items()}, path)
    else:
        prefixed, parallel, both = (
            {prefix + name: value for name, value in state.items()} for prefix in ("_forward_module.", "module.", "_forward_module.module.")
        )
        layouts: dict[str, Any] = {
            "lightning": {"state_dict": state, "epoch": 3}, "deepspeed": prefixed, "deepspeed module": {"module": prefixed},
            "data parallel": parallel, "both": {"state_dict": both},
        }  # fmt: skip
        torch.save(layouts[layout], path)
    weights.load_published(target, weights.read(path), path.name)
    for name, value in target.named_parameters():
        assert torch.equal(value, source.get_parameter(name)), name


def test_misfits_are_named() -> None:
    simulator = trained()
    state = released(simulator)
    del state["model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k_ip.weight"]
    state["model.diffusion_model.out.9.weight"] = torch.zeros(1)
    state["model.diffusion_model.time_embed.0.bias"] = torch.zeros(5)
    before = simulator.unet.out[2].bias.clone()  # type: ignore[union-attr, operator]
    with pytest.raises(checkpoint.CheckpointError) as caught:
        weights.load_published(simulator, state, "file.pt")
    for part_of in ("file.pt", "missing: middle_block.1", "too much: out.9.weight", r"time_embed.0.bias (5,), want (256,)"):
        assert part_of in str(caught.value)
    assert torch.equal(before, simulator.unet.out[2].bias)  # type: ignore[union-attr, arg-type]
    with pytest.raises(checkpoint.CheckpointError, match=r"file\.pt: all tensors are of no known part: strange\.weight; want a released EVAC"):
        weights.load_published(simulator, {"strange.weight": torch.zeros(1)}, "file.pt")


def test_tensors_of_no_known_part_are_passed_over_and_told(capsys: pytest.CaptureFixture[str]) -> None:
    """What training keeps beside the weights; names within a part that are too much or missing stay errors."""
    source, target = trained(seed=1), trained(seed=2)
    few = {"model_ema.decay": torch.zeros(()), "model_ema.num_updates": torch.zeros(())}
    many = {f"model_ema.diffusion_model{i:02}": torch.zeros(1) for i in range(12)}
    for stray, told in (
        (few, r"file\.pt: passed over 2 tensors of no known part: model_ema\.decay, model_ema\.num_updates\n"),
        (many, r"file\.pt: passed over 12 tensors of no known part: model_ema\.diffusion_model00, .*07 and 4 more\n"),
        ({}, ""),
    ):
        weights.load_published(target, {**released(source), **stray}, "file.pt")
        assert re.fullmatch(told, capsys.readouterr().err)
        for name, value in target.named_parameters():
            assert torch.equal(value, source.get_parameter(name)), name
    with pytest.raises(checkpoint.CheckpointError, match=r"unet: too much: strange\.weight"):
        weights.load_published(target, {**released(source), **few, "model.diffusion_model.strange.weight": torch.zeros(1)}, "file.pt")


def test_every_misfit_of_every_part_is_named_and_nothing_is_copied() -> None:
    simulator = trained(seed=2)
    state = released(trained(seed=1))
    missing = [name for name in state if ".in_layers." in name]
    for name in missing:
        del state[name]
    extra = [f"first_stage_model.extra.{i}" for i in range(12)]
    state |= {name: torch.zeros(1) for name in extra}
    state["image_proj_model.proj_in.bias"] = torch.zeros(3)
    before = {name: value.clone() for name, value in simulator.state_dict().items()}
    with pytest.raises(checkpoint.CheckpointError) as caught:
        weights.load_published(simulator, state, "file.pt")
    said = str(caught.value)
    assert len(missing) > 8
    for name in (*missing, *extra, "image_proj_model.proj_in.bias"):
        assert any(name.removeprefix(prefix) in said for prefix in weights.PREFIXES.values() if name.startswith(prefix)), name
    assert "image_resampler: mis-shaped: proj_in.bias (3,), want (32,)" in said
    assert all(torch.equal(value, before[name]) for name, value in simulator.state_dict().items())


def test_a_file_with_other_image_tokens_says_what_to_set(tmp_path: Path) -> None:
    other = dataclasses.replace(SMALL, image_resampler=dataclasses.replace(SMALL.image_resampler, queries=3))
    state = released(trained(other, seed=1))
    with pytest.raises(checkpoint.CheckpointError, match=r"latents \(1, 3, 32\), want \(1, 6, 32\).* 3 image tokens, these settings 6.*EVAC_RLINF"):
        weights.load_published(trained(), state, "file.pt")
    torch.save(state, tmp_path / "file.pt")
    assert weights.load(tmp_path / "file.pt", other).image_resampler.latents.shape == (1, 3, 32)
    assert (EVAC_RLINF.image_resampler.queries, EVAC_RLINF.chunk, EVAC_RLINF.latent) == (128, 8, (32, 32))
    with torch.device("meta"):
        assert Resampler(EVAC_RLINF.image_resampler, 1280, 1024).latents.shape == (1, 128, 1024)


def test_the_image_tower_may_be_an_open_clip_file(tmp_path: Path) -> None:
    source, theirs = trained(seed=1), trained(seed=3)
    state = {name: value for name, value in released(source).items() if not name.startswith("embedder.")}
    torch.save(state, tmp_path / "evac.pt")
    tower = {f"visual.{name}": value for name, value in theirs.clip.state_dict().items()}
    text = {"logit_scale": torch.zeros(()), "transformer.resblocks.0.ln_1.bias": torch.zeros(2), "visual.proj": torch.zeros(2, 2)}
    torch.save(tower | text, tmp_path / "clip.bin")
    loaded = weights.load(tmp_path / "evac.pt", SMALL, tmp_path / "clip.bin")
    for name, value in loaded.named_parameters():
        assert torch.equal(value, (theirs if name.startswith("clip.") else source).get_parameter(name)), name
    torch.save(tower | {"visual.more": torch.zeros(1)}, tmp_path / "clip.bin")
    with pytest.raises(checkpoint.CheckpointError, match=r"clip\.bin: clip: too much: more"):
        weights.load(tmp_path / "evac.pt", SMALL, tmp_path / "clip.bin")


def test_training_may_begin_without_the_image_tower_in_the_file(tmp_path: Path) -> None:
    source, theirs = trained(seed=1), trained(seed=3)
    torch.save({name: value for name, value in released(source).items() if not name.startswith("embedder.")}, tmp_path / "evac.pt")
    torch.save({f"visual.{name}": value for name, value in theirs.clip.state_dict().items()}, tmp_path / "clip.bin")
    with pytest.raises(checkpoint.CheckpointError, match=r"evac\.pt: clip: missing.*give open_clip's file beside it \(world\.clip"):
        weights.begin_from(tmp_path / "evac.pt", SMALL, 2, torch.device("cpu"))
    target, new = weights.begin_from(tmp_path / "evac.pt", SMALL, 2, torch.device("cpu"), tmp_path / "clip.bin")
    assert new == []
    for name, value in target.named_parameters():
        assert torch.equal(value, (theirs if name.startswith("clip.") else source).get_parameter(name)), name
    checkpoint.save(tmp_path / "ours.safetensors", weights.to_tree(source))
    with pytest.raises(checkpoint.CheckpointError, match=r"clip\.bin: is for a released EVAC"):
        weights.begin_from(tmp_path / "ours.safetensors", SMALL, 2, torch.device("cpu"), tmp_path / "clip.bin")


def test_a_file_of_something_else_is_no_simulator(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "policy.safetensors", {"config": {}, "backbone": {}})
    with pytest.raises(checkpoint.CheckpointError, match=r"policy\.safetensors: not a simulator"):
        weights.load(tmp_path / "policy.safetensors", SMALL)
    tree = weights.to_tree(trained())
    del tree["config"]["chunk"]
    checkpoint.save(tmp_path / "old.safetensors", tree)
    with pytest.raises(checkpoint.CheckpointError, match=r"old\.safetensors: SimulatorConfig: .*chunk"):
        weights.load(tmp_path / "old.safetensors", SMALL)


def test_an_unfilled_simulator_is_laid_out_as_any_other() -> None:
    made, unfilled = trained(), Evac.unfilled(dataclasses.replace(SMALL, latent_scale=0.3))
    assert float(unfilled.latent_scale) == pytest.approx(0.3)
    assert unfilled.delta_std.tolist() == [1.0] * DELTA_DIM
    for name, value in made.state_dict().items():
        other = unfilled.state_dict()[name]
        assert (value.shape, value.stride(), value.dtype, other.device.type) == (other.shape, other.stride(), other.dtype, "cpu"), name


def test_sampling_may_be_changed() -> None:
    simulator = trained()
    simulator.sample_with(denoise_steps=5, eta=0.0)
    assert (len(simulator.sampler), simulator.config.denoise_steps, simulator.config.eta, simulator.config.guidance) == (5, 5, 0.0, 1.0)
    assert simulator.noise_shape()[0] == 1
    with pytest.raises(ValueError, match="denoise_steps=61"):
        simulator.sample_with(denoise_steps=61)
    assert simulator.config.denoise_steps == 5


def test_parts_may_come_from_elsewhere_where_that_is_said() -> None:
    source, target = trained(seed=1), trained(seed=2)
    state = {name: value for name, value in released(source).items() if not name.startswith("embedder.")}
    with pytest.raises(checkpoint.CheckpointError, match="clip"):
        weights.load_published(target, state, "file.pt")
    weights.load_published(target, state, "file.pt", without=["clip"])
    with pytest.raises(ValueError, match="parts are"):
        weights.load_published(target, state, "file.pt", without=["clap"])


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (Path(__file__).parent / "evil.txt", "executed")


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"state_dict": {"x": torch.zeros(1)}, "hyper_parameters": Evil()}, path)
    with pytest.raises(checkpoint.CheckpointError, match=r"weights\.pt"):
        weights.read(path)
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(checkpoint.CheckpointError, match=r"weights\.pt"):
        weights.read(path)
    assert not (Path(__file__).parent / "evil.txt").exists()


@pytest.mark.parametrize("layer", ["state_dict", "module", None], ids=["lightning", "deepspeed", "plain"])
def test_a_file_with_more_than_tensors_says_how_to_keep_these_alone(layer: str | None, tmp_path: Path) -> None:
    path, source = tmp_path / "last.ckpt", trained(seed=1)
    held: dict[str, Any] = {layer: released(source)} if layer else dict(released(source))
    torch.save({**held, "hyper_parameters": argparse.Namespace(lr=1e-4)}, path)
    with pytest.raises(checkpoint.CheckpointError, match=r"last\.ckpt: holds more than tensors \(argparse\.Namespace\)") as caught:
        weights.read(path)
    said = str(caught.value)
    assert "again" not in said
    cure = said.partition("in Python: ")[2].replace("'weights.pt'", repr(str(tmp_path / "weights.pt")))
    exec(cure, {"torch": torch})  # what the user is told to run
    assert weights.read(tmp_path / "weights.pt").keys() == released(source).keys()


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "no tensors"])
def test_damaged_files_are_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "weights.pt"
    torch.save(released(trained()), path)
    if damage == "missing":
        path.unlink()
    elif damage == "no tensors":
        torch.save({"state_dict": {"epoch": 3}}, path)
    else:
        path.write_bytes(path.read_bytes()[: 0 if damage == "empty" else 5000])
    with pytest.raises(checkpoint.CheckpointError, match=r"weights\.pt"):
        weights.read(path)


def test_dynamicrafter_is_an_initialisation() -> None:
    source, target = trained(seed=1), trained(seed=2)
    state = {name: value for name, value in released(source).items() if not name.startswith("cond_stage_model.")}
    state["cond_stage_model.transformer.text.weight"] = torch.zeros(3)
    first = "model.diffusion_model.input_blocks.0.0.weight"
    state[first] = state[first][:, :8]
    for name in [name for name in state if "domain_embedding" in name or "_tp." in name]:
        del state[name]
    before = {name: value.clone() for name, value in target.state_dict().items()}
    new = weights.load_dynamicrafter(target, state, "file.ckpt")
    after = target.state_dict()
    assert torch.equal(after["unet.input_blocks.0.0.weight"][:, :8], state[first])
    assert not after["unet.input_blocks.0.0.weight"][:, 8:].any()
    assert "unet.domain_embedding.weight" in new
    assert all(torch.equal(after[name], before[name]) for name in new)
    copied = [name for name in after if name not in new and name.startswith(("unet.", "vae.")) and "input_blocks.0.0.weight" not in name]
    assert copied
    assert all(torch.equal(after[name], source.state_dict()[name]) for name in copied)
    del state["model.diffusion_model.out.2.bias"]
    with pytest.raises(checkpoint.CheckpointError, match=r"missing: out\.2\.bias"):
        weights.load_dynamicrafter(target, state, "file.ckpt")


def test_a_simulator_survives_its_file(tmp_path: Path) -> None:
    simulator = trained()
    simulator.latent_scale.fill_(0.7)
    simulator.delta_std.fill_(0.01)
    checkpoint.save(tmp_path / "simulator.safetensors", weights.to_tree(simulator))
    again = weights.from_tree(checkpoint.load(tmp_path / "simulator.safetensors"), "simulator.safetensors")
    assert again.config == simulator.config
    first, step, given = pictures(1, 16, 24), maps(1), draw(simulator, [0], 0)
    assert torch.equal(simulator.imagine(simulator.begin(first), step, given)[0], again.imagine(again.begin(first), step, given)[0])
    tree = weights.to_tree(simulator)
    del tree["weights"]["latent_scale"]
    with pytest.raises(checkpoint.CheckpointError, match="latent_scale"):
        weights.from_tree(tree, "simulator.safetensors")


def test_the_same_seed_gives_the_same_weights() -> None:
    a, b, c = (Evac.initialised(SMALL, seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], c[name]) for name in a)


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 4"):
        dataclasses.replace(SMALL, height=15)
    with pytest.raises(ValueError, match="posterior"):
        dataclasses.replace(SMALL, posterior="sample", memory=5)
    with pytest.raises(ValueError, match="64 or more"):
        UNetConfig(32, (1,), 1, (1,), 32, 32)
    with pytest.raises(ValueError, match=r"vae\.channels=8: want a multiple of simulator\.vae\.norm_groups=3"):
        VAEConfig(8, (1,), 1, 4, norm_groups=3)
    with pytest.raises(ValueError, match="num_head_channels"):
        UNetConfig(64, (1,), 1, (1,), 48, 32)
    with pytest.raises(ValueError, match=r"clip\.image=16: want a multiple of simulator\.clip\.patch=5"):
        ClipConfig(image=16, patch=5, width=32, layers=1, heads=1)

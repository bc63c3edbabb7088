"""Stage world: examples are what a rollout sees, training learns, stops, resumes to the same bits and says where it broke."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.test_simulator import released
from worldenv import checkpoint, noise
from worldenv.checkpoint import Savepoint
from worldenv.config import ClipConfig, ResamplerConfig, SimulatorConfig, UNetConfig, VAEConfig, WorldConfig
from worldenv.data.episode import Episode, EpisodeSet, OnDisk
from worldenv.learning import autoencoder, processes, world_model
from worldenv.learning import clips as clips_module
from worldenv.learning.autoencoder import picture_loss, train_vae
from worldenv.learning.clips import (
    ENCODED_TOGETHER,
    Clips,
    _levels,
    _noisy_memory,
    clip_weights,
    draw_maps,
    draw_windows,
    encode,
    example,
    set_delta_statistics,
)
from worldenv.nouns import Camera
from worldenv.robots.tabletop import TABLETOP
from worldenv.simulator import schedule, weights
from worldenv.simulator.evac import DELTA_DIM, Evac, memory_indices
from worldenv.simulator.unet import TemporalConvBlock

CPU = torch.device("cpu")
SIDE, STEPS, CHUNK = 16, 12, 4
CONFIG = SimulatorConfig(
    unet=UNetConfig(64, (1,), 1, (1,), 64, 32, init_heads=1),
    vae=VAEConfig(8, (1, 2), 1, 4, norm_groups=4),
    clip=ClipConfig(image=16, patch=8, width=32, layers=1, heads=2),
    image_resampler=ResamplerConfig(32, 1, 2, 16, queries=4),
    action_resampler=ResamplerConfig(32, 1, 2, 16, queries=4),
    height=SIDE,
    width=SIDE,
    chunk=CHUNK,
    denoise_steps=1,
    eta=0.0,
    dynamic_rescale=False,
    final="pred_x0",
)
WORLD = WorldConfig(vae_steps=6, vae_batch=8, steps=6, batch=4, check_every=2, held_out_clips=4, patience=10)
TO_WORLD = np.array([[1.0, 0, 0, 0], [0, -1, 0, 0], [0, 0, -1, 0.8], [0, 0, 0, 1]])
CAMERA = Camera(np.array([[1.2 * SIDE, 0, SIDE / 2], [0, 1.2 * SIDE, SIDE / 2], [0, 0, 1]]), TO_WORLD, SIDE, SIDE)


def episode(seed: int, steps: int = STEPS) -> Episode:
    """A dark square goes where the gripper goes, over a bright table."""
    generator = np.random.default_rng(seed)
    place = np.clip(np.cumsum(generator.normal(0, 0.02, (steps + 1, 2)), axis=0) + generator.uniform(-0.15, 0.15, 2), -0.25, 0.25)
    frame = np.full((steps + 1, SIDE, SIDE, 3), 200, np.uint8)
    for picture, (x, y) in zip(frame, place, strict=True):
        u, v = int(SIDE / 2 + 1.2 * SIDE * x / 0.7), int(SIDE / 2 - 1.2 * SIDE * y / 0.7)
        picture[max(v - 2, 0) : v + 3, max(u - 2, 0) : u + 3] = [20, 40, 90]
    pose = np.concatenate([place, np.full((steps + 1, 1), 0.1), np.tile([1.0, 0, 0, 0], (steps + 1, 1))], axis=1)
    return Episode("follow", 0, "train", seed, "test", frame, pose, np.ones(steps + 1), np.zeros((steps, 7), np.float32), np.zeros(steps + 1, bool))


EPISODES = [episode(seed) for seed in range(6)]
HELD_OUT = [episode(seed) for seed in range(20, 23)]


class Kept(Savepoint):
    """A savepoint that is due at every step; `dies_at` counts saves until the process is killed right after one."""

    def __init__(self, path: Path, dies_at: int | None = None) -> None:
        super().__init__(path)
        self.dies_at = dies_at

    def due(self) -> bool:
        return True

    def save(self, tree: Any) -> None:
        super().save(tree)
        if self.dies_at is not None:
            self.dies_at -= 1
            if self.dies_at == 0:
                raise KeyboardInterrupt


class Never(Savepoint):
    """Keeps nothing."""

    def __init__(self) -> None:
        super().__init__(Path("/nonexistent/savepoint"))

    def due(self) -> bool:
        return False

    def save(self, tree: Any) -> None:
        pass


def clips_of(simulator: Evac, episodes: Sequence[Episode]) -> Clips:
    return encode(simulator, episodes, CAMERA, TABLETOP)


def labelled(clips: Clips) -> Clips:
    """`clips` whose latents are the number of their frame, and whose maps are that plus a half."""
    number = torch.arange(len(clips.latents), dtype=torch.float32).view(-1, 1, 1, 1)
    return dataclasses.replace(clips, latents=number.expand_as(clips.latents).clone(), maps=(number + 0.5).expand_as(clips.maps).clone())


def test_examples_are_what_a_rollout_sees() -> None:
    """The memory of a training clip is that of a rollout of the same frames, at every chunk, the first included."""
    simulator = Evac.initialised(CONFIG, 0)
    clips = labelled(clips_of(simulator, EPISODES))
    for start in range(STEPS - CHUNK + 1):
        batch = example(simulator, clips, np.array([[2, start]]), WORLD, 0, 0, training=False)
        begin = 2 * (STEPS + 1)
        history = [0] * 4 + list(range(1, start + 1))  # frames of a rollout that has come to `start`
        want = [begin + history[i] for i in memory_indices(len(history), 4)]
        assert batch.memory[0, 0, :, 0, 0].tolist() == want
        coming = [begin + start + k for k in range(1, CHUNK + 1)]
        assert batch.target[0, 0, :, 0, 0].tolist() == coming
        assert batch.maps[0, 0, :, 0, 0].tolist() == [n + 0.5 for n in coming]
        moved = EPISODES[2].pose[start + 1 : start + CHUNK + 1, 0] - EPISODES[2].pose[start : start + CHUNK, 0]
        first = 0 if TABLETOP.arms[-1].side == "left" else DELTA_DIM // 2
        np.testing.assert_allclose(batch.deltas[0, :, first], moved, atol=1e-6)
        assert torch.equal(batch.first[0], simulator.picture(torch.from_numpy(EPISODES[2].frame[:1]))[0])


def test_pictures_of_few_episodes_are_in_memory_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown, explored = EpisodeSet(tmp_path / "shown"), EpisodeSet(tmp_path / "explored")
    many = [episode(seed, 5) for seed in range(3 * ENCODED_TOGETHER)]
    for number, one in enumerate(many):
        (shown if number < 4 else explored).add(number, one)
    read, alive, most = EpisodeSet.load, set[int](), 0

    def watched(self: EpisodeSet, number: int) -> Episode:
        nonlocal most
        found = read(self, number)
        alive.add(id(found.frame))
        weakref.finalize(found.frame, alive.discard, id(found.frame))
        most = max(most, len(alive))
        return found

    monkeypatch.setattr(EpisodeSet, "load", watched)
    simulator = Evac.initialised(CONFIG, 0)
    on_disk = OnDisk([(shown if number < 4 else explored, number) for number in range(len(many))])
    got, want = clips_of(simulator, on_disk), clips_of(simulator, many)
    assert ENCODED_TOGETHER <= most <= 2 * ENCODED_TOGETHER + 1
    assert torch.equal(got.latents, want.latents)
    assert torch.equal(got.maps, want.maps)
    assert torch.equal(got.first, want.first)
    assert torch.equal(got.deltas, want.deltas)
    assert got.begins.tolist() == want.begins.tolist()


def test_windows_end_with_their_episode() -> None:
    simulator = Evac.initialised(CONFIG, 0)
    clips = clips_of(simulator, [episode(0, 12), episode(1, 5), episode(2, 4), episode(3, 3)])
    anywhere, aligned = clips.windows(CHUNK, aligned=False), clips.windows(CHUNK, aligned=True)
    assert [int((anywhere[:, 0] == e).sum()) for e in range(4)] == [9, 2, 1, 0]
    assert aligned.tolist() == [[0, 0], [0, 4], [0, 8], [1, 0], [2, 0]]
    with pytest.raises(ValueError, match="record longer ones"):
        clips_of(simulator, [episode(3, 3)]).windows(CHUNK, aligned=True)


def test_maps_are_of_their_own_frame() -> None:
    simulator = Evac.initialised(CONFIG, 0)
    clips = clips_of(simulator, EPISODES[:1])
    drawn = draw_maps(EPISODES[0].pose, EPISODES[0].gripper, CAMERA, TABLETOP)
    torch.testing.assert_close(clips.maps, simulator.encode(simulator.picture(drawn)))
    assert not clips.deltas[0].any()


def test_memory_noise_grows_toward_the_last_frame_and_spares_half() -> None:
    memory = torch.zeros(512, 2, 4, 4, 4)
    noisy = _noisy_memory(memory, 0, 3)
    spread = noisy.flatten(3).permute(0, 2, 1, 3).flatten(2).std(2)  # per example and frame
    level = (spread > 0).float()
    assert 0.45 < float(level.mean()) < 0.55, "about half of the frames stay as they are"
    assert (spread.mean(0).diff() > 0).all(), "later frames are noisier"
    assert (level.diff(dim=1) >= 0).all(), "sorted within an example"
    assert float(spread.max()) < 1.0
    assert torch.equal(noisy, _noisy_memory(memory, 0, 3))


@pytest.mark.parametrize(("last", "most"), [(False, 333), (True, 49)], ids=["a third", "a twentieth"])
def test_memorys_noise_stays_below_a_third_to_a_twentieth_of_the_levels(last: bool, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "integers", lambda seed, stage, step, high, count: np.array([high - 1 if last else 0]))
    monkeypatch.setattr(clips_module, "_normal", lambda seed, draw, step, stream, like: torch.ones_like(like))
    largest = float(_noisy_memory(torch.zeros(4000, 1, 4, 1, 1), 0, 3).max()) ** 2  # 1 - a of the highest level
    rest = 1.0 - schedule.alphas_cumprod()
    assert rest[most - most // 50] <= largest * (1 + 1e-6)
    assert largest <= rest[most] * (1 + 1e-6)


def test_every_number_of_an_example_is_of_its_own_step() -> None:
    simulator = Evac.initialised(CONFIG, 0)
    clips, windows = clips_of(simulator, EPISODES), np.tile([[1, 4]], (64, 1))
    one, again, other = (example(simulator, clips, windows, dataclasses.replace(WORLD, dropout=0.25), 0, step) for step in (5, 5, 6))
    for field in dataclasses.fields(one):
        assert torch.equal(getattr(one, field.name), getattr(again, field.name))
    for name in ("memory", "maps", "first", "deltas", "seen", "level", "noise"):
        assert not torch.equal(getattr(one, name), getattr(other, name)), name
    noised, later = (_noisy_memory(torch.zeros(64, 2, 4, 4, 4), 0, step) for step in (5, 6))
    both = (noised != 0) & (later != 0)
    assert abs(float((noised.sign() == later.sign())[both].float().mean()) - 0.5) < 0.05


def test_conditions_are_dropped_by_one_number_as_published() -> None:
    simulator = Evac.initialised(CONFIG, 0)
    clips, windows = clips_of(simulator, EPISODES), np.tile([[1, 4]], (4000, 1))
    config = dataclasses.replace(WORLD, dropout=0.1, memory_noise=False)
    small = dataclasses.replace(clips, latents=clips.latents[..., :1, :1], maps=clips.maps[..., :1, :1] + 9.0, first=clips.first[..., :1, :1] + 9.0)
    batch = example(simulator, small, windows, config, 0, 0)
    dropped = {
        "deltas": ~batch.deltas.flatten(1).any(1), "first": ~batch.first.flatten(1).any(1), "maps": ~batch.maps.flatten(1).any(1),
        "seen": ~batch.seen,
    }  # fmt: skip
    share = {name: float(rows.float().mean()) for name, rows in dropped.items()}
    for name, want in {"deltas": 0.2, "first": 0.2, "maps": 0.1, "seen": 0.2}.items():
        assert abs(share[name] - want) < 0.025, (name, share)
    assert abs(float((dropped["deltas"] & dropped["first"]).float().mean()) - 0.1) < 0.02
    assert abs(float((dropped["maps"] & dropped["seen"]).float().mean()) - 0.05) < 0.015
    kept = example(simulator, small, windows, config, 0, 0, training=False)
    assert kept.seen.all()
    assert kept.maps.any(dim=1).all()


def test_levels_are_the_samplers_or_uniform() -> None:
    simulator = Evac.initialised(dataclasses.replace(CONFIG, denoise_steps=2), 0)
    visited = set(simulator.sampler.timesteps.tolist())
    every = _levels(simulator, dataclasses.replace(WORLD, sampled_levels=1.0), 0, 0, 400)
    assert set(every.tolist()) == visited
    none = _levels(simulator, dataclasses.replace(WORLD, sampled_levels=0.0), 0, 0, 4000)
    assert abs(none.mean() - 499.5) < 20
    assert none.min() >= 0
    assert none.max() <= 999
    assert abs(np.mean([level in visited for level in _levels(simulator, WORLD, 0, 0, 4000)]) - WORLD.sampled_levels) < 0.03


def test_the_foreground_weighs_more() -> None:
    still = torch.zeros(1, 3, 4, 4)
    true = still.clone()
    true[0, :, 0, 0] = 1.0  # one of 16 pixels moved
    for place, weight in (((0, 0), 7.0), ((1, 1), 1.0)):
        drawn = true.clone()
        drawn[0, :, place[0], place[1]] += 0.5
        want = weight * (0.5 + 0.25) / 16
        assert float(picture_loss(drawn, true, still, 7.0)) == pytest.approx(want)


def test_the_foreground_is_what_differs_by_more_than_a_seventh_of_full_range() -> None:
    still = torch.zeros(1, 3, 4, 4)
    for away, weight in ((0.29, 1.0), (0.31, 7.0)):  # of 2, from -1 to 1
        assert float(picture_loss(still, torch.full_like(still, away), still, 7.0)) == pytest.approx(weight * (away + away**2))


def gradient_norms(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Of what an optimizer is given, step by step; it changes nothing."""
    norms: list[float] = []

    def step(self: torch.optim.Optimizer) -> None:
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(torch.stack([grad.norm() for grad in grads]).norm()))

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    return norms


def test_what_the_autoencoder_is_given_and_what_it_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames against what stands still, maps against their background; noise of the step's own; KL for each latent value; clipped gradients."""
    simulator, seen, steps = Evac.initialised(CONFIG, 0), [], []
    draw = noise.normal

    def loss(drawn: torch.Tensor, true: torch.Tensor, still: torch.Tensor, foreground: float) -> torch.Tensor:
        seen.append((true, still, foreground))
        return 0.0 * drawn.sum()

    def normal(seed: int, rollout: int, chunk: int, step: int, stream: int, shape: Sequence[int]) -> Any:
        steps.append((stream, step))
        return draw(seed, rollout, chunk, step, stream, shape)

    monkeypatch.setattr(autoencoder, "picture_loss", loss)
    monkeypatch.setattr(noise, "normal", normal)
    norms = gradient_norms(monkeypatch)
    config = dataclasses.replace(WORLD, vae_steps=2, vae_batch=8, map_share=0.25, vae_kl=100.0, grad_clip=0.01)
    metrics = train_vae(simulator, EPISODES, CAMERA, TABLETOP, config, 0, Never())
    assert steps == [(noise.Stream.VAE_NOISE, 0), (noise.Stream.VAE_NOISE, 1)]
    true, still, foreground = seen[-1]
    assert foreground == config.foreground_weight
    background = TABLETOP.background / 127.5 - 1.0
    table = simulator.fit(autoencoder.median_picture(EPISODES).permute(2, 0, 1)[None])
    assert torch.equal(still[:6], table.expand(6, -1, -1, -1))
    assert (still[6:] == background).all()
    assert ((true[6:] == background).float().mean((1, 2, 3)) > 0.5).all()  # maps
    with torch.no_grad():
        kl = float(simulator.vae.encode(true).kl().mean()) / int(np.prod([CONFIG.vae.z_channels, *CONFIG.latent]))
    assert metrics["kl"] == pytest.approx(kl, rel=1e-4)
    assert norms == pytest.approx([0.01, 0.01], rel=1e-3)


def test_averages_follow_are_judged_and_leave_the_weights_alone() -> None:
    simulator = Evac.initialised(CONFIG, 0)
    course, weight = world_model._Course(simulator, dataclasses.replace(WORLD, lr=0.1, ema=0.9)), simulator.unet.out[2].bias
    name = next(name for name, parameter in course.trained.items() if parameter is weight)
    for step, decay in ((0, 0.1), (1000, 0.9)):  # soon after the start, random weights are forgotten
        before = course.averaged[name].clone()
        weight.sum().backward()
        course.step(step)
        torch.testing.assert_close(course.averaged[name], decay * before + (1 - decay) * weight.detach())
        assert not torch.equal(course.averaged[name], weight)
    now, judged = weight.detach().clone(), list[torch.Tensor]()

    def held_out_loss() -> float:
        judged.append(weight.detach().clone())
        return 1.0

    for _ in range(2):  # as where a killed stage goes on: once at a step
        course.check(4, held_out_loss)
    assert len(judged) == len(course.checks) == 1
    assert torch.equal(judged[0], course.averaged[name])
    assert torch.equal(weight, now)


def test_what_the_simulator_is_given_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows and dropout of the step's own, in training mode; held-out clips, each with noise of its own, in the other, and all alike."""
    simulator, learned, judged, draws = Evac.initialised(CONFIG, 0), [], [], []
    weight, right = simulator.unet.out[2].bias, world_model.draw_windows

    def loss(simulator: Evac, batch: world_model.Batch, rays: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            learned.append((simulator.training, float(torch.rand(1))))
            return 1000.0 * weight.sum()
        judged.append((simulator.training, batch.noise))
        return torch.tensor(float(len(batch.target)))

    def windows(of: Any, chunk: int, config: WorldConfig, seed: int, draw: int, many: int, progress: float) -> Any:
        draws.append(draw)
        return right(of, chunk, config, seed, draw, many, progress)

    monkeypatch.setattr(world_model, "v_loss", loss)
    monkeypatch.setattr(world_model, "draw_windows", windows)
    norms = gradient_norms(monkeypatch)
    clips, held_out = clips_of(simulator, EPISODES[:1]), clips_of(simulator, HELD_OUT[:1])
    config = dataclasses.replace(WORLD, steps=4, check_every=2, held_out_clips=5, batch=2, grad_clip=0.5, aligned_starts=0.5)
    metrics = world_model.train_simulator(simulator, clips, held_out, config, 0, Never())
    assert [training for training, _ in learned] == [True] * 4
    assert len({drawn for _, drawn in learned}) == 4
    assert len(set(draws)) == len(draws) == 8
    assert norms == pytest.approx([0.5] * 4, rel=1e-3)
    assert [training for training, _ in judged] == [False] * 6  # 3 batches, twice
    assert not torch.equal(judged[0][1], judged[1][1])
    assert torch.equal(judged[0][1], judged[3][1])
    assert metrics["held_out"] == [[2, pytest.approx(1.8)], [4, pytest.approx(1.8)]]  # (2 * 2 + 2 * 2 + 1 * 1) / 5


def trained_vae(path: Path, dies_at: int | None = None, device: torch.device = CPU) -> tuple[Evac, dict[str, Any]]:
    simulator = Evac.initialised(CONFIG, 0).to(device)
    return simulator, train_vae(simulator, EPISODES, CAMERA, TABLETOP, WORLD, 0, Kept(path, dies_at))


def trained_simulator(path: Path, dies_at: int | None = None, device: torch.device = CPU, **changes: Any) -> tuple[Evac, dict[str, Any]]:
    simulator = Evac.initialised(dataclasses.replace(CONFIG, unet=dataclasses.replace(CONFIG.unet, dropout=0.1)), 0).to(device)
    clips, held_out = clips_of(simulator, EPISODES), clips_of(simulator, HELD_OUT)
    set_delta_statistics(simulator, clips)
    config = dataclasses.replace(WORLD, **changes)
    return simulator, world_model.train_simulator(simulator, clips, held_out, config, 0, Kept(path, dies_at))


@pytest.mark.parametrize("stage", [trained_vae, trained_simulator], ids=["autoencoder", "simulator"])
def test_a_killed_stage_goes_on_to_the_same_bits(tmp_path: Path, stage: Any) -> None:
    torch.manual_seed(1)
    whole, metrics = stage(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        stage(tmp_path / "killed", dies_at=4)
    torch.manual_seed(2)  # whatever else drew random numbers meanwhile
    again, resumed = stage(tmp_path / "killed")
    assert resumed == metrics
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    finished, repeated = stage(tmp_path / "killed")  # killed after its end: nothing is trained again
    assert repeated == metrics
    for name, value in whole.state_dict().items():
        assert torch.equal(value, finished.state_dict()[name]), name


def test_the_loss_is_of_v_at_the_chunks_frames_and_memory_is_given_at_its_level(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that is off v by a half at the chunk's frames, and by far at memory's, has a loss of a quarter."""
    simulator = Evac.initialised(dataclasses.replace(CONFIG, dynamic_rescale=True), 0)
    clips = clips_of(simulator, EPISODES)
    batch = example(simulator, clips, np.array([[0, 4], [3, 1]]), WORLD, 0, 0, training=False)
    batch = dataclasses.replace(batch, level=torch.tensor([150, 700]))
    a, scale = (
        torch.from_numpy(table[[150, 700]]).float().view(-1, 1, 1, 1, 1) for table in (schedule.alphas_cumprod(), schedule.latent_scales())
    )
    assert len({*scale.flatten().tolist(), 1.0}) == 3
    clean, z = batch.target * scale, CONFIG.vae.z_channels

    def network(x: torch.Tensor, level: torch.Tensor, *rest: Any) -> torch.Tensor:
        assert torch.equal(level, batch.level)
        torch.testing.assert_close(x[:, :z], torch.cat([batch.memory * scale, a.sqrt() * clean + (1 - a).sqrt() * batch.noise], dim=2))
        assert torch.equal(x[:, z : 2 * z, :4], batch.memory)  # the condition is as it is
        answer = torch.full_like(x[:, :z], 100.0)
        answer[:, :, 4:] = a.sqrt() * batch.noise - (1 - a).sqrt() * clean + 0.5
        return answer

    monkeypatch.setattr(simulator.unet, "forward", network)
    assert float(world_model.v_loss(simulator, batch, clips.rays)) == pytest.approx(0.25, rel=1e-4)


def test_statistics_of_deltas_leave_first_frames_out() -> None:
    """Nothing moves before a first frame: counted, the zeros there would make every motion look larger."""
    simulator = Evac.initialised(CONFIG, 0)
    clips = clips_of(simulator, [episode(0, 5), episode(1, 7)])
    deltas = torch.arange(14 * DELTA_DIM, dtype=torch.float32).view(14, DELTA_DIM) + 100.0
    deltas[:, 3] = 0.25
    deltas[[0, 6]] = 0.0
    set_delta_statistics(simulator, dataclasses.replace(clips, deltas=deltas))
    rows = deltas[[1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12, 13]]
    torch.testing.assert_close(simulator.delta_mean, rows.mean(0))
    assert float(simulator.delta_std[3]) == pytest.approx(1e-4)
    moving = [i for i in range(DELTA_DIM) if i != 3]
    torch.testing.assert_close(simulator.delta_std[moving], rows.std(0)[moving])


def test_what_training_gives_has_the_best_held_out_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the averaged weights, wherever on the way it was. Here one weight falls and falls, and is best somewhere in between."""
    simulator = Evac.initialised(CONFIG, 0)
    weight = simulator.unet.out[2].bias

    def loss(simulator: Evac, batch: world_model.Batch, rays: torch.Tensor) -> torch.Tensor:
        return weight.sum() if simulator.training else (weight.sum() + 1.0).abs()

    monkeypatch.setattr(world_model, "v_loss", loss)
    clips, held_out = clips_of(simulator, EPISODES[:1]), clips_of(simulator, HELD_OUT[:1])
    config = dataclasses.replace(WORLD, steps=12, lr=0.1, check_every=2, held_out_clips=2, batch=2, patience=100)
    metrics = world_model.train_simulator(simulator, clips, held_out, config, 0, Never())
    steps, losses = zip(*metrics["held_out"], strict=True)
    assert steps[0] < metrics["best_step"] == steps[losses.index(min(losses))] < steps[-1]
    assert abs(float(weight.detach().sum()) + 1.0) == pytest.approx(min(losses), abs=1e-6)


def test_only_what_is_not_frozen_changes(tmp_path: Path) -> None:
    before = Evac.initialised(dataclasses.replace(CONFIG, unet=dataclasses.replace(CONFIG.unet, dropout=0.1)), 0).state_dict()
    simulator, _ = trained_simulator(tmp_path / "savepoint")
    changed = {name.split(".")[0] for name, value in simulator.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"unet", "clip", "image_resampler", "action_resampler", "delta_mean", "delta_std"}


def test_training_stops_when_nothing_gets_better(tmp_path: Path) -> None:
    simulator, metrics = trained_simulator(tmp_path / "savepoint", lr=0.0, steps=100, check_every=2, patience=3)
    assert metrics["steps"] == 2 + 3 * 2
    assert metrics["best_step"] == 2
    assert [step for step, _ in metrics["held_out"]] == [2, 4, 6, 8]
    assert not simulator.training


def test_training_learns(tmp_path: Path) -> None:
    simulator = Evac.initialised(CONFIG, 0)
    config = dataclasses.replace(
        WORLD, vae_steps=120, vae_batch=8, vae_lr=4e-3, steps=24, batch=4, lr=2e-3, check_every=8, held_out_clips=9, dropout=0.0
    )
    metrics = train_vae(simulator, EPISODES, CAMERA, TABLETOP, config, 0, Never())
    frames = torch.from_numpy(np.concatenate([e.frame for e in HELD_OUT]))
    latents = simulator.encode(simulator.picture(frames))
    assert abs(float(latents.detach().std()) - 1.0) < 0.3, "scaled latents have about unit deviation"
    assert metrics["latent_scale"] == pytest.approx(float(simulator.latent_scale))
    error = (simulator.reconstruct(frames).float() - frames.float()).abs().mean()
    assert error < 0.6 * (frames.float() - frames.float().mean(0)).abs().mean()
    clips, held_out = clips_of(simulator, EPISODES), clips_of(simulator, HELD_OUT)
    set_delta_statistics(simulator, clips)
    metrics = world_model.train_simulator(simulator, clips, held_out, config, 0, Never())
    losses = [loss for _, loss in metrics["held_out"]]
    assert losses[-1] < 0.6, "half of the latents' variance is foreseen"
    assert losses[-1] < losses[0]


def test_the_whole_stage_is_a_function_of_its_seed(tmp_path: Path) -> None:
    made = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        made.append(
            world_model.train(
                CONFIG, WORLD, EPISODES, HELD_OUT, CAMERA, TABLETOP, seed, torch.device("cpu"), lambda part, n=name: Savepoint(tmp_path / n / part)  # type: ignore[misc]
            )
        )
    (a, first), (b, second), (c, _) = made
    assert first == second
    assert all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())
    assert any(not torch.equal(value, c.state_dict()[name]) for name, value in a.state_dict().items())
    assert first["simulator"]["steps"] == WORLD.steps
    assert set(first) == {"autoencoder", "simulator", "parameters"}


def test_a_loss_that_is_not_finite_stops_the_stage() -> None:
    simulator = Evac.initialised(CONFIG, 0)
    with torch.no_grad():
        simulator.vae.decoder.conv_out.bias.fill_(float("nan"))  # type: ignore[union-attr]
    with pytest.raises(FloatingPointError, match=r"autoencoder: loss is nan at step 0; lower world\.vae_lr"):
        train_vae(simulator, EPISODES, CAMERA, TABLETOP, WORLD, 0, Never())
    simulator = Evac.initialised(CONFIG, 0)
    clips = clips_of(simulator, EPISODES)
    broken = dataclasses.replace(clips, latents=clips.latents * float("inf"))
    with pytest.raises(FloatingPointError, match=r"simulator: loss is nan at step 0; lower world\.lr"):
        world_model.train_simulator(simulator, broken, clips, WORLD, 0, Never())


def test_a_savepoint_of_another_network_is_refused(tmp_path: Path) -> None:
    trained_simulator(tmp_path / "savepoint")
    other = dataclasses.replace(CONFIG, unet=dataclasses.replace(CONFIG.unet, num_res_blocks=2))
    simulator = Evac.initialised(other, 0)
    clips = clips_of(simulator, EPISODES)
    with pytest.raises(ValueError, match="another network"):
        world_model.train_simulator(simulator, clips, clips, WORLD, 0, Kept(tmp_path / "savepoint"))


# what the settings of the training mean


def test_the_defaults_draw_what_they_always_drew() -> None:
    windows = np.stack([np.repeat(np.arange(5), 9), np.tile(np.arange(9), 5)], axis=1)
    drawn = draw_windows(windows, CHUNK, WORLD, 3, 17, 8, 0.4)
    np.testing.assert_array_equal(drawn, windows[noise.integers(3, noise.Stream.WORLD, 17, len(windows), 8)])


def test_curriculum_goes_from_short_and_early_to_every_clip_alike() -> None:
    lengths = [12, 4, 1]  # clips of three episodes; the second of four has none
    windows = np.array([[e, s] for e, n in zip((0, 2, 3), lengths, strict=True) for s in range(n)])
    config = dataclasses.replace(WORLD, sampling="curriculum", curriculum_begin=(0.0, -1.0), curriculum_end=(1.0, 0.0))
    first, last = (clip_weights(windows, CHUNK, config, progress) for progress in (0.0, 1.0))
    np.testing.assert_allclose([first.sum(), last.sum()], 1.0)
    np.testing.assert_allclose(last, 1 / 17)
    for e in (0, 2, 3):
        assert first[windows[:, 0] == e].sum() == pytest.approx(1 / 3), "power 0: every episode alike"
    assert first[0] / first[4] == pytest.approx(2.0), "power -1: one chunk later, half as likely"
    halfway = clip_weights(windows, CHUNK, config, 0.5)
    assert halfway[windows[:, 0] == 0].sum() == pytest.approx(12**0.5 / (12**0.5 + 2 + 1))
    assert halfway[0] / halfway[4] == pytest.approx(2**0.5)
    drawn = draw_windows(windows, CHUNK, config, 0, 0, 20000, 0.0)
    share = np.array([(drawn == window).all(1).mean() for window in windows])
    np.testing.assert_allclose(share, first, atol=0.01)
    np.testing.assert_array_equal(drawn, draw_windows(windows, CHUNK, config, 0, 0, 20000, 0.0))


def test_curriculum_and_frozen_parts_train(tmp_path: Path) -> None:
    before = Evac.initialised(dataclasses.replace(CONFIG, unet=dataclasses.replace(CONFIG.unet, dropout=0.1)), 0).state_dict()
    changes: dict[str, Any] = {"sampling": "curriculum", "frozen": ("vae", "clip", "action_resampler"), "steps": 2}
    simulator, _ = trained_simulator(tmp_path / "savepoint", **changes)
    changed = {name.split(".")[0] for name, value in simulator.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"unet", "image_resampler", "delta_mean", "delta_std"}
    with pytest.raises(ValueError, match="vae must be among them"):
        dataclasses.replace(WORLD, frozen=("clip",))


def gradients(simulator: Evac, clips: Clips, config: WorldConfig) -> tuple[float, list[torch.Tensor]]:
    batch = example(simulator, clips, clips.windows(CHUNK, aligned=True)[:3], config, 0, 0)
    simulator.train()
    simulator.zero_grad()
    simulator.unet.recompute = config.gradient_checkpointing
    torch.manual_seed(0)
    loss = world_model.Objective(simulator, config)(batch, clips.rays)
    torch.manual_seed(1)  # what is computed again must drop the same channels
    loss.backward()
    return float(loss), [p.grad.clone() for p in simulator.unet.parameters() if p.grad is not None]


def stirred() -> Evac:
    """With dropout, and without layers of zeros, which would hide gradients."""
    simulator = Evac.initialised(dataclasses.replace(CONFIG, unet=dataclasses.replace(CONFIG.unet, dropout=0.1)), 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in simulator.unet.parameters():
            if not parameter.any():
                parameter.normal_(0.0, 0.05, generator=generator)
    return simulator


def test_checkpointed_gradients_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    simulator = stirred()
    clips = clips_of(simulator, EPISODES)
    loss, want = gradients(simulator, clips, WORLD)
    calls = []
    forward = TemporalConvBlock.forward
    monkeypatch.setattr(TemporalConvBlock, "forward", lambda self, x: (calls.append(1), forward(self, x))[1])
    again, got = gradients(simulator, clips, dataclasses.replace(WORLD, gradient_checkpointing=True))
    assert again == loss
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    assert len(calls) == 2 * sum(isinstance(module, TemporalConvBlock) for module in simulator.modules()), "every block ran twice"


def test_bfloat16_is_near_and_leaves_the_weights_as_they_are() -> None:
    simulator = stirred()
    clips = clips_of(simulator, EPISODES)
    loss, want = gradients(simulator, clips, WORLD)
    rough, got = gradients(simulator, clips, dataclasses.replace(WORLD, precision="bfloat16", gradient_checkpointing=True))
    assert rough != loss, "nothing was computed in bfloat16"
    assert rough == pytest.approx(loss, rel=0.02)
    assert {p.dtype for p in simulator.parameters()} == {torch.float32} == {g.dtype for g in got}
    a, b = (torch.cat([g.flatten() for g in some]) for some in (want, got))
    assert float((a @ b) / (a.norm() * b.norm())) > 0.99


def test_without_action_maps_only_the_tokens_know_the_motion() -> None:
    simulator = stirred()
    clips = clips_of(simulator, EPISODES)
    blind = stirred()
    blind.config = dataclasses.replace(blind.config, action_maps=False)
    other = dataclasses.replace(clips, maps=clips.maps + 1.0)
    turned = dataclasses.replace(clips, deltas=clips.deltas + 1.0)

    def loss(of: Evac, given: Clips) -> float:
        with torch.no_grad():
            return float(world_model.v_loss(of.eval(), example(of, given, np.array([[1, 4]]), WORLD, 0, 0, training=False), clips.rays))

    assert loss(simulator, clips) != loss(simulator, other)
    assert loss(blind, clips) == loss(blind, other)
    assert loss(blind, clips) != loss(blind, turned)
    assert loss(blind, clips) == loss(simulator, dataclasses.replace(clips, maps=0.0 * clips.maps))


@pytest.mark.parametrize("kind", ["ours", "released", "without clip", "dynamicrafter"])
def test_training_begins_from_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Its autoencoder and everything else that is frozen are what the file holds; what no file has is said, and nothing else is random."""
    source, path = Evac.initialised(CONFIG, 9), tmp_path / f"{kind}.pt"
    state = released(source)
    if kind == "ours":
        checkpoint.save(path, weights.to_tree(source))
    elif kind == "dynamicrafter":
        for name in [n for n in state if "domain_embedding" in n or "_tp." in n or n.startswith("cond_stage_model.")]:
            del state[name]
    clip = ""
    if kind == "without clip":
        tower = {name: state.pop(name) for name in list(state) if name.startswith("embedder.model.visual.")}
        torch.save({name.removeprefix("embedder.model."): value for name, value in tower.items()}, clip := str(tmp_path / "clip.bin"))
    if kind != "ours":
        torch.save({"state_dict": state}, path)
    config = dataclasses.replace(WORLD, initial=str(path), clip=clip, frozen=("vae", "clip"), steps=3, lr=1e-6)
    if kind != "dynamicrafter":
        monkeypatch.setattr(Evac, "initialised", None)
    simulator, metrics = world_model.train(
        CONFIG, config, EPISODES, HELD_OUT, CAMERA, TABLETOP, 0, torch.device("cpu"), lambda part: Savepoint(tmp_path / part)
    )
    assert "autoencoder" not in metrics
    assert bool(metrics["initial"]["not_in_it"]) == (kind == "dynamicrafter")
    for name, value in source.state_dict().items():
        if name.startswith(("vae.", "clip.", "latent_scale")):
            assert torch.equal(value, simulator.state_dict()[name]), name
    new = ("domain_embedding", "_tp.", "input_blocks.0.0")  # what DynamiCrafter lacks
    given = {name: value for name, value in source.unet.named_parameters() if not any(part in name for part in new)}
    moved = max(float((value - simulator.unet.get_parameter(name)).abs().max().detach()) for name, value in given.items())
    assert 0 < moved < 1e-4, "trained, a little, from what the file holds"
    assert not torch.equal(simulator.delta_std, source.delta_std), "statistics are of the episodes"


def test_held_out_clips_begin_where_chunks_of_rollouts_begin() -> None:
    """And what is a usual delta is a matter of the training episodes alone."""
    simulator = Evac.initialised(CONFIG, 0)
    clips = clips_of(simulator, HELD_OUT)
    judged = world_model._HeldOut(simulator, clips, dataclasses.replace(WORLD, held_out_clips=50), 0)
    assert {tuple(window) for window in judged._windows.tolist()} <= {tuple(window) for window in clips.windows(CHUNK, aligned=True).tolist()}
    fresh = Evac.initialised(CONFIG, 0)
    world_model.set_delta_statistics(fresh, clips_of(fresh, EPISODES))
    asked = dataclasses.replace(WORLD, vae_steps=1, steps=1)
    trained_, _ = world_model.train(CONFIG, asked, EPISODES, HELD_OUT, CAMERA, TABLETOP, 0, torch.device("cpu"), lambda part: Never())
    torch.testing.assert_close(trained_.delta_mean, fresh.delta_mean)
    torch.testing.assert_close(trained_.delta_std, fresh.delta_std)


def test_microbatches_train_as_the_whole_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most so many clips, and frames of the autoencoder, go through a network at once; gradients of every step are those of the whole batch."""
    forward, clip, most = world_model.Objective.forward, torch.nn.utils.clip_grad_norm_, set[int]()
    gradients: list[torch.Tensor] = []

    def sized(self: Any, batch: world_model.Batch, rays: torch.Tensor) -> torch.Tensor:
        most.add(len(batch.target))
        return forward(self, batch, rays)

    def kept(parameters: Any, largest: float) -> torch.Tensor:
        chosen = list(parameters)
        gradients.extend(p.grad.clone() for p in chosen)
        return clip(chosen, largest)

    monkeypatch.setattr(world_model.Objective, "forward", sized)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", kept)
    found = []
    for number, (microbatch, sizes) in enumerate(((1, {1}), (2, {2}), (3, {3, 1}), (8, {WORLD.batch}))):
        most.clear()
        gradients.clear()
        config = dataclasses.replace(WORLD, microbatch=microbatch, vae_steps=2, steps=3, check_every=2)
        simulator = Evac.initialised(CONFIG, 0)
        metrics = [train_vae(simulator, EPISODES, CAMERA, TABLETOP, config, 0, Never())]
        clips, held_out = clips_of(simulator, EPISODES), clips_of(simulator, HELD_OUT)
        metrics.append(world_model.train_simulator(simulator, clips, held_out, config, 0, Kept(tmp_path / str(number))))
        assert most == sizes
        found.append((list(gradients), simulator.state_dict(), metrics))
    wanted, weights_of_all, whole = found[-1]
    for given, trained, metrics in found[:-1]:
        assert len(given) == len(wanted)
        for mine, want in zip(given, wanted, strict=True):
            torch.testing.assert_close(mine, want, rtol=1e-3, atol=1e-5)
        for name, value in trained.items():
            torch.testing.assert_close(value, weights_of_all[name], rtol=1e-4, atol=1e-4, msg=name)
        assert [one["loss"] for one in metrics] == pytest.approx([one["loss"] for one in whole], rel=1e-4)
        assert metrics[0]["kl"] == pytest.approx(whole[0]["kl"], rel=1e-4)
        assert np.asarray(metrics[1]["held_out"]) == pytest.approx(np.asarray(whole[1]["held_out"]), rel=1e-4)


@pytest.mark.parametrize("pieces", [1, 2])
def test_two_processes_train_as_one(tmp_path: Path, pieces: int) -> None:
    """Gradients of every step are those of one process on the whole batch, though each took half of it, in one pass or in two; both end with the
    same bits.
    """
    from tests import two_processes

    (tmp_path / "two").mkdir()
    (tmp_path / "one").mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tests.two_processes"]
    microbatch = WORLD.batch // 2 // pieces
    command += [str(tmp_path / "two"), str(microbatch)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    two_processes.train(tmp_path / "one", WORLD.batch)
    one, a, b = (load_file(tmp_path / name) for name in ("one/0.safetensors", "two/0.safetensors", "two/1.safetensors"))
    assert {int(n) for n in one.pop("sizes")} >= {WORLD.batch}
    halves = [some.pop("sizes").tolist() for some in (a, b)]
    judged = WORLD.held_out_clips // WORLD.batch * WORLD.batch // microbatch  # twice, by the first process
    assert [half.count(microbatch) - 2 * (half is halves[0]) * judged for half in halves] == [two_processes.STEPS * pieces] * 2
    for name, value in one.items():
        assert torch.equal(a[name], b[name]), name
        torch.testing.assert_close(a[name], value, rtol=1e-4, atol=1e-6 if name.startswith("gradient") else 2e-5, msg=name)
    assert any(name.startswith("gradient.2.") and value.any() for name, value in one.items())
    assert (tmp_path / "two" / "savepoint").is_file()


def test_a_batch_that_cannot_be_divided_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "count", lambda: 3)
    monkeypatch.setattr(processes, "sum_up", lambda tensors: None)
    with pytest.raises(ValueError, match=r"world\.batch=4 clips over 3 processes"):
        trained_simulator(tmp_path / "savepoint")

"""Stages sft and scale: what they learn from, that they learn, and that a killed one goes on."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from small_policy import INSTRUCTIONS, SMALL

from worldenv import noise
from worldenv.checkpoint import Savepoint
from worldenv.config import ScaleConfig, SftConfig
from worldenv.data.episode import Episode
from worldenv.learning import sft as sft_module
from worldenv.learning.chunks import Chunks
from worldenv.learning.scale_head import fit_scale_head
from worldenv.learning.sft import augment, l1, one_cycle, recolour, sft, shift, untrained
from worldenv.nouns import Observation
from worldenv.policy import laplace
from worldenv.policy.openvla_oft import OpenVLAOFT
from worldenv.robots.tabletop import TABLETOP

CONFIG = SftConfig(steps=6, batch=4, lr=3e-3, stop_l1=0.0)


def episodes(lengths: tuple[int, ...] = (12, 9)) -> list[Episode]:
    """A bright bar whose place says where to go: something to learn from."""
    made = []
    for number, steps in enumerate(lengths):
        draw = np.random.default_rng(number)
        frame = np.full((steps + 1, 16, 16, 3), 60, np.uint8)
        place = draw.integers(0, 12, steps + 1)
        for t, x in enumerate(place):
            frame[t, :, x : x + 4] = 230
        pose = np.concatenate([draw.uniform(-0.1, 0.1, (steps + 1, 3)), np.tile([1.0, 0.0, 0.0, 0.0], (steps + 1, 1))], axis=1)
        command = np.zeros((steps, 7), np.float32)
        command[:, 0] = (place[:-1] - 6) / 6
        command[:, 1] = draw.uniform(-1, 1, steps)
        command[:, 6] = 1.0
        success = np.zeros(steps + 1, bool)
        made.append(Episode(INSTRUCTIONS[number], number, "train", 0, "drawn", frame, pose, np.full(steps + 1, 0.5), command, success))
    return made


def policy_for(given: list[Episode], seed: int = 0) -> OpenVLAOFT:
    return untrained(SMALL, given, INSTRUCTIONS, TABLETOP, seed, torch.device("cpu"))


def savepoint(folder: Path, every_s: float = 1e9) -> Savepoint:
    return Savepoint(folder / "savepoint.safetensors", every_s)


def test_chunks_begin_where_all_actions_exist() -> None:
    given = episodes()
    policy = policy_for(given)
    chunks = Chunks(given, TABLETOP, policy.statistics, 8)
    assert len(chunks) == (12 - 7) + (9 - 7)
    seen, target = chunks.take(np.array([4, 5, 6]))
    assert seen.instruction == (INSTRUCTIONS[0], INSTRUCTIONS[1], INSTRUCTIONS[1])
    for row, (episode, t) in enumerate([(0, 4), (1, 0), (1, 1)]):
        assert np.array_equal(seen.frame[row].numpy(), given[episode].frame[t])
        want = policy.statistics.to_training(torch.from_numpy(given[episode].command[t : t + 8]))
        assert torch.equal(target[row], want)
        assert np.array_equal(seen.proprio[row].numpy(), TABLETOP.proprio(given[episode].pose[t], given[episode].gripper[t]))
    with pytest.raises(ValueError, match="none of 1 episodes has 8 commands"):
        Chunks(episodes((7,)), TABLETOP, policy.statistics, 8)


def test_untrained_policy_has_the_demonstrations_statistics() -> None:
    given = episodes()
    made = policy_for(given).statistics
    command = np.concatenate([e.command for e in given])
    assert made.action.q99[:2].tolist() == pytest.approx(np.quantile(command[:, :2], 0.99, axis=0).tolist())
    assert made.source == "2 demonstrations"


def test_one_cycle_rises_to_the_peak_and_ends_at_zero() -> None:
    rates = [one_cycle(step, 100, 2.0) for step in range(100)]
    assert max(rates) == pytest.approx(2.0, rel=1e-3)
    assert rates.index(max(rates)) == 9
    assert rates[0] == pytest.approx(0.2)
    assert rates[-1] == pytest.approx(0.0, abs=1e-12)
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)


def test_shift_moves_and_repeats_the_edge() -> None:
    frame = torch.arange(16, dtype=torch.uint8).reshape(1, 4, 4, 1).repeat(2, 1, 1, 3)
    moved = shift(frame, torch.tensor([[1, -2], [0, 0]]))
    assert moved[0, :, :, 0].tolist() == [[2, 3, 3, 3], [2, 3, 3, 3], [6, 7, 7, 7], [10, 11, 11, 11]]
    assert torch.equal(moved[1], frame[1])


def test_recolour_is_brightness_contrast_saturation() -> None:
    frame = torch.tensor([[100, 120, 140], [60, 80, 100]], dtype=torch.uint8).reshape(1, 1, 2, 3)
    assert torch.equal(recolour(frame, torch.zeros(1, 3)), frame)
    assert recolour(frame, torch.tensor([[0.1, 0.0, 0.0]])).double().mean() == pytest.approx(110.0)
    grey = recolour(frame, torch.tensor([[0.0, 0.0, -1.0]]))
    assert grey.flatten().tolist() == [120, 120, 120, 80, 80, 80]
    assert recolour(frame, torch.tensor([[0.0, -1.0, -1.0]])).flatten().tolist() == [100] * 6


def test_augmentation_is_a_function_of_seed_and_step() -> None:
    seen, _ = Chunks(episodes(), TABLETOP, policy_for(episodes()).statistics, 8).take(np.arange(4))
    one, same, next_step = (augment(seen, CONFIG, 0, step).frame for step in (3, 3, 4))
    assert torch.equal(one, same)
    assert not torch.equal(one, next_step)
    assert not torch.equal(one, seen.frame)
    off = dataclasses.replace(CONFIG, shift_px=0, colour=0.0)
    assert torch.equal(augment(seen, off, 0, 3).frame, seen.frame)


def test_it_learns_and_leaves_the_scale_head_alone(tmp_path: Path) -> None:
    given = episodes((24, 24))
    policy = policy_for(given)
    before = [p.detach().clone() for p in policy.network.scale_head.parameters()]
    chunks = Chunks(given, TABLETOP, policy.statistics, 8)
    start = l1(policy, chunks, 8)
    metrics = sft(policy, given, TABLETOP, dataclasses.replace(CONFIG, steps=150, batch=16), 0, savepoint(tmp_path))
    assert metrics["l1"] < 0.6 * start
    assert metrics["l1"] == pytest.approx(l1(policy, chunks, 5))
    assert metrics["steps"] == 150
    assert metrics["chunks"] == 34
    assert all(torch.equal(a, b) for a, b in zip(before, policy.network.scale_head.parameters(), strict=True))


def test_it_stops_when_the_last_epoch_is_good_enough(tmp_path: Path) -> None:
    given = episodes()  # 7 chunk starts: an epoch is 2 steps of 4
    assert sft(policy_for(given), given, TABLETOP, dataclasses.replace(CONFIG, stop_l1=9.0), 0, savepoint(tmp_path))["steps"] == 2


class _Killed(Exception):
    pass


def test_killed_sft_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = episodes()
    straight, again = policy_for(given), policy_for(given)
    want = sft(straight, given, TABLETOP, CONFIG, 0, savepoint(tmp_path / "a"))
    right = sft_module.loss_at

    def die(policy: OpenVLAOFT, chunks: Chunks, config: SftConfig, seed: int, step: int) -> torch.Tensor:
        if step == 5:
            raise _Killed
        return right(policy, chunks, config, seed, step)

    with monkeypatch.context() as patch:
        patch.setattr(sft_module, "loss_at", die)
        with pytest.raises(_Killed):
            sft(again, given, TABLETOP, CONFIG, 0, savepoint(tmp_path / "b", every_s=0.0))
    again = policy_for(given, seed=3)  # whatever it was before, the savepoint counts
    assert sft(again, given, TABLETOP, CONFIG, 0, savepoint(tmp_path / "b")) == want
    ours, theirs = straight.network.state_dict(), again.network.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if not name.startswith("scale_head"))


def test_nan_is_named(tmp_path: Path) -> None:
    given = episodes()
    policy = policy_for(given)
    with torch.no_grad():
        policy.network.projector.fc1.weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"sft: loss is nan at step 0; lower sft\.lr"):
        sft(policy, given, TABLETOP, CONFIG, 0, savepoint(tmp_path))
    with pytest.raises(FloatingPointError, match=r"scale: loss is nan at step 0; lower scale\.lr"):
        fit_scale_head(policy, given, TABLETOP, ScaleConfig(steps=2), 0, savepoint(tmp_path / "b"))


def test_scale_head_finds_the_mean_error_and_nothing_else_moves(tmp_path: Path) -> None:
    """The likelihood's best scale where it does not depend on the input is the mean of |a - mu|, floored."""
    given = episodes((24, 24))
    policy = policy_for(given)
    before = {name: p.detach().clone() for name, p in policy.network.named_parameters()}
    metrics = fit_scale_head(policy, given, TABLETOP, ScaleConfig(steps=300, lr=3e-3), 0, savepoint(tmp_path))
    assert metrics["nll"] < metrics["nll_before"] - 0.5
    for name, parameter in policy.network.named_parameters():
        assert torch.equal(parameter, before[name]) != name.startswith("scale_head")
    seen, target = Chunks(given, TABLETOP, policy.statistics, 8).take(np.arange(34))
    chunk = policy.act(seen)
    error, scale = (target - chunk.mu).abs(), chunk.log_scale.exp()
    assert float(scale[..., 1].mean()) == pytest.approx(float(error[..., 1].mean()), rel=0.3)
    assert float(scale.min()) >= policy.config.scale_floor * (1 - 1e-6)
    assert metrics["nll"] == pytest.approx(float(laplace.nll(target, chunk.mu, chunk.log_scale)), rel=1e-4)


def test_killed_scale_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, config = episodes(), ScaleConfig(steps=6)
    straight, again = policy_for(given), policy_for(given)
    want = fit_scale_head(straight, given, TABLETOP, config, 0, savepoint(tmp_path / "a"))
    right = noise.integers

    def die(seed: int, stage: int, step: int, high: int, count: int) -> np.ndarray:
        if step == 3:
            raise _Killed
        return right(seed, stage, step, high, count)

    with monkeypatch.context() as patch:
        patch.setattr(noise, "integers", die)
        with pytest.raises(_Killed):
            fit_scale_head(again, given, TABLETOP, config, 0, savepoint(tmp_path / "b", every_s=0.0))
    assert fit_scale_head(policy_for(given), given, TABLETOP, config, 0, savepoint(tmp_path / "b")) == want
    assert math.isfinite(want["nll"])


def test_observations_are_not_changed_by_training(tmp_path: Path) -> None:
    given = episodes()
    kept = [e.frame.copy() for e in given]
    sft(policy_for(given), given, TABLETOP, CONFIG, 0, savepoint(tmp_path))
    assert all(np.array_equal(a, e.frame) for a, e in zip(kept, given, strict=True))
    assert isinstance(Chunks(given, TABLETOP, policy_for(given).statistics, 8).take(np.array([0]))[0], Observation)

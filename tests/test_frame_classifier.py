"""The baseline judge: a frame and a task in, a score out; it learns the same labels and is measured in the same way."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_reward_head import HELD_OUT, INSTRUCTIONS, SMALL, TRAIN, _Killed, _KilledAfter

from worldenv import checkpoint
from worldenv.checkpoint import CheckpointError, Savepoint
from worldenv.config import RewardConfig
from worldenv.learning.frame_classifier import train_classifier
from worldenv.learning.reward_head import Labelled, measure, score
from worldenv.reflector import classifier, weights
from worldenv.reflector.classifier import ClassifierReflector
from worldenv.reflector.contract import Judge

QUICK = RewardConfig(judge="classifier", classifier_steps=60, classifier_batch=32, classifier_lr=4e-3)


def fresh(seed: int = 1) -> ClassifierReflector:
    return ClassifierReflector.initialise(SMALL, 4, INSTRUCTIONS, seed)


def frames(count: int, steps: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, steps, 16, 16, 3), dtype=np.uint8))


def test_it_keeps_the_contract_and_remembers_nothing() -> None:
    judge: Judge = fresh().freeze()
    video = frames(2, 9)
    watch = judge.begin(INSTRUCTIONS, video[:, 0])
    score_, after = judge.judge(watch, video[:, 1:])
    assert score_.shape == (2, 8)
    assert bool(((score_ > 0) & (score_ < 1)).all())
    assert after == watch
    shuffled, _ = judge.judge(watch, video[:, 1:].flip(1))
    torch.testing.assert_close(shuffled.flip(1), score_, rtol=0, atol=1e-6)
    other, _ = judge.judge(judge.begin(INSTRUCTIONS[::-1], video[:, 0]), video[:, 1:])
    assert float((other - score_).abs().max()) > 1e-4  # the task counts
    with pytest.raises(ValueError, match="instruction 'sing': the frame classifier knows only"):
        judge.begin(["sing", INSTRUCTIONS[0]], video[:, 0])
    with pytest.raises(ValueError, match="want a multiple of 4"):
        RewardConfig(judge="classifier", classifier_width=6)


def test_it_learns_and_is_measured_as_the_other_judge_is(tmp_path: Path) -> None:
    judge = fresh()
    metrics = train_classifier(judge, TRAIN, QUICK, 0, Savepoint(tmp_path / "fit"))
    scores = score([judge], HELD_OUT)
    found = measure(scores, HELD_OUT, 0.5)
    json.dumps({**metrics, **found}, allow_nan=False)
    assert found["auc"] > 0.97
    assert found["episodes"] == 40
    assert measure(score([fresh().freeze()], HELD_OUT), HELD_OUT, 0.5)["auc"] < 0.9
    assert not any(p.requires_grad for p in judge.network.parameters())
    for by in (1, -1):  # labels of another frame than the one that is shown
        late = measure(scores, [replace(one, success=np.roll(one.success, by)) for one in HELD_OUT], 0.5)
        assert late["auc"] < found["auc"] - 0.01


def test_a_killed_training_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(QUICK, classifier_steps=6, classifier_batch=8)
    whole = fresh()
    want = train_classifier(whole, TRAIN, config, 0, Savepoint(tmp_path / "a"))
    with pytest.raises(_Killed):
        train_classifier(fresh(), TRAIN, config, 0, _KilledAfter(tmp_path / "b", 3))
    again = fresh()
    assert train_classifier(again, TRAIN, config, 0, Savepoint(tmp_path / "b")) == want
    monkeypatch.setattr(Labelled, "draw", lambda *_: pytest.fail("trained again"))
    again = fresh()  # killed while it was measured
    assert train_classifier(again, TRAIN, config, 0, Savepoint(tmp_path / "b")) == want
    assert all(torch.equal(a, b) for a, b in zip(whole.network.state_dict().values(), again.network.state_dict().values(), strict=True))


def test_its_file_says_what_it_is(tmp_path: Path) -> None:
    judge, path = fresh().freeze(), tmp_path / "reflector.safetensors"
    checkpoint.save(path, classifier.to_tree(judge))
    again = weights.load_judge(path)
    assert isinstance(again, ClassifierReflector)
    for one, other in zip(score([judge], HELD_OUT[:3]), score([again.freeze()], HELD_OUT[:3]), strict=True):
        assert np.array_equal(one, other)
    with pytest.raises(CheckpointError, match="no frame classifier"):
        classifier.from_tree({"kind": "else"}, "here")
    tree = classifier.to_tree(judge)
    tree["weights"].pop("end.bias")
    with pytest.raises(CheckpointError, match=r"here: these weights are not of this classifier: .*end\.bias"):
        classifier.from_tree(tree, "here")
    checkpoint.save(path, weights.to_tree(weights.initialise(SMALL, INSTRUCTIONS, 0)))
    assert not isinstance(weights.load_judge(path), ClassifierReflector)


def test_a_loss_that_is_not_finite_is_named(tmp_path: Path) -> None:
    judge = fresh()
    judge.network.end.bias.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"reward: loss is nan at step 0; lower reward\.classifier_lr"):
        train_classifier(judge, TRAIN, QUICK, 0, Savepoint(tmp_path / "a"))

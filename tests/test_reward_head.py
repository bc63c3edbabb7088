"""The reward stage learns labels of the current frame, goes on where it was killed, and its figures are what they say; wrong versions are seen."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from published_directories import write_reflector

from worldenv import noise
from worldenv.checkpoint import Savepoint
from worldenv.config import ReflectorConfig, RewardConfig
from worldenv.data.episode import Episode
from worldenv.learning.optimizer import one_cycle
from worldenv.learning.reward_head import Labelled, auc, calibration_error, descend, fit_head, measure, score, stops, train_backbone
from worldenv.presets import PRESETS
from worldenv.reflector import weights
from worldenv.reflector.contract import scored
from worldenv.reflector.frames import shown
from worldenv.reflector.judge import LlavaReflector
from worldenv.stages import reward

INSTRUCTIONS = ("move the square to the right side", "push the square to the right")
SMALL = ReflectorConfig(
    image=16, patch=4, vision_width=16, vision_layers=1, vision_heads=1, vision_mlp=32, width=24, layers=2, heads=2, kv_heads=1, ffn=32, frames=3,
    head_width=16,
)  # fmt: skip
QUICK = RewardConfig(backbone_steps=80, backbone_batch=32, backbone_lr=4e-3, head_epochs=30, head_lr=2e-3, embeddings=300)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def episode(number: int, steps: int = 10) -> Episode:
    """A white square that wanders; success while it is past a line on the right."""
    rng = np.random.default_rng(number)
    place = np.clip(6.0 + rng.normal(0, 1.2, steps + 1).cumsum() + rng.choice([-0.8, 0.8]) * np.arange(steps + 1), 0, 12)
    frame = np.full((steps + 1, 16, 16, 3), 40, np.uint8) + rng.integers(0, 12, (steps + 1, 16, 16, 3), dtype=np.uint8)
    for t, x in enumerate(place.round().astype(int)):
        frame[t, 6:10, x : x + 4] = 230
    success = place.round() > 8
    pose = np.zeros((steps + 1, 7))
    pose[:, 6] = 1
    commands, gripper = np.zeros((steps, 7), np.float32), np.ones(steps + 1)
    text = INSTRUCTIONS[number % 2]
    return Episode(text, number % 2, "train", number, "a random walk", frame, pose, gripper, commands, success)


TRAIN, HELD_OUT = [episode(i) for i in range(80)], [episode(i) for i in range(80, 120)]


def reflector(config: ReflectorConfig = SMALL) -> LlavaReflector:
    return weights.initialise(config, INSTRUCTIONS, seed=1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[LlavaReflector, dict[str, Any]]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("reward")
    judge = reflector()
    metrics = train_backbone(judge, TRAIN, QUICK, 0, Savepoint(folder / "backbone"))
    return judge, {**metrics, **fit_head(judge, TRAIN, QUICK, 0, Savepoint(folder / "head"))}


# Labels and inputs


def test_a_label_is_the_predicate_at_the_last_frame_that_is_shown() -> None:
    labelled = Labelled(TRAIN)
    batch, label = labelled.draw(0, noise.Stream.BACKBONE, 3, 64, 0.25)
    assert label.sum() == 16
    assert batch[:, 1].min() >= 1  # the first frame is never judged
    for (e, t, drawn), y in zip(batch.tolist(), label, strict=True):
        assert y == TRAIN[e].success[t]
        assert not drawn
    moved = [(e, t) for e, t, _ in batch.tolist() if TRAIN[e].success[t] != TRAIN[e].success[t - 1]]
    assert moved  # so labels that are one frame late or early would be seen
    assert len(labelled) == 80 * 10
    assert labelled.successes == sum(int(one.success[1:].sum()) for one in TRAIN)


def test_the_clip_ends_at_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = reflector()
    seen: list[Sequence[torch.Tensor]] = []
    monkeypatch.setattr(judge, "embed", lambda instruction, clips: seen.append(clips))
    Labelled(TRAIN).embed(judge, np.array([[4, 7, 0], [5, 2, 0], [6, 9, 0]]))
    for clip, (e, t) in zip(seen[0], [(4, 7), (5, 2), (6, 9)], strict=True):
        assert torch.equal(clip, torch.from_numpy(TRAIN[e].frame[list(shown("uniform", t, 3))]))
        assert torch.equal(clip[-1], torch.from_numpy(TRAIN[e].frame[t]))


def test_half_of_the_videos_are_as_the_simulator_draws_them() -> None:
    drawn = [np.concatenate([one.frame[:1], 255 - one.frame[1:]]) for one in TRAIN]  # an imagined rollout starts at a true frame
    labelled = Labelled(TRAIN, drawn)
    batch, _ = labelled.draw(0, noise.Stream.BACKBONE, 0, 400, 0.5)
    assert 0.4 < batch[:, 2].mean() < 0.6
    assert np.array_equal(labelled.video(3, True), drawn[3])
    assert np.array_equal(labelled.video(3, False), TRAIN[3].frame)
    with pytest.raises(ValueError, match="79 videos for 80 episodes"):
        Labelled(TRAIN, drawn[:-1])
    with pytest.raises(ValueError, match="does not begin with its episode's first frame"):
        Labelled(TRAIN, [255 - one.frame for one in TRAIN])


def test_batches_are_a_function_of_seed_and_step() -> None:
    labelled = Labelled(TRAIN)
    one, again, later, other = (labelled.draw(seed, noise.Stream.BACKBONE, step, 32, 0.5)[0] for seed, step in [(0, 1), (0, 1), (0, 2), (1, 1)])
    assert np.array_equal(one, again)
    assert not np.array_equal(one, later)
    assert not np.array_equal(one, other)
    chosen, label = labelled.choose(0, noise.Stream.EMBEDDING, 120, 0.5)
    assert len({tuple(row[:2]) for row in chosen.tolist()}) == len(chosen) == 120
    assert label.sum() == 60
    assert len(labelled.choose(0, noise.Stream.EMBEDDING, 10**5, 0.5)[0]) == len(labelled)


def test_no_two_draws_of_a_stage_are_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of successes, failures and who is shown drawn, at any step: else what a success is compared with would follow from it."""
    drawn: list[int] = []
    monkeypatch.setattr(noise, "integers", lambda seed, stage, step, high, count: drawn.append(step) or np.zeros(count, np.int64))
    labelled = Labelled(TRAIN)
    for step in range(4):
        labelled.draw(0, noise.Stream.BACKBONE, step, 4, 0.5)
    assert len(set(drawn)) == len(drawn) == 12


def test_nothing_to_learn_from_is_said() -> None:
    failures = [replace(one, success=np.zeros_like(one.success)) for one in TRAIN[:3]]
    with pytest.raises(ValueError, match="0 frames of success and 30 of failure in 3 episodes"):
        Labelled(failures)


# Training


def test_the_stage_learns_and_its_metrics_are_json(trained: tuple[LlavaReflector, dict[str, Any]]) -> None:
    judge, metrics = trained
    found = measure(score([judge], HELD_OUT), HELD_OUT, 0.5)
    json.dumps({**metrics, **found}, allow_nan=False)
    assert found["auc"] > 0.998
    assert found["recall"] > 0.97
    assert found["precision"] > 0.97
    assert found["ece"] < 0.05
    assert metrics["embeddings"] == 300
    assert metrics["train_episodes"] == 80
    headless = LlavaReflector(judge.config, judge.llava, None)
    assert measure(score([headless], HELD_OUT), HELD_OUT, 0.5)["auc"] > 0.95
    assert not any(p.requires_grad for p in judge.llava.parameters())


def test_labels_that_are_a_frame_late_are_seen(trained: tuple[LlavaReflector, dict[str, Any]]) -> None:
    """What a reflector and labels that are a frame apart look like: the test above would fail."""
    scores = score([trained[0]], HELD_OUT)
    for by in (1, -1):
        shifted = measure(scores, [replace(one, success=np.roll(one.success, by)) for one in HELD_OUT], 0.5)
        assert shifted["auc"] < 0.998
        assert shifted["recall"] < 0.97 or shifted["precision"] < 0.97


class _Killed(Exception):
    pass


class _KilledAfter(Savepoint):
    """A savepoint whose run is killed right after so many saves."""

    def __init__(self, path: Path, saves: int) -> None:
        super().__init__(path, every_s=0.0)
        self._left = saves

    def save(self, tree: Any) -> None:
        super().save(tree)
        self._left -= 1
        if self._left == 0:
            raise _Killed


def test_a_killed_stage_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    config = replace(QUICK, backbone_steps=6, backbone_batch=8, head_epochs=5, embeddings=40)
    whole, cut = reflector(), reflector()
    want = train_backbone(whole, TRAIN, config, 0, Savepoint(tmp_path / "a"))
    with pytest.raises(_Killed):
        train_backbone(cut, TRAIN, config, 0, _KilledAfter(tmp_path / "b", 3))
    cut = reflector()  # what was in memory is lost
    got = train_backbone(cut, TRAIN, config, 0, Savepoint(tmp_path / "b"))
    assert got == want
    assert not (tmp_path / "b").exists()
    assert all(torch.equal(a, b) for a, b in zip(whole.llava.state_dict().values(), cut.llava.state_dict().values(), strict=True))
    want = fit_head(whole, TRAIN, config, 0, Savepoint(tmp_path / "c"))
    with pytest.raises(_Killed):
        fit_head(cut, TRAIN, config, 0, _KilledAfter(tmp_path / "d", 3))
    got = fit_head(cut, TRAIN, config, 0, Savepoint(tmp_path / "d"))
    assert got == want
    assert whole.head is not None
    assert cut.head is not None
    assert all(torch.equal(a, b) for a, b in zip(whole.head.state_dict().values(), cut.head.state_dict().values(), strict=True))
    cut.head = None  # killed after that, while it is measured: nothing is read, imagined or fitted again

    def drawn() -> list[NDArray[np.uint8]]:
        raise AssertionError("imagined again")

    cut.embed = drawn  # type: ignore[assignment,method-assign]
    assert fit_head(cut, TRAIN, config, 0, Savepoint(tmp_path / "d"), drawn) == want
    assert cut.head is not None
    assert all(torch.equal(a, b) for a, b in zip(whole.head.state_dict().values(), cut.head.state_dict().values(), strict=True))


def test_gradients_of_the_backbone_are_clipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, norms = torch.nn.Linear(3, 1), list[float]()
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda _: norms.append(float(torch.stack([p.grad.norm() for p in network.parameters()]).norm())))
    descend(network, lambda step: 50.0 * network.weight.sum() + network.bias.sum(), 2, 0.1, "x", "x", Savepoint(tmp_path / "savepoint"))
    assert norms == pytest.approx([1.0, 1.0], rel=1e-4)


def test_the_backbones_rate_is_one_cycle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, rates = torch.nn.Linear(3, 1), list[float]()
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda optimizer: rates.append(optimizer.param_groups[0]["lr"]))
    descend(network, lambda step: network.weight.sum(), 20, 0.1, "x", "x", Savepoint(tmp_path / "savepoint"))
    assert rates == pytest.approx([one_cycle(step, 20, 0.1) for step in range(20)])
    assert (max(rates), rates[-1]) == (pytest.approx(0.1), pytest.approx(0.0, abs=1e-9))


@pytest.mark.parametrize("positives", [0.2, 0.5])
def test_the_share_of_successes_is_what_was_asked(positives: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the head's embeddings and of the backbone's batches: it decides how strict the judge is."""
    config, shares = replace(QUICK, positives=positives, embeddings=40, head_epochs=1, backbone_steps=2, backbone_batch=10), list[float]()
    right = Labelled.draw

    def seen(self: Labelled, *given: Any) -> Any:
        batch, label = right(self, *given)
        shares.append(float(label.mean()))
        return batch, label

    monkeypatch.setattr(Labelled, "draw", seen)
    judge = reflector()
    train_backbone(judge, TRAIN, config, 0, Savepoint(tmp_path / "backbone"))
    assert shares == pytest.approx([positives] * 2)
    assert fit_head(judge, TRAIN, config, 0, Savepoint(tmp_path / "head"))["positives"] == pytest.approx(positives)


def test_the_head_sees_its_embeddings_in_another_order_every_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    right = noise.integers

    def seen(seed: int, stage: int, step: int, high: int, count: int) -> NDArray[np.int64]:
        if stage == noise.Stream.REWARD:
            drawn.append(step)
        return right(seed, stage, step, high, count)

    monkeypatch.setattr(noise, "integers", seen)
    fit_head(reflector(), TRAIN, replace(QUICK, head_epochs=3, embeddings=20), 0, Savepoint(tmp_path / "head"))
    assert drawn == [0, 1, 2]


def test_the_heads_loss_is_a_mean_over_embeddings_whatever_the_batch(tmp_path: Path) -> None:
    still = replace(QUICK, head_epochs=1, head_lr=1e-12, embeddings=20)
    losses = [fit_head(reflector(), TRAIN, replace(still, head_batch=size), 0, Savepoint(tmp_path / str(size)))["head_loss"] for size in (8, 20)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_loss_that_is_not_finite_stops_the_stage(tmp_path: Path) -> None:
    judge = reflector()
    judge.llava.model.model.image_newline.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"reward: loss is nan at step 0; lower reward\.backbone_lr"):
        train_backbone(judge, TRAIN, QUICK, 0, Savepoint(tmp_path / "a"))
    with pytest.raises(FloatingPointError, match=r"reward: loss is nan at step 0; lower reward\.head_lr"):
        fit_head(judge, TRAIN, QUICK, 0, Savepoint(tmp_path / "b"))


def test_a_published_backbone_stays_as_it_is_and_gets_a_head(tmp_path: Path) -> None:
    """As the stage does it: sizes of the directory, frames, sampler and pooling of the settings."""
    source = reflector()
    write_reflector(tmp_path / "llava", source)
    like = replace(PRESETS["tiny"].reflector, sampler="stable_dyadic", frames=4)
    chosen = replace(QUICK, start=str(tmp_path / "llava"), embeddings=20, head_epochs=2)
    settings = replace(PRESETS["tiny"], reflector=like, reward=chosen)
    desk = SimpleNamespace(settings=settings, device=torch.device("cpu"), seed=0, env=SimpleNamespace(tasks=INSTRUCTIONS))
    stage = SimpleNamespace(metrics={}, savepoint=lambda name: Savepoint(tmp_path / name))
    made = reward.fitted_llava(desk, stage, TRAIN[:20], lambda: [one.frame for one in TRAIN[:20]])  # type: ignore[arg-type]
    assert made.config == replace(SMALL, sampler="stable_dyadic", frames=4, head_width=like.head_width, threshold=like.threshold)
    assert made.head is not None
    assert made.llava.model.dtype == torch.bfloat16
    theirs = made.llava.state_dict()
    assert all(torch.equal(tensor.bfloat16(), theirs[name]) for name, tensor in source.llava.state_dict().items())
    assert stage.metrics["head"]["embeddings"] == 20
    again = weights.from_tree(weights.to_tree(made), "here").freeze()
    for one, other in zip(score([made], HELD_OUT[:2]), score([again], HELD_OUT[:2]), strict=True):
        assert np.array_equal(one, other)
    with pytest.raises(ValueError, match=r"reward\.start='x': of a LLaVA, but reward\.judge is classifier"):
        RewardConfig(start="x", judge="classifier")


# Figures


def test_scores_are_those_of_a_rollout(trained: tuple[LlavaReflector, dict[str, Any]]) -> None:
    judge, _ = trained
    mixed = [*HELD_OUT[:3], episode(500, steps=7), episode(501, steps=7)]
    for one, row in zip(mixed, score([judge], mixed, chunk=4, batch=2), strict=True):
        want = judge.strict(one.instruction, torch.from_numpy(one.frame), range(1, len(one.frame)))
        np.testing.assert_allclose(row, want.numpy(), rtol=0, atol=1e-5)
    for one, row in zip(score([judge], mixed, batch=2), score([judge, judge, judge], mixed, batch=2), strict=True):
        assert np.array_equal(one, row)
    drawn = [255 - one.frame for one in mixed]
    video = torch.from_numpy(np.concatenate([mixed[0].frame[:1], drawn[0][1:]]))
    np.testing.assert_allclose(score([judge], mixed, drawn)[0], judge.strict(mixed[0].instruction, video, range(1, 11)).numpy(), rtol=0, atol=1e-5)


@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=40))
def test_auc_counts_pairs(pairs: list[tuple[int, bool]]) -> None:
    values, label = np.array([p[0] / 6 for p in pairs]), np.array([p[1] for p in pairs])
    good, bad = values[label], values[~label]
    if not len(good) or not len(bad):
        assert auc(values, label) is None
        return
    won = sum((a > b) + 0.5 * (a == b) for a in good for b in bad)
    assert auc(values, label) == pytest.approx(won / (len(good) * len(bad)))


def test_scores_are_of_the_episodes_own_frames_and_drawings_whatever_their_lengths() -> None:
    """A judge that says what a frame's brightness is: of three lengths, mixed, two at a time."""

    class Meter:
        def begin(self, instruction: Sequence[str], frame: Any) -> list[int]:
            assert [INSTRUCTIONS.index(text) for text in instruction] == [int(one[0, 0, 0]) % 2 for one in frame]
            return [0] * len(instruction)

        def judge(self, watch: list[int], frames: Any) -> tuple[Any, list[int]]:
            return frames[:, :, 0, 0, 0].float() / 255, watch

    lengths = (4, 7, 4, 3, 7, 4)
    some: Any = [
        SimpleNamespace(instruction=INSTRUCTIONS[e % 2], frame=np.tile(np.arange(n, dtype=np.uint8)[:, None, None, None] * 10 + e, (1, 2, 2, 3)))
        for e, n in enumerate(lengths)
    ]
    drawn = [one.frame + np.uint8(100) for one in some]
    for given_drawn, more in ((None, 0), (drawn, 100)):
        found = score([Meter()], some, given_drawn, chunk=2, batch=2)  # type: ignore[list-item]
        for e, (row, n) in enumerate(zip(found, lengths, strict=True)):
            np.testing.assert_allclose(row * 255, [more + e + 10 * t for t in range(1, n)], rtol=1e-5)


def test_a_video_is_judged_until_a_score_is_above_and_not_at_the_threshold() -> None:
    frames = torch.zeros(2, 4, 2, 2, 3, dtype=torch.uint8)
    frames[1, 1] = 1
    judge: Any = SimpleNamespace(
        begin=lambda instruction, first: list(instruction),
        judge=lambda watch, later: (0.5 + 0.25 * later[:, :, 0, 0, 0].float(), watch),
    )
    found = scored(judge, ["a", "b"], frames[:, 0], frames, 2, until=0.5)
    assert found[0].tolist() == [0.5] * 4
    assert found[1, :2].tolist() == [0.5, 0.75]
    assert found[1, 2:].isnan().all()


def test_calibration_error() -> None:
    label = np.array([True, False, True, True])
    assert calibration_error(np.array([0.75, 0.75, 0.75, 0.75]), label) == pytest.approx(0)
    assert calibration_error(np.array([1.0, 1.0, 1.0, 1.0]), label) == pytest.approx(0.25)
    assert calibration_error(np.array([0.05, 0.95, 0.95, 0.95]), label) == pytest.approx(0.25 * 0.95 + 0.75 * (0.95 - 2 / 3))


def test_how_episodes_end() -> None:
    def row(*values: float) -> NDArray[np.float32]:
        return np.array(values, np.float32)

    scores = [row(0.1, 0.6, 0.9), row(0.6, 0.1, 0.9), row(0.6, 0.7, 0.1), row(0.1, 0.2, 0.5), row(0.1, 0.2, 0.3)]
    labels = [np.array(x) for x in ([False, True, True], [False, True, True], [False] * 3, [False, True, False], [False] * 3)]
    assert stops(scores, labels, 0.5) == {"right": 1, "early": 1, "false": 1, "missed": 1, "left": 1}
    assert stops(scores, labels, 0.95) == {"right": 0, "early": 0, "false": 0, "missed": 3, "left": 2}
    assert stops([row(0.9, 0.1)], [np.array([True, False])], 0.5)["right"] == 1  # judged where it stops, not at the end


def test_an_episode_that_is_stopped_after_its_success_is_gone_is_no_failure() -> None:
    """It succeeded once, so it is none of those that never do: their rate stays a share."""
    lost = replace(HELD_OUT[0], success=np.array([False, True, *[False] * (len(HELD_OUT[0].success) - 2)]))
    never = replace(HELD_OUT[0], success=np.zeros(len(HELD_OUT[0].success), bool))
    late = np.where(np.arange(len(lost.success) - 1) == 4, 0.9, 0.1).astype(np.float32)
    found = measure([late, late, late, 0 * late], [lost, lost, never, never], 0.5)
    assert found["stops"] == {"right": 0, "early": 2, "false": 1, "missed": 0, "left": 1}
    assert (found["failure_stop_rate"], found["false_stop_rate"], found["stop_recall"]) == (0.5, 0.75, 0.0)


def test_precision_recall_and_the_best_threshold_of_a_known_table() -> None:
    none, late = np.zeros(5, bool), np.array([0, 0, 0, 1, 1], bool)
    episodes = [replace(episode(0, 4), success=late), *(replace(episode(i, 4), success=none) for i in (1, 2))]
    scores = [np.array(row, np.float32) for row in ([0.1, 0.1, 0.55, 0.2], [0.1, 0.58, 0.1, 0.1], [0.1, 0.58, 0.1, 0.1])]
    found = measure(scores, episodes, 0.5)
    assert (found["precision"], found["recall"], found["success_frames"], found["frames"]) == (1 / 3, 1 / 2, 2, 12)
    assert found["best_eta"] == 0.6  # two failures go on, where 0.5 would end one success


def test_measure_reports_what_stops_say() -> None:
    some = HELD_OUT[:4]
    fixed = [np.where(one.success[1:], 0.9, 0.2).astype(np.float32) for one in some]
    fixed[0][:] = 0.8  # stops at once
    found = measure(fixed, some, 0.5)
    ends = stops(fixed, [one.success[1:] for one in some], 0.5)
    assert found["stops"] == ends
    assert found["false_stop_rate"] == (ends["early"] + ends["false"]) / 4
    assert found["episodes"] == 4
    assert found["frames"] == 40
    perfect = [np.where(one.success[1:], 0.6, 0.4).astype(np.float32) for one in some]
    found = measure(perfect, some, 0.5)
    assert (found["auc"], found["precision"], found["recall"], found["false_stop_rate"], found["best_eta"]) == (1.0, 1.0, 1.0, 0.0, 0.5)

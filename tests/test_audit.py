"""Imagined against true: counts by hand, and which step of which video is compared (worldenv.audit)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from worldenv import audit
from worldenv.audit import Pair, agreement, psnr, psnr_by_chunk
from worldenv.nouns import Context

ETA = 0.5
POSE = np.array([0.0, 0, 0, 0, 0, 0, 1])


def pair(task: str, imagined: bool, true: bool, seen: bool) -> Pair:
    """Three steps; what happens does so in the middle one, and does not hold at the end."""
    frames = np.zeros((3, 2, 2, 3), np.uint8)

    def scores(high: bool) -> NDArray[np.float32]:
        return np.array([0.1, 0.9 if high else 0.5, 0.2], np.float32)

    context = Context(task, 0, 0, frames[0], POSE, 1.0)
    return Pair(context, np.zeros((3, 7), np.float32), frames, scores(imagined), frames, scores(seen), np.array([False, true, False]))


def test_agreement_by_hand() -> None:
    """A score of exactly eta is none above it. Every kind of pair another number of times, so that no two counts are taken for each other."""
    kinds = {(True, True, True): 1, (True, False, False): 2, (False, True, False): 4, (False, False, True): 8, (False, True, True): 16}
    pairs = [pair("push", *kind) for kind, count in kinds.items() for _ in range(count)] + [pair("pull", True, False, True)] * 32
    found = agreement(pairs, ["push", "pull"], ETA)
    push = {
        "episodes": 31, "agree": 1 + 8, "imagined_successes": 1 + 2, "true_successes": 1 + 4 + 16, "false_positives": 2, "false_negatives": 4 + 16,
        "reflector_false_positives": 8, "reflector_false_negatives": 4,
    }  # fmt: skip
    pull = dict.fromkeys(push, 0) | dict.fromkeys(("episodes", "imagined_successes", "false_positives", "reflector_false_positives"), 32)
    assert found.pop("by_task") == {"push": push, "pull": pull}
    assert found == {name: push[name] + pull[name] for name in push}


def test_psnr_is_of_full_range() -> None:
    dark = np.zeros((2, 2, 3), np.uint8)
    assert psnr(dark, dark + 255) == pytest.approx(0.0)
    assert psnr(dark + 255, dark) == pytest.approx(0.0)  # not taken modulo 256
    assert psnr(dark, dark + 51) == pytest.approx(20 * math.log10(5))
    assert psnr(dark, dark) == 99.0


def test_a_chunk_is_the_mean_over_the_episodes_that_have_it() -> None:
    true = [np.zeros((length, 2, 2, 3), np.uint8) for length in (8, 5, 3)]
    drawn = [one.copy() for one in true]
    for one, off in zip(drawn, (51, 17, 85), strict=True):
        one[:4] += np.uint8(off)
    drawn[0][4:] += np.uint8(255)
    first = np.mean([20 * math.log10(255 / off) for off in (51, 17, 85)])
    assert psnr_by_chunk(drawn, true, 4) == pytest.approx([first, (0.0 + 99.0) / 2])


class _Env:
    """Success holds where as many commands as the state's number were given, and at no other time; a frame is how many there were."""

    def begin(self, task: int, split: str, index: int) -> Any:
        assert split == "train"
        self.begun, self.count = (task, index), 0

    def advance(self, command: NDArray[np.float32]) -> Any:
        assert command[0] == pytest.approx(0.1 * self.begun[1] + 0.01 * self.count)
        self.count += 1
        return _Moment(np.full((2, 2, 3), self.count, np.uint8), self.count == self.begun[1])


@dataclasses.dataclass
class _Moment:
    frame: NDArray[np.uint8]
    success: bool


@pytest.mark.parametrize("judges", [1, 2])
def test_the_same_commands_are_replayed_to_the_limit_and_compared_step_by_step(judges: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever ended first, in whatever order the rollouts came, and however many score."""
    contexts = [Context("push", 1, index, np.full((2, 2, 3), 100 + index, np.uint8), POSE, 1.0) for index in (2, 5, 3)]

    class Query:
        def __init__(self, index: int, chunk: int) -> None:
            self.command = torch.tensor([[0.1 * index + 0.01 * (4 * chunk + k)] * 7 for k in range(4)])

    class Flight:
        def __init__(self, job: Any) -> None:
            self.job, self.queries = job, [Query(job.context.state_index, chunk) for chunk in range(2)]

        def frames(self) -> torch.Tensor:
            return torch.full((8, 2, 2, 3), self.job.context.state_index, dtype=torch.uint8)

        def rollout(self) -> Any:
            return dataclasses.make_dataclass("R", ["score"])(torch.arange(8.0).view(2, 4) / 10 + self.job.context.state_index)

    asked: dict[str, Any] = {}

    class Flights:
        def __init__(self, replicas: Any, **more: Any) -> None:
            asked.update(more)

        def __enter__(self) -> Flights:
            return self

        def __exit__(self, *_: object) -> None: ...

        def fly(self, jobs: Sequence[Any]) -> Any:
            asked["numbers"] = [job.number for job in jobs]
            return (Flight(job) for job in reversed(jobs))

    def scored(_: Any, instruction: Sequence[str], first: torch.Tensor, later: torch.Tensor, chunk: int) -> torch.Tensor:
        return later[..., 0, 0, 0].float() + first[:, 0, 0, 0, None].float()

    monkeypatch.setattr(audit, "Flights", Flights)
    monkeypatch.setattr(audit, "scored", scored)
    replica, schedule = dataclasses.make_dataclass("P", ["policy"])(dataclasses.make_dataclass("C", ["chunk"])(4)), audit.Schedule(slots=2)
    env: Any = _Env()
    pairs = audit.replay([replica], env, [None] * judges, contexts, seed=7, first_number=30, steps=8, schedule=schedule)  # type: ignore[list-item]
    assert (asked["threshold"], asked["steps"], asked["seed"], asked["keep_frames"]) == (math.inf, 8, 7, True)
    assert asked["numbers"] == [30, 31, 32]
    for one, context in zip(pairs, contexts, strict=True):
        index = context.state_index
        assert one.context is context
        assert one.imagined[0, 0, 0, 0] == index
        assert one.imagined_score.tolist() == pytest.approx([index + t / 10 for t in range(8)])
        assert one.true[:, 0, 0, 0].tolist() == list(range(1, 9))
        assert one.success.tolist() == [t + 1 == index for t in range(8)]
        assert one.true_score.tolist() == [100 + index + t for t in range(1, 9)]
        assert one.command.shape == (8, 7)


def test_what_was_recorded_is_compared_with_what_is_imagined_of_it_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither has the first frame, before any command."""
    numbers = np.arange(4, dtype=np.uint8)[:, None, None, None]
    frames = np.broadcast_to(numbers, (4, 2, 2, 3))
    episode: Any = SimpleNamespace(
        context="where it began", command=np.ones((3, 7), np.float32), frame=frames, success=np.array([False, False, True, False])
    )
    monkeypatch.setattr(audit, "imagine_episodes", lambda *_: [frames + 10])
    monkeypatch.setattr(audit, "score", lambda _, __, drawn=None, chunk=0: [np.full(3, 0.2 if drawn is None else 0.8, np.float32)])
    (found,) = audit.recorded([], [], [episode], 16, 4)
    assert found.imagined[:, 0, 0, 0].tolist() == [11, 12, 13]
    assert found.true[:, 0, 0, 0].tolist() == [1, 2, 3]
    assert found.success.tolist() == [False, True, False]
    assert (float(found.imagined_score[0]), float(found.true_score[0])) == (pytest.approx(0.8), pytest.approx(0.2))

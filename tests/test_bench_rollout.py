"""worldenv-bench rollout: what it compares is the same, and its rows can be read."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from worldenv import compiled
from worldenv.benchmarks import bench_rollout
from worldenv.benchmarks.bench_rollout import RolloutArgs
from worldenv.cli import bench
from worldenv.engines.onnxruntime import OnnxRuntime
from worldenv.rollout.store import differing

ARGS = RolloutArgs(rollouts=4, group=2, slots=3, bucket=2, limit=16, checked=2)


def test_the_row_says_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    flags = "rollout --rollouts 4 --group 2 --slots 3 --bucket 2 --limit 16 --checked 2"
    assert bench.main(flags.split()) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"][0]
    assert row["rollouts_per_s"].keys() == {"scheduler", "sequential", "lockstep"}
    assert (row["identical"], row["identical_rollouts"], row["sequential_agrees"]) == (True, 2, True)
    assert row["dead_frames"]["sequential"] == 0
    assert row["dead_frames"]["lockstep"] == 4 * 16 - 8 * row["chunks"]
    assert sum(row["stage_share"].values()) == pytest.approx(1)
    assert 0 <= row["padding"] < 1
    assert row["predicted_s"] > 0


def test_rollouts_that_differ_or_end_elsewhere_are_told_apart() -> None:
    prepared = bench_rollout.prepared(ARGS)
    made = bench_rollout.scheduled(prepared, prepared.schedule(), prepared.jobs).rollouts
    one = made[0]
    assert differing(one, one) == []
    assert differing(one, dataclasses.replace(one, score=one.score + 1e-6 * one.live)) == ["score"]
    assert differing(one, dataclasses.replace(one, stopped=not one.stopped, number=9)) == ["number", "stopped"]
    assert bench_rollout.score_error(made, made) == 0.0
    assert bench_rollout.score_error({0: dataclasses.replace(one, score=one.score + 0.25)}, made) == pytest.approx(0.25)
    live = one.live.clone()
    live[-1, -1] = ~live[-1, -1]
    assert bench_rollout.score_error({0: dataclasses.replace(one, live=live)}, made) is None


@pytest.mark.slow
def test_engines_run_the_rollouts_that_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By ONNX Runtime, and only while they are measured; the bits of one slot, and the loop's ends and scores, hold there too.

    The scheduler has two workers of one thread, the loop operators of two threads.
    """
    asked: list[int] = []
    original = OnnxRuntime.on_threads
    monkeypatch.setattr(OnnxRuntime, "on_threads", lambda self, threads: asked.append(threads) or original(self, threads))  # type: ignore[func-returns-value]
    _, row = bench_rollout.measure(dataclasses.replace(ARGS, back_end="onnxruntime", threads=2, slots=4, store=tmp_path))
    assert asked == [2] * len(compiled.NAMES)
    assert row["workers"] == 2
    assert {one["back_end"] for one in row["engines"].values()} == {"onnxruntime"}
    assert row["engines"].keys() == set(compiled.NAMES)
    assert (row["identical"], row["sequential_agrees"], row["back_end"]) == (True, True, "onnxruntime fp32")


@pytest.mark.parametrize("wrong", [{"rollouts": 0}, {"limit": 12}, {"mean_end": 1.0}, {"threads": 0}, {"streams": 0}, {"streams": 2}])
def test_what_cannot_be_measured_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"--{next(iter(wrong)).replace('_', '-')}"):
        bench_rollout.prepared(dataclasses.replace(ARGS, **wrong))  # type: ignore[arg-type]

"""The planner: closed forms where there are some, the promises at the paper's sizes, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from worldenv import _core
from worldenv.benchmarks import bench_hoisting, bench_scheduler
from worldenv.benchmarks.bench_plan import PlanArgs, Plant, best, ends, iteration, placements, plan, plant_of, steady
from worldenv.benchmarks.plan_costs import GPUS, StageWork, Workload, _reflector, counts, fitted, on_gpu, read_profile, workload
from worldenv.benchmarks.plan_stages import disk_gb, environment_steps, gpu_memory_gb, host_memory_gb, stage_costs
from worldenv.cli import bench
from worldenv.presets import PAPER, TINY
from worldenv.reflector import flops
from worldenv.rollout.collect import Flights, Replica, Schedule, placement
from worldenv.world import ImaginedWorld

LIMIT = PAPER.env.steps
ROOT = Path(__file__).resolve().parent.parent


def test_the_paper_on_eight_h20() -> None:
    """At least 95 % of the busiest resource's bound and 1.7 times lock step, over 4096 rollouts, by the same code."""
    lines, row = plan(PlanArgs())
    assert row["steady_rollouts"] >= 4096
    assert 0.95 <= row["share_of_bound"] <= 1.0 + 1e-9
    assert row["speedup_over_lockstep"] >= 1.7
    assert 0.9 <= row["iteration_share_of_bound"] <= 1.0
    assert row["peak_memory_gb"] < 96
    # what is printed hangs together: frames, rollouts and the bound, from FLOPs alone where the weights' bytes hardly count
    drawn = np.array(ends(100_000, LIMIT, 0.55, 1))
    assert row["frames_per_s"] * 3600 / row["rollouts_per_h"] == pytest.approx(drawn.mean(), rel=0.02)
    found, chunks = counts(PAPER), np.ceil(drawn / 8).astype(int)
    judged = np.cumsum(found.judged)[chunks - 1].mean() / chunks.mean()
    flop = 27 * 3.627e12 + 8 * (0.2727e12 + 0.5256e12) + 4.855e12 + judged
    assert row["bound_frames_per_s"] == pytest.approx(8 * 148e12 * 0.5 / flop * drawn.mean() / chunks.mean(), rel=0.02)
    queries = 96 * chunks.mean()
    assert row["update_gpus"] == 8  # a step's 4 rollouts have 62 queries: 8 microbatches of 8
    assert row["update_s"] == pytest.approx(queries * 5 * 4.855e12 / (8 * 148e12 * 0.5), rel=0.05)
    assert row["hours"] == pytest.approx(30 * (row["iteration_s"] + row["update_s"]) / 3600)
    assert {one["stage"] for one in row["stages"]} == {"sft", "world", "reward", "loop", "eval"}
    assert any(line.startswith("disk: ") for line in lines)
    json.dumps(row, allow_nan=False)


def test_what_is_planned_is_the_preset() -> None:
    """Sampler, pictures, chunk, steps, batches and iterations are PAPER's where no flag says otherwise; and so are the operations."""
    _, row = plan(PlanArgs(rollouts=64, slots=4))
    simulator, loop = PAPER.simulator, PAPER.loop
    assert row["sampler"] == PAPER.reflector.sampler == "uniform"
    assert (row["picture"], row["chunk"], row["denoise_steps"]) == ([simulator.height, simulator.width], simulator.chunk, simulator.denoise_steps)
    assert f"limit {PAPER.env.steps} frames" in row["ends"]
    assert (row["contexts"], row["group"], row["iterations"]) == (loop.contexts, loop.group, loop.iterations)
    assert row["batches"] == {"policy": [4], "encode": [4], "denoise": [4], "decode": [4], "reflector": [1]}
    assert counts(PAPER).step == bench_hoisting.step_counts(simulator)["hoisted"][0] == pytest.approx(3.627e12, rel=1e-3)
    other = PlanArgs(limit=280, denoise_steps=5, sampler="stable_dyadic", bucket=2, judge_bucket=3, contexts=4, slots=4)
    assert (other.settings.env.steps, other.settings.reflector.sampler) == (280, "stable_dyadic")
    assert dataclasses.replace(other.settings, env=PAPER.env, simulator=simulator, reflector=PAPER.reflector, loop=loop) == PAPER
    assert plant_of(other).buckets == ((2,), (2,), (2,), (2,), (3,))
    assert plant_of(other).workload.stages[2].steps == 5


class _Steps:
    """A simulator and a policy of which only this much is asked."""

    steps, chunk = PAPER.simulator.denoise_steps, PAPER.policy.chunk

    def step(self) -> None:
        """Not called, as nothing of it is."""

    begin_chunk = finish_chunk = begin = step


def test_a_plan_has_the_batches_that_runs_make(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names, order, visits, shapes and devices of the stages are those that rollouts ask of the scheduler."""
    asked: list[_core.SchedulerConfig] = []

    class Runner:
        def __init__(self, config: _core.SchedulerConfig, runs: object) -> None:
            asked.append(config)

    monkeypatch.setattr(_core, "Runner", Runner)
    loop = PAPER.loop
    world = ImaginedWorld.__new__(ImaginedWorld)
    world._simulated = _Steps()  # type: ignore[assignment]
    schedule = Schedule(loop.slots, loop.bucket, loop.judge_bucket, loop.overlap)
    replicas = [Replica(_Steps(), world, torch.device("cpu"), parts) for parts in placement(4, "reflector", 1)]  # type: ignore[arg-type]
    Flights(replicas, seed=0, steps=LIMIT, threshold=0.5, schedule=schedule)
    plant = plant_of(PlanArgs(gpus=4))
    planned = next(one for one in placements(plant.networks, 4) if (one.apart, one.apart_gpus) == ("reflector", 1))
    ours, theirs = plant.config(planned, loop.slots, 4), asked[0]
    assert [(one.name, one.buckets, one.steps, one.devices) for one in ours.stages] == [
        (one.name, one.buckets, one.steps, one.devices) for one in theirs.stages
    ]
    assert [one.buckets for one in ours.stages] == [[4], [4], [4], [4], [1]]


def test_two_slots_leave_half_of_a_batch_empty() -> None:
    """Batches of policy and simulator have 4 rows, whoever is there: two slots are no plan, and are not proposed."""
    row = {slots: plan(PlanArgs(gpus=1, slots=slots, rollouts=256, sampler="stable_dyadic"))[1] for slots in (2, 4)}
    assert row[2]["frames_per_s"] < 0.6 * row[4]["frames_per_s"]
    assert plan(PlanArgs(gpus=1, rollouts=64))[1]["slots"] >= 4


@pytest.mark.parametrize("sampler", ["uniform", "stable_dyadic"])
def test_what_the_reflector_costs_is_what_it_counts(sampler: str) -> None:
    """Chunk by chunk, without calling it, beside torch's own counter over real calls, which count what short rows are padded with too."""
    config = dataclasses.replace(TINY.reflector, sampler=sampler, frames=8)
    judged, embedding, _, _ = _reflector(config, 40, 8)
    counted = flops.count(config, 64, 40, 8)
    frame = (embedding - _text(config)) / config.frames
    assert 0.9 * counted.judged < sum(judged) + frame <= counted.judged
    assert max(judged) < 8 * embedding


def _text(config: object) -> float:
    """Of one whole video in the language model."""
    reflector = flops.on_meta(config, 64)  # type: ignore[arg-type]
    geometry = reflector._geometry(flops.INSTRUCTION)
    tokens = geometry.before + reflector.config.frames * geometry.frame + geometry.question
    return tokens * geometry.token_flops + tokens**2 * geometry.pair_flops


def test_what_is_documented_is_what_is_planned() -> None:
    """Rows of docs/paper.md's first table, the rows that are kept of them, and this code agree."""
    page = (ROOT / "docs" / "paper.md").read_text()
    kept = [json.loads(line) for line in (ROOT / "benchmarks" / "results" / "plan.jsonl").read_text().splitlines()]
    assert len(kept) == 4
    for record in kept:
        (row,) = record["rows"]
        args = PlanArgs(gpus=row["gpus"], gpu=row["gpu"], sampler=row["sampler"], rollouts=64, slots=row["iteration_slots"])
        _, now = plan(args)
        for name in ("iteration_s", "update_s", "hours", "batches"):
            assert row[name] == (now[name] if name == "batches" else pytest.approx(now[name], rel=0.005)), name
        assert f"| {row['iteration_s']:.0f} s | {row['update_s']:.0f} s | {row['hours']:.1f} h |" in page
        assert row["steady_rollouts"] >= 4096


def test_stages_disk_and_memory_are_the_settings_sums() -> None:
    found = counts(PAPER)
    by_stage: dict[str, float] = {}
    for one in stage_costs(PAPER, found):
        by_stage[one.stage] = by_stage.get(one.stage, 0.0) + one.hours(GPUS["h20"], 8, 0.5)
    scored = 1000 * sum(found.judged) / (8 * 148e12 * 0.5) / 3600  # on all GPUs, as the rollouts of LOOP
    assert scored < by_stage["eval"] < 1.5 * scored
    imagined = 550 * 27 * 27 * found.step / (8 * 148e12 * 0.5) / 3600
    held_out, embeddings = 2 * 50 * sum(found.judged) / (8 * 148e12 * 0.5) / 3600, 2000 * found.embedding / (148e12 * 0.5) / 3600  # these on one
    assert imagined + held_out + embeddings < by_stage["reward"] < 1.1 * (imagined + held_out + embeddings)
    (fits,) = (one for one in stage_costs(PAPER, found) if one.stage == "sft")
    assert fits.hours(GPUS["h20"], 8, 0.5) == pytest.approx(fits.hours(GPUS["h20"], 1, 0.5) / 8)
    assert environment_steps(PAPER) == {"explore": 500 * 216, "eval": (1000 + 40 + 500) * 216}  # five curves
    disk, frames = disk_gb(PAPER, found), 550 * 217 * 256 * 256 * 3 / 1e9
    assert disk["pictures of episodes, before compression"] == pytest.approx(frames)
    heads = 2 * (28672 * 2 + 28672 * 4096 + 4096 + 2 * (4096 * 2 + 4096 * 4096 + 4096) + 4096 * 2 + 4096 * 7 + 7)  # published shapes
    language, projector = 32 * (4 * 8192 + 3 * (4096 + 11008)), 2176 + 8704 + 8704 + 4096 + 8192  # inputs and outputs of what gets LoRA
    vision = 23 * (1024 * 6 + 5120 * 2) + 26 * (1152 * 6 + 5456 * 2)
    assert disk["what LOOP changed, 6 copies"] == pytest.approx(6 * 4 * (heads + 32 * (language + projector + vision)) / 1e9)
    assert disk["3 policies"] == pytest.approx(3 * 16.01, rel=0.01)
    assert disk["simulator"] == pytest.approx(2.2238 * 4, rel=0.001)
    assert disk["savepoint of stage world"] == pytest.approx(5 * 4 * 1.46215, rel=0.001)
    memory, projector = host_memory_gb(PAPER, found, 8), 4096 * (8 + 1) + 4096 * (4096 + 1)
    assert memory["sft"] == pytest.approx(8 * (50 / 550 * frames + 4 * (heads + projector) / 1e9) + 16.01, rel=0.001)
    assert memory["scale"] == pytest.approx(50 / 550 * frames + 50 * 209 * 56 * 4096 * 2 / 1e9 + 16.01, rel=0.001)
    assert memory["world"] == pytest.approx(8 * 16 / 550 * frames + 5 * 4 * 1.46215, rel=0.001)  # eight at a time, and in one array; a savepoint
    scratch = dataclasses.replace(PAPER, world=dataclasses.replace(PAPER.world, initial=""))
    assert host_memory_gb(scratch, found, 8)["world"] == pytest.approx(3 * frames + memory["world"] + 8 * disk["simulator"])
    assert memory["reward"] == pytest.approx(2 * frames + 16.1, rel=0.001)
    assert memory["eval"] == pytest.approx(500 / 550 * frames)


def test_a_gpus_memory_is_that_of_the_stage_that_needs_most() -> None:
    """Engines have weights of their own, an update has gradients: the rollouts alone would fit."""
    found, everything = counts(PAPER), frozenset({"policy", "simulator", "reflector"})
    alone, shared = (gpu_memory_gb(PAPER, found, processes, {everything: 52.8e9}) for processes in (1, 8))
    total = {stage: sum(parts.values()) for stage, parts in alone.items()}
    assert total["loop"] == pytest.approx(52.8 + 16.0 + 16.1 + (23.7 - 16.0), abs=0.2)  # 23.7: python -m worldenv.learning.loop.memory --microbatch 8
    assert total["sft"] == pytest.approx(23.7, abs=0.2)
    assert total["world"] == pytest.approx(8.9 + 5.5 * 5.85 + 8 * 1.13, abs=0.1)
    assert sum(shared["world"].values()) == pytest.approx(total["world"] + 5.85, abs=0.1)
    whole = dataclasses.replace(PAPER, world=dataclasses.replace(PAPER.world, microbatch=64))
    assert sum(gpu_memory_gb(whole, found, 1, {everything: 0.0})["world"].values()) == pytest.approx(total["world"] + 56 * 1.13)
    eager = dataclasses.replace(PAPER, engines=dataclasses.replace(PAPER.engines, back_end="eager"))
    assert sum(gpu_memory_gb(eager, found, 1, {everything: 52.8e9})["loop"].values()) == pytest.approx(total["loop"] - 32.1, abs=0.1)
    apart = gpu_memory_gb(PAPER, found, 1, {frozenset({"policy", "simulator"}): 30e9, frozenset({"reflector"}): 20e9})["loop"]
    assert sum(apart.values()) == pytest.approx(30 + 16.0 + 7.7, abs=0.2)
    lines, row = plan(PlanArgs(gpus=8, gpu="h100", rollouts=64))
    said = next(line for line in lines if "GPU, most" in line)
    assert f"stage loop, {sum(row['gpu_memory_gb']['loop'].values()):.1f} of 80 GB, more than there is: --engines.back-end eager" in said


def test_more_waste_after_the_end_makes_lock_step_worse() -> None:
    ratio = {mean: plan(PlanArgs(gpus=2, mean_end=mean, rollouts=1024))[1]["speedup_over_lockstep"] for mean in (0.3, 0.55, 0.8)}
    assert ratio[0.3] > ratio[0.55] > ratio[0.8] > 1.0
    chunks = np.ceil(np.array(ends(100_000, LIMIT, 0.3, 1)) / 8).astype(int)
    found = counts(PAPER)
    front = found.query + found.imagined(27)
    ended = chunks.mean() * front + np.cumsum(found.judged)[chunks - 1].mean()
    assert ratio[0.3] == pytest.approx((27 * front + sum(found.judged)) / ended, rel=0.05)


def test_ends_have_the_stated_mean() -> None:
    for mean in (0.3, 0.55, 0.9):
        drawn = np.array(ends(100_000, 220, mean, 0))
        assert drawn.min() >= 1
        assert drawn.max() <= 220
        assert drawn.mean() / 220 == pytest.approx(mean, abs=0.005)
    assert ends(10, 220, 0.5, 3) == ends(10, 220, 0.5, 3) != ends(10, 220, 0.5, 4)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU for which all three networks are too much together."""
    monkeypatch.setitem(GPUS, "a100", dataclasses.replace(GPUS["a100"], memory=40e9))


@pytest.mark.usefixtures("small")
def test_what_does_not_fit_on_each_gpu_is_split() -> None:
    args = PlanArgs(gpu="a100", gpus=4, rollouts=512)
    chosen = best(plant_of(args), args)
    assert chosen.placement.name.startswith("reflector on ")
    assert 0.5 < chosen.share_of_bound <= 1.0 + 1e-9
    assert plant_of(args).peak_memory(chosen.placement, chosen.slots) <= 40e9


def test_one_gpu_that_has_not_enough_is_said() -> None:
    """An RTX 4090 has no room for a policy beside a simulator whose weights are float32; the error says what is missing."""
    for gpus in (1, 8):
        with pytest.raises(ValueError, match=r"needs .* GB on one GPU, which has 24"):
            plan(PlanArgs(gpu="rtx4090", gpus=gpus))
    with pytest.raises(ValueError, match="fewer --slots"):
        plan(PlanArgs(slots=4000))


def _plant(buckets: tuple[int, ...] = (1, 2, 4)) -> Plant:
    stages = (
        StageWork("policy", "policy", 0, 0, 3.0),
        StageWork("denoise", "simulator", 0, 0, 5.0, 3),
        StageWork("reflector", "reflector", 0, 0, 7.0),
    )
    weights, state = (dict(zip(("policy", "simulator", "reflector"), given, strict=True)) for given in ((100.0, 200.0, 400.0), (1.0, 10.0, 20.0)))
    work = Workload(stages, weights, state, 8, 40, 0.0)
    return Plant(work, ((0.2, 0.1), (0.4, 0.2), (0.8, 0.3)), (buckets,) * 3, math.inf)


def test_bound_and_memory_by_hand() -> None:
    plant = _plant()
    full = (0.05 + 0.1) + 3 * (0.1 + 0.2) + (0.2 + 0.3)
    assert plant.seconds_per_chunk() == pytest.approx(full)
    assert plant.seconds_alone() == pytest.approx(0.3 + 3 * 0.6 + 1.1)
    assert _plant((4,)).seconds_alone() == pytest.approx(0.6 + 3 * 1.2 + 2.0)
    everywhere, *others = placements(plant.networks, 4)
    assert plant.bound(everywhere) == pytest.approx(4 / full)
    assert plant.peak_memory(everywhere, 3) == pytest.approx(700 + 3 * 31 + 4 * 7)  # weights, three rollouts, the reflector's batch of 4
    split = next(one for one in others if one.name == "reflector on 1, policy and simulator on 3")
    assert plant.bound(split) == pytest.approx(min(3 / (0.15 + 0.9), 1 / 0.5))
    assert plant.peak_memory(split, 2) == pytest.approx(max(300 + 2 * 11 + 2 * 5, 400 + 6 * 20 + 4 * 7))
    assert {one.name.split(",")[0] for one in others} == {f"{network} on {n}" for network in ("simulator", "reflector") for n in (1, 2, 3)}


def test_rollouts_take_every_placement_that_is_planned() -> None:
    """`--loop.apart` and `--loop.apart-gpus`, which the planner prints, mean there what it has weighed."""
    for planned in placements(("policy", "simulator", "reflector"), 4):
        taken = placement(4, planned.apart, planned.apart_gpus)
        for network in ("policy", "simulator", "reflector"):
            assert planned.devices(network) == tuple(n for n, parts in enumerate(taken) if network in parts), planned.name


@pytest.mark.usefixtures("small")
def test_where_all_networks_do_not_fit_together_a_plan_says_what_to_place_where() -> None:
    lines, row = plan(PlanArgs(gpu="a100", rollouts=200))
    assert row["apart"] == "reflector"
    assert any(f"--loop.apart reflector --loop.apart-gpus {row['apart_gpus']}" in line for line in lines)


def test_no_schedule_beats_its_bound() -> None:
    plant = _plant()
    args = PlanArgs(gpus=4)
    for planned in placements(plant.networks, 4):
        for slots in (1, 2, 8):
            found = steady(plant, planned, slots, args, 300)
            assert found.share_of_bound <= 1.0 + 1e-9
            assert found.frames_per_s <= plant.bound(planned) * 8 * (1 + 1e-9)
            once = iteration(plant, planned, slots, args)
            assert once.seconds >= once.bound_s * (1 - 1e-9)
    assert steady(plant, next(placements(plant.networks, 4)), 8, args, 300).share_of_bound > 0.95


def test_a_profile_replaces_flops(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    stages = [
        {"name": "policy", "steps": 1, "buckets": [1, 4], "seconds": {"1": 0.3, "4": 0.6}},
        {"name": "denoise", "steps": 2, "buckets": [1, 4], "seconds": {"1": 0.2, "4": 0.8}},
        {"name": "reflector", "steps": 1, "buckets": [4], "seconds": {"4": 0.5}},
    ]
    path.write_text(json.dumps({"chunk": 8, "limit": 32, "stages": stages}))
    profile = read_profile(path)
    assert profile.costs[0] == pytest.approx((0.2, 0.1))
    assert profile.costs[1] == pytest.approx((0.0, 0.2))
    assert profile.costs[2] == pytest.approx((0.0, 0.125))
    _, row = plan(PlanArgs(preset="tiny", gpus=1, profile=path, rollouts=512, limit=32))
    assert row["peak_memory_gb"] is None
    assert row["gpu"] is None
    assert row["share_of_bound"] > 0.95
    whole = {"chunk": 8, "limit": 32, "stages": stages}
    wrong = [{"chunk": 8}, {**whole, "stages": [{"name": "policy"}]}, {**whole, "chunk": 0}, {**whole, "limit": "x"}, {**whole, "stages": []}]
    wrong += [{**whole, "stages": [{**stages[0], **change}]} for change in ({"buckets": []}, {"buckets": [0]}, {"buckets": [4, 1]}, {"steps": 0})]
    wrong += [{**whole, "stages": [{**stages[0], "seconds": seconds}]} for seconds in ({"1": math.nan}, {"1": math.inf}, {"x": 1.0}, {})]
    for content in (b"{", b"\x93NUMPY\x01", *(json.dumps(one).encode() for one in wrong)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"--profile \S*profile\.json: no profile of stages"):
            read_profile(path)


def test_costs_are_fitted_and_never_negative() -> None:
    assert fitted({1: 3.0, 2: 5.0, 8: 17.0}) == pytest.approx((1.0, 2.0))
    fixed, per_item = fitted({1: 4.0, 8: 2.0})  # larger is not cheaper: what was seen is noise
    assert per_item == 0.0
    assert 2.0 <= fixed <= 4.0
    assert fitted({1: 0.5, 4: 4.0})[0] == 0.0
    for wrong in ({}, {0: 1.0}, {1: 0.0}, {1: math.nan}, {1: math.inf}):
        with pytest.raises(ValueError, match="profile"):
            fitted(wrong)


def test_costs_from_a_data_sheet() -> None:
    stage = StageWork("denoise", "simulator", 10e12, 2e9, 0.0)
    fixed, per_item = on_gpu(stage, GPUS["h100"], 0.5)
    assert fixed == pytest.approx(2e9 / 3.35e12)
    assert per_item == pytest.approx(10 / 989 * 2)
    kept = dataclasses.replace(PAPER, reflector=dataclasses.replace(PAPER.reflector, sampler="stable_dyadic"))
    whole, short = (workload(PAPER, [length]).stages[-1].flops for length in (LIMIT, 32))
    assert whole > 10 * workload(kept, [LIMIT]).stages[-1].flops
    assert short < whole / 10  # up to 32 frames all are shown, and their past is kept
    with pytest.raises(ValueError, match="of a limit of 216"):
        workload(PAPER, [LIMIT + 8])


@pytest.mark.parametrize(
    "change",
    [
        {"limit": 220}, {"bucket": 0}, {"gpu": "tpu"}, {"preset": "tiny"}, {"mean_end": 1.0}, {"efficiency": 0.0}, {"gpus": 0}, {"iterations": 0},
        {"slots": 0},
    ],
)
def test_what_cannot_be_planned_is_said(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="--"):
        plan(dataclasses.replace(PlanArgs(), **change))  # type: ignore[arg-type]


WRONG = ("--gpu tpu", "--sampler random", "--gpuz 3", "--preset tiny", "--preset tiny --profile /nowhere", "--mean-end x", "--gpus 1 --gpu rtx4090")


@pytest.mark.parametrize("wrong", WRONG)
def test_a_bad_command_line_is_one_line(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["plan", *wrong.split()]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("worldenv-bench plan: ")
    assert said.err.count("\n") == 1


def test_the_command_ends_in_one_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["plan", "--gpus", "1", "--rollouts", "64", "--contexts", "2", "--slots", "4"]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(record) == {"rows", "machine", "versions", "commit"}
    assert {"frames_per_s", "rollouts_per_h", "hours", "peak_memory_gb", "speedup_over_lockstep", "share_of_bound"} <= set(record["rows"][0])
    assert record["rows"][0]["slots"] == 4


def test_what_scheduling_costs() -> None:
    """The shape of the row and of the law; how long an event takes is measured by the bench, not asserted here."""
    lines, row = bench_scheduler.measure(bench_scheduler.SchedulerArgs(slots=8, most_gpus=4, repeats=1))
    assert [one["gpus"] for one in row["scaling"]] == [1, 2, 4]
    assert all(0.9 < one["efficiency"] <= 1.0 for one in row["scaling"])
    assert 0 < row["overhead_us_median"] <= row["overhead_us_p99"]
    assert row["python_round_trip_us"] > row["overhead_us_median"]
    assert len(lines) == 7
    plant = plant_of(PlanArgs(gpu="b200"))
    (slow,) = bench_scheduler.scaling(plant, [64], 8, 50_000.0)  # one scheduler of 50 ms per event cannot feed 64 GPUs
    assert slow["efficiency"] < 0.5
    assert slow["scheduler_busy"] > 0.95

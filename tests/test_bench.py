"""The measuring itself: parity before speed, pairs in turn, the line for programs, the baseline equal to ours, and what is asked for by name."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from worldenv.benchmarks import bench_chunk_loop, cases, harness, networks, published
from worldenv.benchmarks.bench_chunk_loop import chunk_loop
from worldenv.benchmarks.bench_hoisting import Traffic
from worldenv.benchmarks.bench_simulator_unet import hoisted, simulator_unet, unhoisted
from worldenv.benchmarks.bench_vae import vae
from worldenv.benchmarks.harness import Agreement, Case, Row, Setting, Work
from worldenv.cli import bench
from worldenv.config import ClipConfig, ResamplerConfig, SimulatorConfig, UNetConfig, VAEConfig
from worldenv.engines.recipe import relative_error

BRIEF = Setting(torch.device("cpu"), torch.float32, "tiny", pairs=3, seconds=0.0, brief=True)
KEYS = {"case", "backend", "value", "unit", "baseline", "baseline_value", "speedup", "ceiling", "share_of_ceiling", "parity"}
SMALL = SimulatorConfig(
    unet=UNetConfig(64, (1, 2), 1, (1, 2), 32, 32, init_heads=3),
    vae=VAEConfig(8, (1, 2), 1, 4, norm_groups=4),
    clip=ClipConfig(image=16, patch=8, width=32, layers=1, heads=2),
    image_resampler=ResamplerConfig(32, 1, 2, 16, queries=6),
    action_resampler=ResamplerConfig(32, 1, 2, 16, queries=5),
    height=16,
    width=24,
    memory=3,
    chunk=4,
    denoise_steps=2,
)


def with_clock(monkeypatch: pytest.MonkeyPatch, costs: dict[Callable[[], object], float]) -> list[Callable[[], object]]:
    """Calls cost what `costs` says [ms]; returns the calls that were timed, in order."""
    made: list[Callable[[], object]] = []

    def milliseconds(device: torch.device, call: Callable[[], object]) -> float:
        made.append(call)
        return costs[call]

    monkeypatch.setattr(harness, "milliseconds", milliseconds)
    return made


def ours() -> None: ...


def theirs() -> None: ...


def test_pairs_are_interleaved_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    made = with_clock(monkeypatch, {ours: 2.0, theirs: 3.0})
    taken = harness.measure(dataclasses.replace(BRIEF, pairs=4, seconds=60.0), ours, theirs)
    assert taken == [[2.0] * 4, [3.0] * 4]
    assert made[:4] == [ours, ours, theirs, theirs], "warm-up"
    assert made[4:] == [ours, theirs, theirs, ours, ours, theirs, theirs, ours]


def test_a_measurement_ends_in_time_but_not_before_three_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    with_clock(monkeypatch, {ours: 1.0, theirs: 1.0})
    assert len(harness.measure(dataclasses.replace(BRIEF, pairs=50, seconds=0.0), ours, theirs)[0]) == 3


def test_a_machine_that_slows_down_slows_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does so within the second pair: two of three ratios are 1.5, while the ratio of the medians is 15."""
    taken = iter([2.0, 2.0, 3.0, 3.0, 2.0, 3.0, 30.0, 2.0, 20.0, 30.0])
    monkeypatch.setattr(harness, "milliseconds", lambda device, call: next(taken))
    row = harness.compare("x", dataclasses.replace(BRIEF, pairs=3, seconds=60.0), ours, ("y", theirs), Agreement(0.0, 1.0), None)
    assert (row.value, row.baseline_value) == (2.0, 30.0)
    assert row.speedup == pytest.approx(1.5)


@pytest.mark.parametrize("error", [2.0, float("nan"), float("inf")])
def test_wrong_numbers_have_no_speed(monkeypatch: pytest.MonkeyPatch, error: float) -> None:
    made = with_clock(monkeypatch, {ours: 1.0, theirs: 2.0})
    row = harness.compare("x", BRIEF, ours, ("y", theirs), Agreement(error, 1.0), Work(1.0, 1.0))
    assert row.parity == "fail"
    assert (row.value, row.baseline_value, row.speedup, row.ceiling, row.share_of_ceiling) == (None,) * 5
    assert not made, "nothing is timed"
    json.loads(harness.line([row], BRIEF))


def test_the_ceiling_is_the_slower_of_both_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    with_clock(monkeypatch, {ours: 8.0, theirs: 16.0})
    monkeypatch.setattr(harness, "ceilings", lambda setting: harness.Ceilings(bytes_per_ms=10.0, flops_per_ms=100.0))
    for work, least in ((Work(400.0, 1.0), 4.0), (Work(1.0, 20.0), 2.0)):
        row = harness.compare("x", BRIEF, ours, ("y", theirs), Agreement(0.0, 1.0), work)
        assert (row.ceiling, row.share_of_ceiling, row.speedup, row.parity) == (least, least / 8.0, 2.0, "pass")


def test_ceilings_are_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "milliseconds", lambda device, call: 2.0)
    assert harness.copy_rates(BRIEF) == [2**20] * 3, "a buffer read and written in 2 ms"
    assert harness.matrix_rates(BRIEF) == [128**3] * 3, "2 n^3 FLOPs in 2 ms"


def test_spread_is_half_the_quartiles_distance() -> None:
    assert harness.spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(1.0 / 3.0)
    assert harness.spread([7.0]) == 0.0


def test_the_command_prints_a_table_and_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["matmul", "--device", "cpu", "--pairs", "3", "--seconds", "0"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    said = json.loads(last)
    assert said.keys() == {"rows", "machine", "versions", "commit"}
    assert [row.keys() == KEYS for row in said["rows"]] == [True]
    assert said["rows"][0]["case"] == "matmul"
    assert said["rows"][0]["value"] > 0
    assert said["versions"]["torch"] == torch.__version__
    assert len(table) == 2
    assert table[1].startswith("matmul")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["simulator_unett"], "did you mean 'simulator_unet'"),
        (["plann"], "did you mean 'plan'"),
        (["copy", "plan"], "plan has flags of its own"),
        ([], "name a case"),
        (["copy", "--only", "1x1"], "--only 1x1: there are copy"),
        (["copy", "matmul", "--only", "copy,zzz"], "--only zzz: there are copy"),
        (["engines", "--preset", "tiny", "--size", "published"], "--preset tiny and --size published: choose one"),
        (["plan", "--gpus", "0"], "--gpus 0: want at least 1"),
        (["plan", "--judge-bucket", "-1"], "--judge-bucket -1: want at least 1"),
        (["copy", "--device", "tpu9"], "--device tpu9"),
        (["copy", "--threads", "0"], "--threads 0"),
        (["copy", "--pairs", "0"], "--pairs 0: want at least 1"),
        (["copy", "--seconds", "nan"], "--seconds nan: want 0 or more"),
        (["copy", "--seconds", "-1"], "--seconds -1.0: want 0 or more"),
        (["copy", "--pears", "3"], "did you mean '--pairs'"),
    ],
)
def test_mistakes_are_named_in_one_line(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(argv) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert words in said[0]


def test_a_failed_parity_is_the_commands_failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(cases.CASES, "wrong", lambda setting: {"only": lambda: Row("wrong", "eager", None, "ms", "y", parity="fail", note="error 3")})
    assert bench.main(["wrong", "--device", "cpu"]) == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out.splitlines()[-1])["rows"][0]["speedup"] is None
    assert "wrong numbers" in printed.err


# The baseline


def test_the_baseline_equals_ours() -> None:
    """With levels, frames and heads that differ; nothing of the baseline's layout or order is ours."""
    simulator, given = networks.simulator(SMALL, BRIEF), networks.inputs(SMALL, BRIEF, batch=2)
    given["timesteps"] = torch.tensor([3, 700])
    with torch.no_grad():
        one, other = hoisted(simulator.unet, given, SMALL.memory), unhoisted(published.unet_like(simulator.unet), given, SMALL.memory)
        assert relative_error(one(), other()) < 1e-5
        pictures, latents = torch.randn(3, 3, 16, 24), torch.randn(3, 4, 8, 12)
        plain = published.vae_like(simulator.vae)
        posterior = simulator.vae.encode(pictures)
        mean, deviation = plain.encode(pictures)
        assert relative_error(posterior.mean, mean) < 1e-5
        assert relative_error(torch.exp(0.5 * posterior.logvar), deviation) < 1e-5
        assert relative_error(simulator.vae.decode(latents), plain.decode(latents)) < 1e-5


@pytest.mark.parametrize(
    "changes", [{}, {"posterior": "sample", "first_tokens": "decoded", "scale_memory": True}, {"eta": 0.0, "final": "pred_x0"}], ids=str
)
def test_the_published_order_of_work_gives_the_same_rollout(changes: dict[str, Any]) -> None:
    config = dataclasses.replace(SMALL, **changes)
    simulator = networks.simulator(config, BRIEF)
    frame, maps, noise = networks.rollout_inputs(config, BRIEF, 2)
    loop = published.PublishedLoop(simulator, published.unet_like(simulator.unet), published.vae_like(simulator.vae))
    one, other = bench_chunk_loop.rollout(simulator, frame, maps, noise), loop.rollout(frame, maps, noise)
    assert one.shape == other.shape == (1, 8, 16, 24, 3)
    assert (one.int() - other.int()).abs().max() <= 1
    assert (one != other).float().mean() < 0.01
    swapped = bench_chunk_loop.rollout(simulator, frame, maps, noise[::-1])
    assert (swapped.float() - other.float()).abs().mean() > 3 * bench_chunk_loop.LIMITS[torch.bfloat16], "another order of work is seen"


def test_guidance_has_no_baseline() -> None:
    simulator = networks.simulator(dataclasses.replace(SMALL, guidance=2.0), BRIEF)
    with pytest.raises(ValueError, match="guidance"):
        published.PublishedLoop(simulator, published.unet_like(simulator.unet), published.vae_like(simulator.vae))


@pytest.mark.parametrize(
    ("case", "dtype"), [(simulator_unet, torch.float32), (simulator_unet, torch.bfloat16), (chunk_loop, torch.bfloat16), (vae, torch.bfloat16)]
)
def test_it_is_measured_against_float32(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way that a GPU takes: resident bfloat16 weights against float32 ones under autocast."""
    monkeypatch.setattr(networks, "configs", lambda setting: {"16x24": SMALL})
    monkeypatch.setattr(bench_chunk_loop, "CHUNKS", {"tiny": 1})
    setting = dataclasses.replace(BRIEF, dtype=dtype)
    row = next(iter(case(setting).values()))()
    assert row.parity == "pass"
    assert row.speedup is not None
    assert row.speedup > 0
    assert row.ceiling is not None


def test_wrong_weights_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "configs", lambda setting: {"16x24": SMALL})
    like = published.unet_like

    def slightly_wrong(*args: Any) -> published.PublishedUNet:
        network = like(*args)
        network.get_parameter("middle_block.0.temopral_conv.conv4.3.weight").data.mul_(1.5)
        return network

    monkeypatch.setattr(published, "unet_like", slightly_wrong)
    row = simulator_unet(BRIEF)["16x24"]()
    assert row.parity == "fail"
    assert row.value is None


def test_no_random_parameter_is_zero() -> None:
    """Residual branches begin as zeros; left so, they would hide what is wrong in them."""
    simulator = networks.simulator(SMALL, BRIEF)
    assert [name for name, value in simulator.named_parameters() if not value.any()] == []
    assert float(simulator.latent_scale) == pytest.approx(SMALL.latent_scale)
    half = networks.simulator(SMALL, dataclasses.replace(BRIEF, dtype=torch.bfloat16))
    assert {value.dtype for value in half.parameters()} == {torch.bfloat16}
    assert half.latent_scale.dtype == torch.float32


def test_traffic_counts_reads_and_writes() -> None:
    x = torch.zeros(8, 4, device="meta")
    with Traffic() as traffic:
        (x + x).view(4, 8).t()
    assert traffic.bytes == 3 * 8 * 4 * 4


# Where it runs


def test_every_checkout_has_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert harness.commit() == "unknown"

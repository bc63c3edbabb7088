"""worldenv-engine and worldenv-bench engines as a user has them, on the smallest graph of the tiny preset."""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from test_bench_gpu import BRIEF

from worldenv import compiled
from worldenv.benchmarks import engine_rows, gpu
from worldenv.benchmarks.cases import CASES
from worldenv.benchmarks.harness import Setting
from worldenv.cli import engine as command
from worldenv.engines import export, policy_backbone, policy_heads, simulator_unet, simulator_vae
from worldenv.engines.recipe import EngineRecipe
from worldenv.presets import EVAC, LLAVA_VOCAB, OPENVLA_OFT
from worldenv.reflector import flops
from worldenv.reflector.judge import Watching


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


def said(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, dict[str, Any], str]:
    code = command.main(list(argv))
    out, err = capsys.readouterr()
    return code, json.loads(out.splitlines()[-1]) if out else {}, out + err


def test_build_list_verify_and_gc(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ("--store", str(store))
    code, found, text = said(capsys, "build", "--preset", "tiny", "--only", "policy_heads", *where)
    assert code == 0, text
    (row,) = found["rows"]
    assert (row["engine"], row["back_end"], row["precision"], row["passed"]) == ("policy_heads", "onnxruntime", "fp32", True)
    assert re.search(r"policy_heads +onnxruntime +here +fp32 ", text)
    assert row["max_rel_error"] <= row["tolerance"]
    assert "limit 2e-05" in text
    code, found, text = said(capsys, "list", *where)
    assert code == 0
    assert {one["back_end"] for one in found["plans"]} == {"onnxruntime", "graph"}
    assert "passed" in text
    assert said(capsys, "verify", *where)[:2] == (0, {"plans": 2, "damaged": []})
    plan = next(one for one in found["plans"] if one["back_end"] == "onnxruntime")
    kept = store / "plans" / plan["key"] / "parity.json"
    whole = kept.read_text()
    for damage in ("{", "{}", "[]"):
        kept.write_text(damage)
        code, found, text = said(capsys, "list", *where)
        assert (code, next(one["parity"] for one in found["plans"] if one["key"] == plan["key"])) == (0, None)
        assert "parity.json: damaged" in text
    kept.write_text(whole)
    path = store / "plans" / plan["key"] / export.WEIGHTS
    path.write_bytes(path.read_bytes()[:-8])
    code, found, text = said(capsys, "verify", *where)
    assert (code, found["damaged"]) == (1, [plan["key"]])
    assert "weights.safetensors: truncated or damaged" in text
    assert said(capsys, "verify", "--remove", *where)[0] == 1
    assert said(capsys, "verify", *where)[:2] == (0, {"plans": 1, "damaged": []})
    code, found, _ = said(capsys, "gc", "--limit-gb", "1e-9", *where)
    assert (code, len(found["removed"])) == (0, 1)
    assert said(capsys, "list", *where)[1]["plans"] == []


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        ([], 2, "want a command"),
        (["bild"], 2, "want a command"),
        (["build", "--preset", "tyni"], 2, "did you mean 'tiny'"),
        (["build", "--only", "heads,unit"], 2, "--only unit: there are simulator_unet"),
        (["build", "--only", "heads", "--precision", "fp8"], 2, "--precision fp8: is the U-Net's alone, which --only heads leaves out"),
        (["build", "--run", "nowhere"], 2, "no run there"),
        (["build", "--only", "heads", "--back-end", "inductor", "--arch", "sm_100"], 1, "compute capability 10.0"),
        (["list", "--store"], 2, "store"),
        (["list", "--store", "nope"], 2, "--store nope: no store there; build makes one (plans of a run: RUN/engines)"),
        (["verify", "--store", "."], 2, "--store .: no store there"),
        (["gc", "--store", "file"], 2, "--store file: no store there"),
        (["list", "--limit-gb", "nan"], 2, "--limit-gb nan: want a size above 0"),
        (["gc", "--limit-gb", "0"], 2, "--limit-gb 0.0: want a size above 0"),
    ],
)
def test_mistakes_are_one_line(
    argv: list[str], code: int, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    assert command.main([*argv, *(["--store", str(tmp_path)] if argv and argv[0] == "build" else [])]) == code
    out, err = capsys.readouterr()
    assert words in out + err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--back-end", "onnx"], "did you mean 'onnxruntime'"),
        (["--back-end", ","], "back end ','"),
        (["--arch", "hopper"], "--arch hopper: want here alone, or those of GPUs, sm_75 and later, such as sm_80"),
        (["--arch", "sm_90,sm_33", "--back-end", "tensorrt_rtx"], "--arch sm_33: want here alone"),
        (["--arch", ","], "--arch ,: want here alone"),
        (["--limit-gb", "0"], "--limit-gb 0.0: want a size above 0"),
    ],
)
def test_what_a_build_is_for_is_looked_at_before_any_network_is_made(
    argv: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engine_rows, "subject", lambda *_: pytest.fail("networks were made"))
    assert command.main(["build", *argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_a_build_that_is_stopped_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(compiled, "built", stopped)
    assert command.main(["build", "--only", "heads", "--store", str(tmp_path)]) == 130
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_rows_have_what_engines_add_to_the_schema() -> None:
    row = engine_rows.variants(BRIEF)["policy_heads onnxruntime"]()
    assert row.parity == "pass", row.note
    plain = row.plain()
    assert plain["engine"] == "policy_heads"
    assert 0 < plain["max_rel_error"] <= plain["tolerance"]
    assert plain["speedup"] > 0
    assert plain["ceiling"] > 0
    assert set(row.plain()) - {"engine", "max_rel_error", "tolerance"} == {
        "case", "backend", "value", "unit", "baseline", "baseline_value", "speedup", "ceiling", "share_of_ceiling", "parity",
    }  # fmt: skip


def test_a_row_says_what_ran_without_a_cuda_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = engine_rows.measure

    def without(*given: Any) -> Any:
        for _ in range(2):
            warnings.warn("inputs (1, 8) run without a CUDA graph: operation not permitted", RuntimeWarning, stacklevel=2)
        return measured(*given)

    monkeypatch.setattr(engine_rows, "measure", without)
    row = engine_rows.variants(BRIEF)["policy_heads onnxruntime"]()
    assert row.value is not None
    assert row.note.count("inputs (1, 8) run without a CUDA graph: operation not permitted") == 1


def test_an_engine_that_fails_has_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = engine_rows._tiny(BRIEF.device, 4)
    network = dataclasses.replace(subject.networks[4], recipe=dataclasses.replace(subject.networks[4].recipe, tolerance=1e-12))
    monkeypatch.setattr(engine_rows, "_tiny", lambda device, rows: dataclasses.replace(subject, networks=[network]))
    row = engine_rows.variants(BRIEF)["policy_heads onnxruntime"]()
    assert (row.value, row.parity) == (None, "fail")
    assert "FAILED" in row.note


def test_the_gpus_cases_run_at_a_small_size_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The very code of the published sizes: static shapes, a random network made for its row, rows appended by the GPU's own command."""
    tiny = engine_rows._tiny(BRIEF.device, 4).networks
    published = {"policy_heads": (lambda setting, precision: tiny[4], {"batch": 2})}
    monkeypatch.setattr(engine_rows, "PUBLISHED", published)
    setting = dataclasses.replace(BRIEF, size="published")
    gpu._measure(gpu.Part("engines_policy", 60.0, ("engines",), "policy_heads onnxruntime"), setting, tmp_path / "cpu.jsonl")
    (row,) = json.loads((tmp_path / "cpu.jsonl").read_text())["rows"]
    assert (row["engine"], row["parity"]) == ("policy_heads", "pass")


def _recipes_of_a_published_run() -> list[EngineRecipe]:
    """Which take no memory; the U-Net's ranges are those of every size."""
    judge = flops.on_meta(engine_rows._LLAVA_WORDS, LLAVA_VOCAB)
    watching = Watching([flops.INSTRUCTION], 216, 8)
    return [
        simulator_unet.recipe(EVAC), *simulator_vae.recipes(EVAC), policy_backbone.recipe(OPENVLA_OFT), policy_heads.recipe(OPENVLA_OFT),
        *(one.recipe for one in compiled.of_reflector(judge, watching)),
    ]  # fmt: skip


def test_every_published_network_is_measured_and_made_as_its_recipe_says() -> None:
    names = {name.split()[0] for name in engine_rows.PUBLISHED}
    assert names == set(compiled.NAMES)
    assert {"simulator_unet 320x512", "simulator_unet 256x256", "reflector_llm prefill", "reflector_llm appended"} <= set(engine_rows.PUBLISHED)
    variants = CASES["engines"](Setting(torch.device("cpu"), torch.float32, "published"))
    assert "simulator_unet 320x512 inductor" in variants
    small = dict(zip(compiled.NAMES, engine_rows._tiny(BRIEF.device, 4).networks, strict=True))
    for name, (_, lengths) in engine_rows.PUBLISHED.items():
        assert engine_rows.fixed(small[name.split()[0]], lengths).recipe.ranges == {}
    large = {one.name: one for one in _recipes_of_a_published_run()}
    for name, (_, lengths) in engine_rows.PUBLISHED.items():
        for axis, (low, _, high) in large[name.split()[0]].ranges.items():
            assert low <= lengths[axis] <= high, (name, axis)
    network = engine_rows.fixed(small["reflector_llm"], {"row": 1, "new": 40, "old": 0})
    made = network.eager(*network.recipe.example({}))
    assert made[0].shape[1] == 40

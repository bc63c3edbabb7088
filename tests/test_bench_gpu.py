"""`python -m benchmarks.gpu` without a GPU: its parts, their limits, what is resumed, what is skipped; the very code that a GPU runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from worldenv.benchmarks import gpu
from worldenv.benchmarks.gpu import PARTS, Ended, Finished, Part
from worldenv.benchmarks.harness import ROOT, Row, Setting

BRIEF = Setting(torch.device("cpu"), torch.float32, "tiny", pairs=3, seconds=0.0, brief=True)


def says(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def finished(tmp_path: Path, commit: str = "abc", resume: bool = True) -> Finished:
    return Finished(tmp_path / "done.json", commit, resume)


def test_a_part_that_fails_or_hangs_costs_itself_alone(tmp_path: Path) -> None:
    killed, hangs = "import os; os.kill(os.getpid(), 9)", "import time; time.sleep(60)"
    codes = {"good": "", "bad": "raise SystemExit(3)", "killed": killed, "hangs": hangs, "last": ""}
    parts = [Part(name, 1.0 if name == "hangs" else 60.0) for name in codes]
    ended = gpu.run_all(parts, lambda part: says(codes[part.name]), finished(tmp_path))
    assert [(one.name, one.passed) for one in ended] == [("good", True), ("bad", False), ("killed", False), ("hangs", False), ("last", True)]
    assert finished(tmp_path).names == {"good", "last"}


def test_a_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    asked: list[str] = []

    def command(part: Part) -> list[str]:
        asked.append(part.name)
        return says("")

    parts = [Part("a", 60.0), Part("b", 60.0)]
    gpu.run_all(parts[:1], command, finished(tmp_path))
    assert gpu.run_all(parts, command, finished(tmp_path))[0] == Ended("a", True, "finished before")
    assert asked == ["a", "b"]
    for again in (finished(tmp_path, resume=False), finished(tmp_path, commit="def")):
        assert again.names == set()


def test_what_there_is_no_time_for_is_named(tmp_path: Path) -> None:
    ended = gpu.run_all([Part("a", 60.0)], lambda part: says(""), finished(tmp_path), total_s=0.0)
    assert ended == [Ended("a", False, "no time left; --resume goes on here")]
    assert finished(tmp_path).names == set()


def test_rows_are_kept_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from worldenv.benchmarks import cases

    def broken() -> Row:
        raise torch.cuda.OutOfMemoryError("out of memory")

    monkeypatch.setitem(cases.CASES, "x", lambda setting: {"2": broken, "3": lambda: Row("x 3", "eager", 2.0, "ms")})
    monkeypatch.setattr(gpu, "PARTS", (Part("x", 60.0, ("x",)),))
    results = tmp_path / "results"
    for lines in (2, 4):
        assert gpu.main(["--part", "x", "--device", "cpu", "--small", "--results", str(results)]) == 1
        kept = [json.loads(line) for line in (results / "cpu.jsonl").read_text().splitlines()]
        assert len(kept) == lines, "appended"
        assert [one["rows"][0]["case"] for one in kept[-2:]] == ["x 2", "x 3"]
        assert [one["note"] for one in kept[-2:]] == ["OutOfMemoryError: out of memory", ""]
        assert {"rows", "machine", "versions", "commit", "part", "note", "date"} == kept[-1].keys()


def test_wrong_numbers_fail_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from worldenv.benchmarks import cases

    monkeypatch.setitem(cases.CASES, "x", lambda setting: {"1": lambda: Row("x 1", "eager", None, "ms", parity="fail")})
    with pytest.raises(RuntimeError, match="wrong numbers, or none: x 1"):
        gpu.run_part(Part("x", 60.0, ("x",)), BRIEF, tmp_path / "cpu.jsonl")
    assert json.loads((tmp_path / "cpu.jsonl").read_text())["rows"][0]["value"] is None


def test_an_engine_that_cannot_be_built_fails_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from worldenv.benchmarks import cases

    rows = {"1": lambda: Row("x 1", "inductor", None, "ms", note="AOTInductor does not compile it", engine="policy_heads")}
    monkeypatch.setitem(cases.CASES, "x", lambda setting: rows)
    with pytest.raises(RuntimeError, match="wrong numbers, or none: x 1"):
        gpu.run_part(Part("x", 60.0, ("x",)), BRIEF, tmp_path / "cpu.jsonl")
    assert json.loads((tmp_path / "cpu.jsonl").read_text())["note"] == "AOTInductor does not compile it"


def test_engines_at_published_sizes_ask_for_no_environment() -> None:
    """A machine with torch, transformers and onnx alone measures them."""
    code = (
        "import sys\n"
        "for name in ('av', 'mujoco', 'gymnasium', 'tyro', 'diffusers', 'peft'): sys.modules[name] = None\n"
        "import torch\n"
        "from worldenv.benchmarks import cases\n"
        "from worldenv.benchmarks.harness import Setting\n"
        "print(*cases.CASES['engines'](Setting(torch.device('cpu'), torch.float32, 'published')), sep=';')\n"
    )
    done = subprocess.run(says(code), cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "simulator_unet 320x512 inductor" in done.stdout.split(";")


def test_the_whole_command_on_a_cpu(tmp_path: Path) -> None:
    """From the checkout alone, in a process of its own, as make gpu calls it."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--part", "simulator_unet_320x512", "--device", "cpu", "--small", "--results", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "cpu.jsonl").read_text())["rows"][0]
    assert row["parity"] == "pass"
    assert row["speedup"] > 0


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--only", "vea", "--device", "cpu", "--small"], "did you mean"),
        (["--device", "cpu"], "add --small"),
        (["--device", "moon"], "--device moon"),
    ],
)
def test_mistakes_are_named(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(argv) == 2
    assert words in capsys.readouterr().err


def test_parts_are_chosen_by_name_and_the_build_is_always_one() -> None:
    assert gpu.chosen("") == list(PARTS)
    assert [part.name for part in gpu.chosen("vae_256,ceil")] == ["build", "ceilings", "engines_vae_256x256", "vae_256x256"]


def test_every_part_measures_something_that_there_is() -> None:
    from worldenv.benchmarks.cases import CASES

    published = Setting(torch.device("cpu"), torch.float32, "published")
    for part in PARTS:
        for case in part.cases:
            assert any(part.only in variant for variant in CASES[case](published)), part.name


def test_a_missing_package_skips_a_file_by_name(tmp_path: Path) -> None:
    """Any other mistake in a file, and a missing module of our own, is still one."""
    tests = {
        "test_there.py": "import pytest\n@pytest.mark.gpu\ndef test_a(): pass\n",
        "test_needs.py": "import surely_not_installed.part\nimport pytest\n@pytest.mark.gpu\ndef test_a(): pass\n",
        "test_asks.py": "try:\n    import surely_not_either\nexcept ImportError:\n    {}['why']\n",  # what failed first is what is missing
    }
    for name, text in tests.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: x\n")
    call = "pytest.main(['-q', '-rs', '-m', 'gpu', '.'], plugins=[MissingPackages()])"
    code = f"import pytest, sys; from worldenv.benchmarks.gpu import MissingPackages; sys.exit({call})"
    done = subprocess.run(says(code), cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "needs surely_not_installed" in done.stdout
    assert "needs surely_not_either" in done.stdout
    assert "1 passed" in done.stdout
    (tmp_path / "test_own.py").write_text("import worldenv.no_such_room\n")
    done = subprocess.run(says(code), cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode != 0


def test_files_with_gpu_tests_are_found(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_a.py").write_text("@pytest.mark.gpu\n")
    (tmp_path / "tests" / "test_b.py").write_text("\n")
    assert [Path(one).name for one in gpu.gpu_tests(tmp_path)] == ["test_a.py"]
    assert any(one.endswith("test_simulator_size.py") for one in gpu.gpu_tests(ROOT))


def test_no_compiler_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(RuntimeError, match="no C\\+\\+ compiler"):
        gpu.compile_beside(tmp_path)

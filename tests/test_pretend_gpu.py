"""What is marked gpu, on pretended GPUs: on a machine without one, where otherwise nobody would notice a tensor on the wrong device."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.flow.test_whole import FAST
from tests.pretend_gpu import NOT_HERE, ROOT
from worldenv import report

pytestmark = pytest.mark.skipif(bool(NOT_HERE), reason=NOT_HERE)


def pretended(*arguments: str, limit_s: float = 900.0) -> str:
    """What `python -m tests.pretend_gpu` wrote; it must have ended well."""
    command = [sys.executable, "-m", "tests.pretend_gpu", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit_s, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def passed(*arguments: str) -> int:
    """How many tests of these arguments to pytest passed."""
    kernels = ["--kernels"] if "tests/test_kernels.py" in arguments else []
    said = pretended(*kernels, "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *arguments)
    found = re.search(r"(\d+) passed", said)
    assert found, said[-1000:]
    return int(found[1])


@pytest.mark.slow
def test_policy_learner_and_rollouts_on_pretended_gpus() -> None:
    assert passed("tests/test_gpus.py") >= 39


@pytest.mark.slow
def test_simulator_on_a_pretended_gpu() -> None:
    assert passed("tests/test_simulator_size.py", "-k", "rollout_on_a_gpu") == 2


@pytest.mark.slow
def test_kernels_are_called_with_tensors_of_a_pretended_gpu() -> None:
    """By the interpreter; compilers know no pretended GPU."""
    assert passed("tests/test_kernels.py", "-k", "not known_to_autograd") >= 14


@pytest.mark.slow
@pytest.mark.parametrize("part", ["ceilings", "simulator_unet_256x256", "vae_256x256", "chunk_loop_256x256"])
def test_make_gpu_measures_on_a_pretended_gpu(part: str, tmp_path: Path) -> None:
    """Parity against the CPU's order of work included; compilers and kernels need a real one."""
    pretended("worldenv.benchmarks.gpu", "--device", "cuda", "--small", "--part", part, "--results", str(tmp_path))
    (file,) = tmp_path.iterdir()
    rows = [row for line in file.read_text().splitlines() for row in json.loads(line)["rows"]]
    assert rows
    assert {row["parity"] for row in rows} <= {"pass", "none"}


@pytest.mark.slow
@pytest.mark.parametrize("apart", [[], ["--apart", "reflector", "--apart-gpus", "1"]])
def test_the_rollout_bench_on_two_pretended_gpus(apart: list[str]) -> None:
    sizes = ["--rollouts", "8", "--group", "4", "--slots", "4", "--bucket", "2", "--checked", "4", "--limit", "16"]
    (row,) = json.loads(pretended("worldenv.cli.bench", "rollout", "--device", "cuda", "--gpus", "2", *apart, *sizes).splitlines()[-1])["rows"]
    assert row["gpus"] == row["workers"] == 2
    assert row["identical"]
    assert row["sequential_agrees"]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_whole_run_on_one_and_on_two_pretended_gpus(tmp_path: Path) -> None:
    """`worldenv-train --device cuda` to its report, and from LOOP on with two: in its second iteration the copy must have been given weights.
    Then with the reflector on one of them alone.
    """
    records, folders = [], [tmp_path / "1", tmp_path / "2", tmp_path / "apart"]
    for out in folders:
        gpus, again = ("1", []) if out == folders[0] else ("2", ["--from", "loop"])
        if again:
            shutil.copytree(folders[0], out)
        if out == folders[2]:
            again += ["--loop.apart", "reflector", "--loop.apart-gpus", "1"]
        flags = [*FAST, "--device", "cuda", "--gpus", gpus, "--out", str(out), *again]
        assert json.loads(pretended("worldenv.cli.train", *flags, limit_s=700.0).splitlines()[-1])["out"] == str(out)
        iterations = json.loads((out / "stages" / "loop" / "stage.json").read_text())["metrics"]
        records.append(report.comparable({**report.read(out / "report.json"), "iterations": iterations}))
    one, two, apart = records
    assert len(one["iterations"]["history"]) == 2
    assert [record["settings"].pop("gpus") for record in records] == [1, 2, 2]
    assert [record["settings"]["loop"].pop("apart_gpus") for record in records] == [0, 0, 1]
    assert [record["settings"]["loop"].pop("apart") for record in records] == ["none", "none", "reflector"]
    assert not list(report.differences(one, two))
    assert not list(report.differences(one, apart))

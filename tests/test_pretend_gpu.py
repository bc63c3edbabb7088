"""What is marked gpu, on pretended GPUs: on a machine without one, where otherwise nobody would notice a tensor on the wrong device."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.pretend_gpu import ROOT

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


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


def test_policy_learner_and_rollouts_on_pretended_gpus() -> None:
    assert passed("tests/test_gpus.py") >= 16


@pytest.mark.slow
def test_simulator_on_a_pretended_gpu() -> None:
    assert passed("tests/test_simulator_size.py", "-k", "rollout_on_a_gpu") == 2


@pytest.mark.slow
def test_kernels_are_called_with_tensors_of_a_pretended_gpu() -> None:
    """By the interpreter; compilers know no pretended GPU."""
    assert passed("tests/test_kernels.py", "-k", "not known_to_autograd") >= 14


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_whole_run_on_one_and_on_two_pretended_gpus(tmp_path: Path) -> None:
    """`worldenv-train --device cuda`, from demonstrations to the report: LOOP's second iteration acts by weights that the copy was given."""
    records = []
    for gpus in (1, 2):
        out = tmp_path / str(gpus)
        said = pretended(
            "worldenv.cli.train", "--preset", "tiny", "--fast", "--device", "cuda", "--gpus", str(gpus), "--out", str(out), limit_s=700.0
        )
        assert json.loads(said.splitlines()[-1])["out"] == str(out)
        iterations = json.loads((out / "stages" / "loop" / "stage.json").read_text())["metrics"]
        records.append(json.loads((out / "report.json").read_text()) | {"iterations": iterations})
    one, two = (without_times(record) for record in records)
    assert len(one["iterations"]["history"]) == 2
    assert (one["settings"].pop("gpus"), two["settings"].pop("gpus")) == (1, 2)
    assert one == two


def without_times(record: Any) -> Any:
    if isinstance(record, dict):
        return {key: without_times(value) for key, value in record.items() if not re.search("second|rss|_s$|_mb$", key)}
    return [without_times(one) for one in record] if isinstance(record, list) else record

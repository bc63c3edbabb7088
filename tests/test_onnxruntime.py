"""What a call of ONNX Runtime leaves as it was, and how many threads it has."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from test_onnx_forms import CASES, exported
from torch import nn

from worldenv.engines import export, onnxruntime
from worldenv.engines.recipe import Binding, EngineRecipe


def engine(folder: Path) -> onnxruntime.OnnxRuntime:
    """Attention."""
    made = onnxruntime.load(folder, exported(*CASES["plain"], folder), torch.device("cpu"))
    assert isinstance(made, onnxruntime.OnnxRuntime)
    return made


def test_it_sends_nothing_home_and_writes_no_id_of_the_machine(tmp_path: Path) -> None:
    code = "from worldenv.engines import onnxruntime as ours; import onnxruntime; onnxruntime.get_all_providers()"
    kept = {name: value for name, value in os.environ.items() if name not in ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME", "CI")}
    subprocess.run([sys.executable, "-c", code], check=True, env={**kept, "HOME": str(tmp_path)})
    assert not [path for path in tmp_path.rglob("*") if "icrosoft" in str(path)]


def test_a_plan_has_another_name_where_our_operators_are_written_otherwise() -> None:
    """The extension knows what it was made from, whoever forgets to count versions."""
    sources = sorted((Path(__file__).parents[1] / "csrc" / "onnxruntime").glob("*.?pp"))
    assert len(sources) > 4
    hashes = "".join(hashlib.sha256(path.read_bytes()).hexdigest() for path in sources)
    assert onnxruntime.versions()["operators"] == hashlib.sha256(hashes.encode()).hexdigest()


@pytest.mark.parametrize("flushed", [False, True])
def test_a_call_leaves_the_threads_denormals_as_they_were(flushed: bool, tmp_path: Path) -> None:
    made, seen = engine(tmp_path), []

    def call() -> None:
        torch.set_flush_denormal(flushed)
        made(*made.recipe.example())
        seen.append(sys.float_info.min / 2 == 0.0)

    thread = threading.Thread(target=call)  # the state is a thread's own
    thread.start()
    thread.join()
    assert seen == [flushed]


def test_denormals_are_zero_while_it_runs(tmp_path: Path) -> None:
    made = engine(tmp_path)
    q, k, _ = (torch.zeros_like(one) for one in made.recipe.example())
    assert float(made(q, k, torch.full_like(k, 1e-40)).abs().max()) == 0.0
    assert float(made(q, k, torch.full_like(k, 1e-30)).abs().max()) > 0.0


def test_on_more_threads_it_computes_the_same(tmp_path: Path) -> None:
    one = engine(tmp_path)
    two, given = one.on_threads(2), one.recipe.example()
    sessions = [made._session(one.recipe.lengths(given))[0] for made in (one, two)]
    assert [session.get_session_options().intra_op_num_threads for session in sessions] == [1, 2]
    torch.testing.assert_close(two(*given), one(*given))


class Scaled(nn.Module):
    """Rows times what is alike for all of them, and their means."""

    def forward(self, x: torch.Tensor, factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x * factor, x.mean(1)


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
def test_a_batch_is_computed_so_many_rows_at_once(rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = (Binding("x", {"row": (1, 4, 8), "width": 6}), Binding("factor", {"one": 1, "width": 6}))
    recipe = EngineRecipe("toy", inputs, ("y", "mean"), 1e-6, cpu_rows=rows)
    export.to_onnx(Scaled().eval(), recipe, tmp_path)
    made, (x, factor), asked = onnxruntime.load(tmp_path, recipe, torch.device("cpu")), recipe.example(), []
    assert isinstance(made, onnxruntime.OnnxRuntime)
    run = made._run
    monkeypatch.setattr(made, "_run", lambda given: asked.append([len(one) for one in given]) or run(given))
    x = torch.randn(5, 6)
    product, mean = made(x, factor)
    torch.testing.assert_close(product, x * factor)
    torch.testing.assert_close(mean, x.mean(1))
    whole, rest = divmod(5, rows)
    assert asked == [[rows, 1]] * whole + [[rest, 1]] * bool(rest)

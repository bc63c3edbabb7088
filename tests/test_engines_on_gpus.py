"""An engine under CUDA graphs, on a real GPU: other shapes, other weights and other threads reach what was recorded."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch
from small_policy import small_policy

from worldenv import compiled
from worldenv.engines import backend, export, parity
from worldenv.engines.store import Store

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif("WORLDENV_PRETENDED_GPU" in os.environ, reason="compilers know no pretended GPU"),
]
GPU = torch.device("cuda")
BATCHES = (1, 2, 4)


def heads(seed: int) -> compiled.Network:
    """The policy's, on the GPU: float32 at every precision."""
    policy = small_policy(seed=seed)
    policy.network.to(GPU)
    return compiled.of_policy(policy, "bf16")[1]


def recorded(network: compiled.Network) -> list[tuple[torch.Tensor, ...]]:
    return [network.recipe.example({"batch": size}, seed, "cuda") for seed, size in enumerate(BATCHES)]


@pytest.mark.parametrize("name", backend.AUTOMATIC["cuda"])
def test_shapes_weights_and_threads_reach_a_recorded_graph(name: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    if missing := backend.back_end(name).requires():
        pytest.skip(missing)
    network, other = heads(0), heads(1)
    given = recorded(network)
    made = compiled.built(network, name, Store(tmp_path), GPU, given, timed=False)
    assert made.parity is not None
    assert made.parity.passed, made.parity.said
    assert not [one.message for one in recwarn if "CUDA graph" in str(one.message)], "each shape was captured"

    first = [parity.outputs(made.engine(*one)) for one in given]
    for outputs, one in zip(first, given, strict=True):  # replayed now
        for got, want in zip(outputs, parity.outputs(network.eager(*one)), strict=True):
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)

    seen: list[bool] = []

    def ask() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
            for _ in range(20):
                for one, outputs in zip(given, first, strict=True):
                    seen.append(all(torch.equal(a, b) for a, b in zip(parity.outputs(made.engine(*one)), outputs, strict=True)))

    torch.cuda.synchronize()
    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [True] * (4 * 20 * len(BATCHES))

    if name in backend.WITHOUT_REFIT:
        return
    made.engine.refit(export.state(other.plain()))
    assert parity.compare(other.recipe, name, made.engine, other.eager, given).passed
    assert not parity.compare(network.recipe, name, made.engine, network.eager, given).passed
    made.engine.refit(export.state(network.plain()))
    for one, outputs in zip(given, first, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(parity.outputs(made.engine(*one)), outputs, strict=True))

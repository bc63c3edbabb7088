"""What every test needs before anything is imported: threads, Triton's interpreter, the device."""

from __future__ import annotations

import os

import pytest

# A worker's share of the cores, for what it starts as well: on two cores, two workers with two threads each took more than twice as long as with one.
# More than two make no test faster.
_SHARE = len(os.sched_getaffinity(0)) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
os.environ.setdefault("OMP_NUM_THREADS", str(min(max(1, _SHARE), 2)))

import worldenv.cli  # noqa: E402, F401  first: how threads wait is read when torch is loaded

import torch  # noqa: E402  isort: skip

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined, so before worldenv.kernels is imported


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device that kernels are tested on: the GPU where there is one, else the CPU (by Triton's interpreter)."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu or libero are skipped, and counted as skipped, where what they need is not there."""
    gpu, assets = torch.cuda.is_available(), bool(os.environ.get("WORLDENV_LIBERO_ASSETS"))
    for item in items:
        if item.get_closest_marker("gpu") and not gpu:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
        if item.get_closest_marker("libero") and not assets:
            item.add_marker(pytest.mark.skip(reason="needs LIBERO (make libero) and WORLDENV_LIBERO_ASSETS"))

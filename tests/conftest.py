"""What every test needs before anything is imported: threads, Triton's interpreter, the device."""

from __future__ import annotations

import os

import pytest

import worldenv.cli  # noqa: F401  first: how threads wait is read when torch is loaded

import torch  # isort: skip

if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(2)  # are what the smallest machine has; more make no test faster, and several test runs may share a machine

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined, so before worldenv.kernels is imported


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device that kernels are tested on: the GPU where there is one, else the CPU (by Triton's interpreter)."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


_LONGEST = ("test_whole.py", "test_pretend_gpu.py", "test_learns.py", "test_world_model.py", "test_engines.py", "test_recorded.py")
"""Begun first: of processes side by side, none is to begin a long file when the others have ended."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first. Tests marked gpu or libero are skipped, and counted as skipped, where what they need is not there."""
    items.sort(key=lambda item: _LONGEST.index(item.path.name) if item.path.name in _LONGEST else len(_LONGEST))
    gpu, assets = torch.cuda.is_available(), bool(os.environ.get("WORLDENV_LIBERO_ASSETS"))
    for item in items:
        if item.get_closest_marker("gpu") and not gpu:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
        if item.get_closest_marker("libero") and not assets:
            item.add_marker(pytest.mark.skip(reason="needs LIBERO (make libero) and WORLDENV_LIBERO_ASSETS"))

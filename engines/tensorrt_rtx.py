"""Back end tensorrt_rtx: TensorRT for RTX, through the code of `tensorrt`. It builds plans for sm_80, 86, 89 and 120 on any machine."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from worldenv.engines import tensorrt
from worldenv.engines.backend import Engine
from worldenv.engines.recipe import EngineRecipe
from worldenv.engines.store import Store

_NAME = tensorrt.RTX


def requires() -> str | None:
    """tensorrt_rtx, and what exports."""
    return tensorrt.missing_library(_NAME)


def versions() -> dict[str, str]:
    """Of the library and of torch."""
    return tensorrt.versions_of(_NAME)


def architecture(device: torch.device) -> str:
    """Of the GPU. EngineError where there is none."""
    return tensorrt.architecture(device)


def build(module: nn.Module, recipe: EngineRecipe, folder: Path, arch: str, store: Store) -> None:
    """See `backend`; for any `arch` that the library has, on any machine."""
    tensorrt.build_with(_NAME, module, recipe, folder, arch, store)


def load(folder: Path, recipe: EngineRecipe, device: torch.device) -> Engine:
    """See `backend`."""
    architecture(device)
    return tensorrt.TensorRT(_NAME, folder / tensorrt.PLAN, recipe, device)

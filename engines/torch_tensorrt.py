"""Back end torch_tensorrt: Torch-TensorRT, for modules that do not export whole: what it cannot take stays in PyTorch."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from worldenv.engines import export
from worldenv.engines.backend import Engine, compute_capability, only_here
from worldenv.engines.recipe import EngineError, EngineRecipe, said
from worldenv.engines.refit import RefitError, check_shapes
from worldenv.engines.store import Store

_NAME, _PLAN, _PROGRAM = "torch_tensorrt", "plan.ep", "program.pt2"


def _library() -> Any:
    if missing := requires():
        raise EngineError(missing)
    return importlib.import_module(_NAME)


class TorchTensorRT:
    """See `Engine`."""

    back_end = _NAME

    def __init__(self, folder: Path, recipe: EngineRecipe) -> None:
        self.recipe, self._folder = recipe, folder
        self._module = torch.export.load(folder / _PLAN).module()

    @torch.no_grad()
    def __call__(self, *given: torch.Tensor) -> Any:
        """See `Engine`."""
        self.recipe.check(given)
        return self._module(*given)

    @torch.no_grad()
    def refit(self, weights: Mapping[str, torch.Tensor]) -> None:
        """See `Engine`. Torch-TensorRT refits from an exported program: the one that the plan was made from, with these weights."""
        program = torch.export.load(self._folder / _PROGRAM)
        check_shapes(self.recipe.name, program.state_dict, weights)
        for name, tensor in program.state_dict.items():
            tensor.copy_(weights[name])
        try:
            self._module = _library().dynamo.refit_module_weights(self._module, program)
        except (AssertionError, RuntimeError) as error:
            raise RefitError(f"{self.recipe.name}: torch_tensorrt refused the weights: {error}") from error


def requires() -> str | None:
    """torch_tensorrt, and the TensorRT that it was built for."""
    try:
        importlib.import_module(_NAME)
    except Exception as error:  # its import loads libraries, and fails in many ways
        return f"{_NAME}: {said(error)[0]}: pip install torch-tensorrt, with TensorRT"
    return None


def versions() -> dict[str, str]:
    """Of the library and of torch."""
    return {_NAME: str(_library().__version__), "torch": torch.__version__}


def architecture(device: torch.device) -> str:
    """Of the GPU. EngineError where there is none."""
    if device.type != "cuda":
        raise EngineError(f"{_NAME} runs on an NVIDIA GPU, not on {device}")
    return compute_capability(device)


def build(module: nn.Module, recipe: EngineRecipe, folder: Path, arch: str, store: Store) -> None:
    """See `backend`."""
    made = _library()
    only_here(_NAME, arch, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    program = export.traced(module, recipe)
    inputs = [
        made.Input(
            min_shape=recipe.shape(one, 0), opt_shape=recipe.shape(one, 1), max_shape=recipe.shape(one, 2), dtype=recipe.kind_of(one), name=one.name
        )
        for one in recipe.inputs
    ]
    try:
        compiled = made.dynamo.compile(program, inputs=inputs, use_explicit_typing=True, immutable_weights=not recipe.refit, disable_tf32=True)
        made.save(compiled, str(folder / _PLAN), inputs=inputs)
    except Exception as error:  # an operator that it does not take, or a setting: its errors have no base
        raise EngineError(f"{recipe.name}: {_NAME} does not compile it: {said(error)[-1][:300]}") from error
    if recipe.refit:
        torch.export.save(program, folder / _PROGRAM)


def load(folder: Path, recipe: EngineRecipe, device: torch.device) -> Engine:
    """See `backend`."""
    _library()
    return TorchTensorRT(folder, recipe)

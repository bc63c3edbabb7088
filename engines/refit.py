"""New weights into a built engine: all of them, by name, from the pristine base, or an error after which the engine is not used.

Names are compared before the first weight is set: half of a set is worse than none, and not every runtime notices. All are set, not only those
that differ from the export: else a former set shows through (cf. NVIDIA/TensorRT#3628).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Protocol

import torch

from worldenv.engines.recipe import EngineError


class RefitError(EngineError):
    """The engine may hold weights of two sets: discard it, and build or load it anew."""


def check_names(name: str, want: Collection[str], given: Collection[str]) -> None:
    """Raises RefitError, before anything is changed, unless `given` are exactly the names that engine `name` asks for."""
    missing, unknown = sorted(set(want) - set(given)), sorted(set(given) - set(want))
    if missing or unknown:
        raise RefitError(f"{name}: refit: {len(given)} weights for {len(want)}: missing {missing[:3]}, unknown {unknown[:3]}; nothing was changed")


def check_shapes(name: str, want: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> None:
    """As `check_names`, of shapes too."""
    check_names(name, want.keys(), given.keys())
    for one, tensor in want.items():
        if given[one].shape != tensor.shape:
            raise RefitError(f"{name}: weight {one} is {tuple(given[one].shape)}, the engine's {tuple(tensor.shape)}; nothing was changed")


class Refitter(Protocol):
    """What is used of tensorrt.Refitter."""

    def get_all_weights(self) -> list[str]: ...
    def set_named_weights(self, name: str, weights: Any) -> bool: ...
    def get_missing_weights(self) -> list[str]: ...
    def refit_cuda_engine(self) -> bool: ...


def refit_tensorrt(name: str, refitter: Refitter, weights: Mapping[str, Any]) -> None:
    """Swap all `weights` (TensorRT's name -> trt.Weights) into an idle engine, or RefitError.

    On False, part of the engine may be new (NvInferRuntime.h, IRefitter::refitCudaEngine).
    """
    check_names(name, refitter.get_all_weights(), weights.keys())
    for one, value in weights.items():
        if not refitter.set_named_weights(one, value):
            raise RefitError(f"{name}: TensorRT refused weight {one}; part of the engine may be new")
    if left := refitter.get_missing_weights():
        raise RefitError(f"{name}: TensorRT still misses {sorted(left)[:3]}; part of the engine may be new")
    if not refitter.refit_cuda_engine():
        raise RefitError(f"{name}: TensorRT refused to refit; part of the engine may be new")

"""FP8 (e4m3) for the U-Net, opt-in, by a quantiser that the user has: NVIDIA's ModelOpt, or torchao for Inductor. Nothing of it is written here.

Weights and activations of linear layers become e4m3 with one scale per tensor. ModelOpt's scales of activations are those seen on recorded inputs
(calibration); torchao's are measured anew at every call. Norms, softmax and what `recipe.wide` names stay as they are. The engine's limit is the
recipe's own, an order wider than bfloat16's.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from worldenv.engines.recipe import EngineError, EngineRecipe

QUANTISERS = {"tensorrt": "modelopt", "tensorrt_rtx": "modelopt", "torch_tensorrt": "modelopt", "inductor": "torchao"}
"""Whose layers each back end takes. The others have no FP8."""
_PACKAGES = {"modelopt": "nvidia-modelopt", "torchao": "torchao"}


def quantiser(back_end: str) -> str:
    """The one of `back_end`. EngineError says in one line what is needed."""
    name = QUANTISERS.get(back_end)
    if name is None:
        raise EngineError(f"fp8: {back_end} has none: take {', '.join(QUANTISERS)}; or precision bf16")
    if importlib.util.find_spec(name) is None:
        raise EngineError(
            f"fp8: {back_end} wants {name}, which is not installed: pip install {_PACKAGES[name]}; it runs on GPUs from sm_89 on; "
            "or take precision bf16"
        )
    return name


def quantised(module: nn.Module, recipe: EngineRecipe, back_end: str, recorded: Sequence[Sequence[torch.Tensor]] = ()) -> nn.Module:
    """`module`, which is in bfloat16, with its linear layers in e4m3 as `back_end` takes them; changed in place.

    ModelOpt calibrates on `recorded` inputs of real rollouts; without these on random ones, which are good for building and for nothing else.
    EngineError as `quantiser`.
    """
    if quantiser(back_end) == "torchao":
        torchao: Any = importlib.import_module("torchao.quantization")
        torchao.quantize_(module, torchao.Float8DynamicActivationFloat8WeightConfig())
        return module
    quantization: Any = importlib.import_module("modelopt.torch.quantization")
    given = [[one.to(recipe.kind_of(binding)) for binding, one in zip(recipe.inputs, call, strict=True)] for call in recorded]
    given = given or [list(recipe.example(seed=seed)) for seed in range(2)]

    def calibrate(quantising: nn.Module) -> None:
        with torch.no_grad():
            for one in given:
                quantising(*one)

    made: nn.Module = quantization.quantize(module, quantization.FP8_DEFAULT_CFG, calibrate)
    return made

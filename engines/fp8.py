"""FP8 (e4m3) for the U-Net, opt-in, by a quantiser that the user has: torchao, or NVIDIA's ModelOpt. Nothing of it is written here.

Weights and activations of linear layers become e4m3 with one scale per tensor; activations are scaled as they were seen on recorded inputs
(calibration). Norms, softmax and what `recipe.wide` names stay as they are. The engine's limit is the recipe's own, an order wider than bfloat16's.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from worldenv.engines.recipe import EngineError, EngineRecipe

QUANTISERS = ("modelopt", "torchao")


def quantiser() -> str:
    """The first of QUANTISERS that is installed. EngineError says in one line what is needed."""
    for name in QUANTISERS:
        if importlib.util.find_spec(name) is not None:
            return name
    raise EngineError(
        "fp8: neither modelopt nor torchao is installed: pip install nvidia-modelopt (for tensorrt) or torchao (for inductor); it runs on "
        "GPUs from sm_89 on; or take precision bf16"
    )


def quantised(module: nn.Module, recipe: EngineRecipe, recorded: Sequence[Sequence[torch.Tensor]] = ()) -> nn.Module:
    """`module`, which is in bfloat16, with its linear layers in e4m3, calibrated on `recorded` inputs of real rollouts; changed in place.

    Without recorded inputs random ones are taken, which are good for building and for nothing else. EngineError as `quantiser`.
    """
    name = quantiser()
    given = [[one.to(recipe.kind_of(binding)) for binding, one in zip(recipe.inputs, call, strict=True)] for call in recorded]
    given = given or [list(recipe.example(seed=seed)) for seed in range(2)]
    if name == "modelopt":
        quantization: Any = importlib.import_module("modelopt.torch.quantization")

        def calibrate(quantising: nn.Module) -> None:
            with torch.no_grad():
                for one in given:
                    quantising(*one)

        made: nn.Module = quantization.quantize(module, quantization.FP8_DEFAULT_CFG, calibrate)
        return made
    torchao: Any = importlib.import_module("torchao.quantization")
    torchao.quantize_(module, torchao.Float8DynamicActivationFloat8WeightConfig())
    return module

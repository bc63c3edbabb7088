"""Back end eager: the module itself, as PyTorch runs it. It judges the others, and is what is left where none of them passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from worldenv.engines.backend import Engine, compute_capability
from worldenv.engines.recipe import EngineError, EngineRecipe
from worldenv.engines.store import Store


class Eager:
    """See `Engine`. A module that trains is used as it is: then its weights are always the newest."""

    back_end = "eager"

    def __init__(self, module: Callable[..., Any], recipe: EngineRecipe) -> None:
        self.recipe, self.module = recipe, module

    @torch.no_grad()
    def __call__(self, *given: torch.Tensor) -> Any:
        """See `Engine`."""
        return self.module(*given)

    def refit(self, weights: Mapping[str, torch.Tensor]) -> None:
        """EngineError: the weights are the network's own."""
        raise EngineError(f"{self.recipe.name}: eager has no weights to exchange; it runs the module itself")


def requires() -> str | None:
    """Nothing."""
    return None


def versions() -> dict[str, str]:
    """Of torch."""
    return {"torch": torch.__version__}


def architecture(device: torch.device) -> str:
    """Where it runs."""
    return compute_capability(device)


def build(module: nn.Module, recipe: EngineRecipe, folder: Path, arch: str, store: Store) -> None:
    """EngineError: there is no plan."""
    raise EngineError(f"{recipe.name}: eager has no plan to build; it runs the module itself")


def load(folder: Path, recipe: EngineRecipe, device: torch.device) -> Engine:
    """EngineError: there is no plan."""
    raise EngineError(f"{recipe.name}: eager has no plan to load; it runs the module itself")

"""policy_heads: hiddens of the action slots to location and log-scale of the actions' density. Float32 at every precision."""

from __future__ import annotations

from worldenv.config import PolicyConfig
from worldenv.engines.recipe import Binding, EngineRecipe, Range
from worldenv.nouns import ACTION_DIM

NAME = "policy_heads"
TOLERANCE = 2e-5


def recipe(config: PolicyConfig, batch: Range = (1, 4, 32)) -> EngineRecipe:
    """For a policy of this size."""
    hidden = Binding("hidden", {"batch": batch, "slot": ACTION_DIM * config.chunk, "width": config.llama.width}, "fp32")
    return EngineRecipe(NAME, (hidden,), ("mu", "beta"), TOLERANCE, "fp32", refit=True, fixed={"scale_form": config.scale_form})

"""reflector_llm: new tokens that follow old ones, whose keys and values are given, to hiddens and the new tokens' keys and values.

A prefill where nothing is old (old = 0), an appended chunk where a trunk is.
"""

from __future__ import annotations

from worldenv.config import ReflectorConfig
from worldenv.engines.recipe import Binding, EngineRecipe, Precision, Range

NAME = "reflector_llm"
TOLERANCE = {"fp32": 2e-5, "bf16": 5e-2, "fp8": 5e-2}


def recipe(config: ReflectorConfig, row: Range, new: Range, old: Range, precision: Precision = "fp32") -> EngineRecipe:
    """For a reflector of this size: `row` sequences, each of `new` tokens behind `old` ones. How many there are is the sampler's, see `compiled`."""
    kept: Precision = "bf16" if precision == "fp8" else precision
    head = config.width // config.heads
    inputs = (
        Binding("embedding", {"row": row, "new": new, "width": config.width}),
        Binding("sees_old", {"row": row, "new": new, "old": old}, "bool"),
        Binding("sees_new", {"row": row, "new": new, "new'": new}, "bool"),
        Binding("position", {"row": row, "new": new}, "int64", values=(0, 64)),
        Binding("past", {"layer": config.layers, "pair": 2, "row": row, "kv_head": config.kv_heads, "old": old, "channel": head}),
    )
    return EngineRecipe(NAME, inputs, ("hidden", "fresh"), TOLERANCE[precision], kept, wide=("norm", "input_layernorm", "post_attention_layernorm"))

"""policy_backbone: a query of OpenVLA-OFT to the hiddens of its action slots. Its weights change with every update of LOOP."""

from __future__ import annotations

from worldenv.config import PolicyConfig
from worldenv.engines.recipe import Binding, EngineRecipe, Precision, Range

NAME = "policy_backbone"
TOLERANCE = {"fp32": 2e-5, "bf16": 5e-2, "fp8": 5e-2}


def recipe(config: PolicyConfig, precision: Precision = "fp32", batch: Range = (1, 4, 32), prompt: Range = (4, 16, 64)) -> EngineRecipe:
    """For a policy of this size; `prompt` tokens from <s> to 29871."""
    kept: Precision = "bf16" if precision == "fp8" else precision
    inputs = (
        Binding("pixels", {"batch": batch, "channel": 6 * config.images, "height": config.image, "width": config.image}, "fp32"),
        Binding("ids", {"batch": batch, "prompt": prompt}, "int64", values=(0, config.llama.vocab)),
        Binding("lengths", {"batch": batch}, "int64", values=(max(2, prompt[0]), prompt[0] + 1)),
        Binding("proprio", {"batch": batch, "value": config.proprio}, "fp32"),
    )
    return EngineRecipe(
        NAME, inputs, ("hidden",), TOLERANCE[precision], kept, refit=True,
        wide=("norm", "norm1", "norm2", "input_layernorm", "post_attention_layernorm"), fixed={"attention": config.attention},
    )  # fmt: skip

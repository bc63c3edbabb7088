"""reflector_vision: frames to projected, pooled features. Frames do not see each other, so one frame is one row."""

from __future__ import annotations

from worldenv.config import ReflectorConfig
from worldenv.engines.recipe import Binding, EngineRecipe, Precision, Range

NAME = "reflector_vision"
TOLERANCE = {"fp32": 2e-5, "bf16": 3e-2, "fp8": 3e-2}


def recipe(config: ReflectorConfig, precision: Precision = "fp32", frame: Range = (1, 8, 32)) -> EngineRecipe:
    """For a reflector of this size; its own function passes 32 frames at most."""
    kept: Precision = "bf16" if precision == "fp8" else precision
    pixels = Binding("pixels", {"frame": frame, "colour": 3, "height": config.image, "width": config.image}, spread=0.5)
    return EngineRecipe(NAME, (pixels,), ("features",), TOLERANCE[precision], kept, wide=("layer_norm1", "layer_norm2"))

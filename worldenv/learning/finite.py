"""A loss that is not finite ends a stage at once, with the name of what to lower."""

from __future__ import annotations

import math

import torch


def finite(loss: torch.Tensor | float, what: str, step: int, cure: str) -> float:
    """`loss` as a number. FloatingPointError where it is not finite: `what` is learned, at which `step`, and the setting to lower."""
    value = float(loss.detach() if isinstance(loss, torch.Tensor) else loss)
    if not math.isfinite(value):
        raise FloatingPointError(f"{what}: loss is {value} at step {step}; lower {cure}")
    return value

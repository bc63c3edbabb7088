"""What plots are drawn from beside report.json, and what a plot is when it is drawn. Matplotlib is not needed to know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Figures:
    """What plots need and report.json does not hold. Either of score and success alone is refused."""

    score: NDArray[np.floating] | None = None
    """(n,) in [0, 1]: the reflector on held-out frames."""
    success: NDArray[np.bool_] | None = None
    """(n,): whether the predicate held at these frames."""
    curves: Mapping[str, NDArray[np.floating]] = field(default_factory=lambda: MappingProxyType({}))
    """Training curves by title: (m, 2) float, optimiser step and loss."""

    def __post_init__(self) -> None:
        if (self.score is None) != (self.success is None):
            raise ValueError("Figures: score and success come together")
        if self.score is not None and self.success is not None and (self.score.ndim != 1 or self.score.shape != self.success.shape):
            raise ValueError(f"Figures: score {self.score.shape}, success {self.success.shape}, want (n,) both")
        if self.score is not None and not ((self.score >= 0) & (self.score <= 1)).all():
            raise ValueError("Figures: scores outside 0 .. 1")
        for title, curve in self.curves.items():
            if curve.ndim != 2 or curve.shape[1] != 2 or not len(curve):
                raise ValueError(f"Figures: curve {title!r} {curve.shape}, want (m, 2), step and loss")


@dataclass(frozen=True)
class Plot:
    """One finished plot."""

    name: str
    """Its file name, without an ending."""
    title: str
    caption: str
    inline: str
    """An <svg> element without identifiers that could clash, links or colours of its own."""
    svg: bytes
    """A file that stands alone."""
    png: bytes

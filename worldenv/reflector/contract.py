"""What a reflector is to the rest: frames in, a success score for each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from worldenv.config import ReflectorConfig


class Reflector(Protocol):
    """Scores R(o_1:t, g) for every new frame t of a growing video. What it remembers is per rollout. Frames may be on any device."""

    def begin(self, instruction: Sequence[str], frame: torch.Tensor) -> list[Any]:
        """Watches of B videos that start at `frame` (B, H, W, 3) uint8."""
        ...

    def judge(self, watch: Sequence[Any], frames: torch.Tensor) -> tuple[torch.Tensor, list[Any]]:
        """Scores (B, K) float32 in [0, 1] after each of the new `frames` (B, K, H, W, 3) uint8, and new watches.

        Nothing is changed in place: a watch can be judged again, with the same frames or others. Videos of one batch may have different
        lengths, and a score depends on its own video alone.
        """
        ...


def scored(
    reflector: Reflector, instruction: Sequence[str], first: torch.Tensor, later: torch.Tensor, chunk: int, until: float = math.inf
) -> torch.Tensor:
    """Scores (B, T) float32 on the CPU of B whole videos, `first` (B, H, W, 3) and `later` (B, T, H, W, 3) uint8, after each step but the first.

    `chunk` frames at a time, as in a rollout: what a reflector computes is then the same, and so is what it can remember in between. A video is
    judged up to the chunk in which a score is above `until`; NaN after that.
    """
    score = torch.full(later.shape[:2], math.nan)
    rows, watch = torch.arange(len(later)), reflector.begin(instruction, first)
    for at in range(0, later.shape[1], chunk):
        part, watch = reflector.judge(watch, later[rows, at : at + chunk])
        score[rows, at : at + chunk] = part.cpu()
        open_still = torch.nonzero(~(part.cpu() > until).any(1))[:, 0]
        rows, watch = rows[open_still], [watch[i] for i in open_still.tolist()]
        if not len(rows):
            break
    return score


class Judge(Reflector, Protocol):
    """A reflector that says at which score it ends a rollout: `config.threshold`."""

    @property
    def config(self) -> ReflectorConfig:
        """What it was made with."""
        ...

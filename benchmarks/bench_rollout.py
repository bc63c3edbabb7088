"""Rollouts of a policy in an imagined world."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from worldenv.world import ImaginedWorld, Made

THRESHOLD = 0.5


class DrawnEnds(ImaginedWorld):
    """An imagined world whose rollouts end at steps that were drawn, whatever random weights say; its networks are asked all the same."""

    def __init__(self, ends: Mapping[int, int], *imagined: Any) -> None:
        """`ends`: last step of each rollout, from 1 on, by its number; beyond the limit, it is not stopped."""
        super().__init__(*imagined)
        self._ends = ends

    def judge(self, watches: Sequence[Any], made: Sequence[Made]) -> tuple[torch.Tensor, list[Any]]:
        """See `World.judge`: scores up to THRESHOLD, which still tell the network's apart; above it at the end."""
        score, after = super().judge(watches, made)
        shown = THRESHOLD * score
        for i, one in enumerate(made):
            at = self._ends[one.after.number] - 1 - (one.after.chunk - 1) * score.shape[1]
            if 0 <= at < score.shape[1]:
                shown[i, at] = (1 + THRESHOLD) / 2 + shown[i, at] / 4
        return shown, after

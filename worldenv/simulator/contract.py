"""What a world simulator is to the rest: memory and the next path in, the next frames and new memory out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from worldenv.nouns import ActionMap


class Simulator(Protocol):
    """Imagines K frames at a time. Memories are per rollout, so a batch may mix rollouts at different chunks."""

    @property
    def chunk(self) -> int:
        """Frames per call (K)."""
        ...

    def noise_shape(self) -> tuple[int, ...]:
        """Shape of the standard normal noise that one rollout needs for one chunk; its first axis is the draw (initial, then each step)."""
        ...

    def begin(self, frame: torch.Tensor) -> list[Any]:
        """Memories of B rollouts that start at `frame` (B, H, W, 3) uint8."""
        ...

    def imagine(self, memory: Sequence[Any], action_map: ActionMap, noise: torch.Tensor) -> tuple[torch.Tensor, list[Any]]:
        """The next frames (B, K, H, W, 3) uint8 of B rollouts, and their new memories; nothing is changed in place.

        `noise` (B, *noise_shape()) float32, standard normal: all randomness comes from outside.
        """
        ...

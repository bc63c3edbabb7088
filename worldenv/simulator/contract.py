"""What a world simulator is to the rest: memory and the next path in, the next frames and new memory out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from worldenv.nouns import ActionMap


class Simulator(Protocol):
    """Imagines K frames at a time: a chunk begins, takes `steps` denoising steps, and is finished.

    Memories and chunks under way are per rollout, so a batch may mix rollouts at different chunks and steps. Nothing is changed in place.
    """

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

    @property
    def steps(self) -> int:
        """Denoising steps of a chunk."""
        ...

    def begin_chunk(self, memory: Sequence[Any], action_map: ActionMap, noise: torch.Tensor) -> list[Any]:
        """Chunks under way of B rollouts: all that is constant over their steps. `noise` (B, *noise_shape()) as in `imagine`."""
        ...

    def step(self, chunks: Sequence[Any]) -> list[Any]:
        """`chunks` after one more denoising step of each."""
        ...

    def finish_chunk(self, chunks: Sequence[Any]) -> tuple[torch.Tensor, list[Any]]:
        """Frames and memories as `imagine` gives them, of chunks that are through all steps."""
        ...

    def imagine(self, memory: Sequence[Any], action_map: ActionMap, noise: torch.Tensor) -> tuple[torch.Tensor, list[Any]]:
        """The next frames (B, K, H, W, 3) uint8 of B rollouts, and their new memories: all of the above at once.

        `noise` (B, *noise_shape()) float32, standard normal: all randomness comes from outside.
        """
        ...

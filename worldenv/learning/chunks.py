"""Demonstrations as a policy learns from them: what was seen, and the K commands that came next."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from worldenv.data.episode import Episode
from worldenv.nouns import Observation
from worldenv.policy.processing import Statistics
from worldenv.robots.contract import Robot


class Chunks:
    """Every chunk start of some episodes, by index.

    A start is an observation that K recorded commands follow, so the last K - 1 commands of an episode start none (the published rule): a
    demonstration should go on for K - 1 steps after success, or what to do near the end is never shown.
    """

    def __init__(self, episodes: Sequence[Episode], robot: Robot, statistics: Statistics, chunk: int) -> None:
        """`chunk` is K. ValueError where no episode has K commands."""
        self._frames = [episode.frame for episode in episodes]
        self._instructions = [episode.instruction for episode in episodes]
        self._proprio = [robot.proprio(episode.pose, episode.gripper) for episode in episodes]
        self._target = [statistics.to_training(torch.from_numpy(episode.command)) for episode in episodes]
        self._start = [(e, t) for e, target in enumerate(self._target) for t in range(len(target) - chunk + 1)]
        self._chunk = chunk
        if not self._start:
            raise ValueError(f"chunks: none of {len(episodes)} episodes has {chunk} commands; collect longer demonstrations")

    def __len__(self) -> int:
        return len(self._start)

    def take(self, index: NDArray[np.int64]) -> tuple[Observation, torch.Tensor]:
        """What was seen at the starts `index` (B,), and the actions that came next (B, K, 7) float32, normalised."""
        starts = [self._start[i] for i in index.tolist()]
        observation = Observation(
            torch.from_numpy(np.stack([self._frames[e][t] for e, t in starts])),
            torch.from_numpy(np.stack([self._proprio[e][t] for e, t in starts])),
            tuple(self._instructions[e] for e, _ in starts),
        )
        return observation, torch.stack([self._target[e][t : t + self._chunk] for e, t in starts])

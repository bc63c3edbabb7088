"""A policy without a network, for tests of what surrounds policies: it pushes toward where the instruction's puck usually stands."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch

from worldenv.nouns import ACTION_DIM, ActionChunk, Observation

SIDE = {"red": -0.10, "blue": 0.0, "yellow": 0.10}


class Pusher:
    """Half of the time it reaches its puck. Each row of a batch is answered alone, bit for bit."""

    chunk = 8

    def __init__(self) -> None:
        self.scale_factor = 1.0
        self.batches: list[int] = []
        self.factors: list[float] = []

    def act(self, observation: Observation, uniform: torch.Tensor | None = None) -> ActionChunk:
        """Sidewise first, then forward; `uniform` adds up to 0.3 times the factor."""
        self.batches.append(len(observation.instruction))
        self.factors.append(self.scale_factor)
        place = observation.proprio[:, :3].double()
        seen = observation.frame.double().mean(dim=(1, 2, 3)) / 255  # a policy that looks: a wrong frame changes its answer
        side = torch.tensor([next(y for c, y in SIDE.items() if c in text) for text in observation.instruction]).double() - place[:, 1]
        mu = torch.zeros(len(side), self.chunk, ACTION_DIM, dtype=torch.float64)
        mu[..., 0] = torch.where(side.abs() < 0.03, 1.0, 0.0)[:, None]
        mu[..., 1] = ((side * 14).clip(-1, 1) + 0.01 * (seen - 0.5))[:, None]
        mu[..., 2] = ((0.025 - place[:, 2]) * 10).clip(-1, 1)[:, None]
        mu[..., 6] = 1.0
        action = mu if uniform is None else mu + 0.3 * self.scale_factor * (2 * uniform - 1)
        flat = torch.zeros(mu.shape[:2])
        return ActionChunk(mu.float(), torch.zeros_like(mu).float(), action.float(), flat, action.clip(-1, 1).float())


THRESHOLD = 0.5


class Onlooker:
    """A reflector that scores by where the red of the picture is, and by how many frames it saw: wrong frames or watches change its scores."""

    config = SimpleNamespace(threshold=THRESHOLD)

    def begin(self, instruction, frame):
        return [(0, text) for text in instruction]

    def judge(self, watch, frames):
        pictures = frames.numpy().astype(float)
        rows = np.arange(pictures.shape[2])[None, None, :, None]
        scores = []
        for (seen, text), video in zip(watch, pictures, strict=True):
            colour = {"red": [1, -1, -1], "blue": [-1, -1, 1], "yellow": [0.5, 0.5, -1]}[text.split()[2]]
            spot = np.clip(video @ np.array(colour) - 60, 0, None)
            low = (spot * rows[0]).sum(axis=(1, 2)) / np.maximum(spot.sum(axis=(1, 2)), 1e-9)
            scores.append(1 / (1 + np.exp(-(low - 37))) * (0.98 + 0.001 * (seen + np.arange(len(video)))))
        return torch.tensor(np.array(scores), dtype=torch.float32), [(seen + frames.shape[1], text) for seen, text in watch]

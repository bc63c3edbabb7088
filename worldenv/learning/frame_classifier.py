"""Stage reward with `reward.judge` "classifier": the baseline learns the same labels, from the labelled frame alone (worldenv.reflector.classifier).

Batches are drawn as for LLaVA (`reward_head.Labelled`): as many successes, and half of the frames as the simulator draws them. It is measured by the
same `reward_head.measure`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from worldenv import noise
from worldenv.checkpoint import Savepoint
from worldenv.config import RewardConfig
from worldenv.data.episode import Episode
from worldenv.learning.reward_head import Labelled, descend
from worldenv.reflector.classifier import ClassifierReflector


def train_classifier(
    reflector: ClassifierReflector, episodes: Sequence[Episode], config: RewardConfig, seed: int, savepoint: Savepoint,
    drawn: Sequence[NDArray[np.uint8]] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Train `reflector` in place on `episodes` (training ones only); a killed run goes on from `savepoint`.

    Returns metrics. FloatingPointError where the loss is not finite; ValueError for an instruction that it does not know.
    """
    moments = Labelled(episodes, drawn)
    number = torch.tensor(reflector.numbers([episode.instruction for episode in episodes]))
    network, device = reflector.network, reflector.device

    def loss_at(step: int) -> torch.Tensor:
        batch, label = moments.draw(seed, noise.Stream.BACKBONE, step, config.classifier_batch, config.positives)
        frames = torch.from_numpy(np.stack([moments.video(e, bool(other))[t] for e, t, other in batch.tolist()]))
        logit = reflector.logit(frames, number[batch[:, 0]])
        return nn.functional.binary_cross_entropy_with_logits(logit, torch.from_numpy(label).to(device))

    losses = descend(network, loss_at, config.classifier_steps, config.classifier_lr, "classifier", "reward.classifier_lr", savepoint)
    reflector.freeze()
    return {
        "classifier_steps": config.classifier_steps, "classifier_loss": float(np.mean(losses[-50:])), "train_episodes": len(episodes),
        "train_frames": len(moments), "train_successes": moments.successes, "saw_drawn_frames": drawn is not None,
        "parameters": sum(p.numel() for p in network.parameters()),
    }  # fmt: skip

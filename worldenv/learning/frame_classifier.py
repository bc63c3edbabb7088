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

from worldenv import console, noise
from worldenv.checkpoint import Savepoint
from worldenv.config import RewardConfig
from worldenv.data.episode import Episode
from worldenv.learning.reward_head import Labelled, finite
from worldenv.learning.sft import one_cycle
from worldenv.reflector.classifier import ClassifierReflector

_GRAD_CLIP = 1.0


def train_classifier(
    reflector: ClassifierReflector, episodes: Sequence[Episode], config: RewardConfig, seed: int, savepoint: Savepoint,
    drawn: Sequence[NDArray[np.uint8]] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Train `reflector` in place on `episodes` (training ones only); a killed run goes on from `savepoint`.

    Returns metrics. FloatingPointError where the loss is not finite; ValueError for an instruction that it does not know.
    """
    moments = Labelled(episodes, drawn)
    number = torch.tensor(reflector.numbers([episode.instruction for episode in episodes]))
    network, device = reflector.network.train().requires_grad_(True), reflector.device
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.classifier_lr, weight_decay=0.01)
    first, losses = 0, []
    if kept := savepoint.load():
        network.load_state_dict(kept["weights"])
        optimizer.load_state_dict(kept["optimizer"])
        first, losses = kept["step"], kept["losses"]
    for step in (bar := console.track(first, config.classifier_steps, "classifier")):
        batch, label = moments.draw(seed, noise.Stream.BACKBONE, step, config.classifier_batch, config.positives)
        frames = torch.from_numpy(np.stack([moments.video(e, bool(other))[t] for e, t, other in batch.tolist()]))
        logit = reflector.logit(frames, number[batch[:, 0]])
        loss = nn.functional.binary_cross_entropy_with_logits(logit, torch.from_numpy(label).to(device))
        losses.append(finite(loss, step, "classifier-lr"))
        for group in optimizer.param_groups:
            group["lr"] = one_cycle(step, config.classifier_steps, config.classifier_lr)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(network.parameters(), _GRAD_CLIP)
        optimizer.step()
        bar.note(loss=float(np.mean(losses[-20:])))
        if savepoint.due():
            savepoint.save({"step": step + 1, "weights": dict(network.state_dict()), "optimizer": optimizer.state_dict(), "losses": losses})
    reflector.freeze()
    savepoint.clear()
    return {
        "classifier_steps": config.classifier_steps, "classifier_loss": float(np.mean(losses[-50:])), "train_episodes": len(episodes),
        "train_frames": len(moments), "train_successes": moments.successes, "saw_drawn_frames": drawn is not None,
        "parameters": sum(p.numel() for p in network.parameters()),
    }  # fmt: skip

"""Stage scale: the scale head learns how far mu is off, by the Laplace likelihood; everything else is frozen (paper, appendix B.1, Eq. 8).

The trunk is frozen, so its hiddens and mu are computed once. The density is the one that acts later, floor and ceiling included and factor 1:
beyond them beta has nothing to gain.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from worldenv import console, noise
from worldenv.checkpoint import Savepoint
from worldenv.config import ScaleConfig
from worldenv.data.episode import Episode
from worldenv.learning.chunks import Chunks
from worldenv.learning.finite import finite
from worldenv.policy import laplace
from worldenv.policy.openvla_oft import OpenVLAOFT
from worldenv.robots.contract import Robot

_AT_ONCE = 32  # queries per forward pass of the trunk


@torch.no_grad()
def _seen(policy: OpenVLAOFT, chunks: Chunks) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of every chunk start: hiddens (N, 7 K, width), mu and target (N, K, 7)."""
    parts = []
    for start in range(0, len(chunks), _AT_ONCE):
        observation, target = chunks.take(np.arange(start, min(start + _AT_ONCE, len(chunks))))
        hidden = policy.hidden(policy.query(observation))
        parts.append((hidden, policy.network.action_head(hidden), target.to(policy.device)))
    hidden, mu, target = (torch.cat(part) for part in zip(*parts, strict=True))
    return hidden, mu, target


def fit_scale_head(
    policy: OpenVLAOFT, episodes: Sequence[Episode], robot: Robot, config: ScaleConfig, seed: int, savepoint: Savepoint
) -> dict[str, float]:
    """Train `policy`'s scale head in place on all chunk starts of `episodes`.

    Returns JSON-ready metrics: mean NLL before and after [nat per dimension], and the median scale. FloatingPointError where the loss is
    not finite; ValueError for a policy of tokens.
    """
    policy.config.want_laplace("the scale head's fit")
    hidden, mu, target = _seen(policy, Chunks(episodes, robot, policy.statistics, policy.chunk))
    head, limits = policy.network.scale_head, (policy.config.scale_floor, policy.config.scale_ceiling)
    optimizer = torch.optim.AdamW(head.parameters(), lr=config.lr)
    begin, first = 0, float("nan")
    if (kept := savepoint.load("step", "first", "head", "optimizer")) is not None:
        begin, first = kept["step"], kept["first"]
        head.load_state_dict(kept["head"])
        optimizer.load_state_dict(kept["optimizer"])

    def loss(rows: torch.Tensor | slice) -> torch.Tensor:
        return laplace.nll(target[rows], mu[rows], laplace.scale(head(hidden[rows]), 1.0, *limits))

    if begin == 0:
        with torch.no_grad():
            first = float(loss(slice(None)))
    for step in (bar := console.track(begin, config.steps, "scale")):
        if savepoint.due():
            savepoint.save({"step": step, "first": first, "head": head.state_dict(), "optimizer": optimizer.state_dict()})
        rows = torch.from_numpy(noise.integers(seed, noise.Stream.SCALE, step, len(target), config.batch)).to(policy.device)
        value = loss(rows)
        finite(value, "scale", step, "scale.lr")
        optimizer.zero_grad(set_to_none=True)
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        bar.note(nll=float(value.detach()))
    with torch.no_grad():
        scale = laplace.scale(head(hidden), 1.0, *limits).exp()
        return {"nll_before": first, "nll": float(loss(slice(None))), "scale_median": float(scale.median()), "steps": config.steps}

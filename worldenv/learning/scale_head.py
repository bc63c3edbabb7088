"""Stage scale: the scale head learns how far mu is off, by the Laplace likelihood; everything else is frozen (paper, appendix B.1, Eq. 8).

The trunk is frozen, so its hiddens and mu are computed once. Hiddens are most of it, 0.9 MB of a published float32 policy for each chunk start: they
stay on the host, and the device has a batch of them. The density is the one that acts later, floor and ceiling included and factor 1:
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
from worldenv.nouns import ACTION_DIM
from worldenv.policy import laplace
from worldenv.policy.openvla_oft import OpenVLAOFT
from worldenv.robots.contract import Robot

_AT_ONCE = 32  # queries per forward pass of the trunk, and of the head over all of them


@torch.no_grad()
def _seen(policy: OpenVLAOFT, chunks: Chunks) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of every chunk start: hiddens (N, 7 K, width), on the host in the trunk's own dtype; mu and target (N, K, 7) float32."""
    count, embedded = len(chunks), policy.network.language_model.model.embed_tokens.weight
    hidden = torch.empty(count, policy.chunk * ACTION_DIM, embedded.shape[1], dtype=embedded.dtype)
    mu, target = torch.empty(2, count, policy.chunk, ACTION_DIM, device=policy.device)
    for start in range(0, count, _AT_ONCE):
        some = slice(start, min(start + _AT_ONCE, count))
        observation, wanted = chunks.take(np.arange(some.start, some.stop))
        now = policy.hidden(policy.query(observation))
        hidden[some], mu[some], target[some] = now.to(hidden), policy.network.action_head(now), wanted.to(target)  # what was wider was so by zeros
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

    def log_scale(rows: torch.Tensor | slice) -> torch.Tensor:
        return laplace.scale(head(hidden[rows].to(policy.device).float()), 1.0, *limits)

    @torch.no_grad()
    def over_all() -> tuple[float, float]:
        """Mean NLL and median scale."""
        found = torch.cat([log_scale(slice(start, start + _AT_ONCE)) for start in range(0, len(hidden), _AT_ONCE)])
        return float(laplace.nll(target, mu, found)), float(found.exp().median())

    if begin == 0:
        first, _ = over_all()
    for step in (bar := console.track(begin, config.steps, "scale")):
        if savepoint.due():
            savepoint.save({"step": step, "first": first, "head": head.state_dict(), "optimizer": optimizer.state_dict()})
        rows = torch.from_numpy(noise.integers(seed, noise.Stream.SCALE, step, len(target), config.batch))
        there = rows.to(policy.device)
        value = laplace.nll(target[there], mu[there], log_scale(rows))
        finite(value, "scale", step, "scale.lr")
        optimizer.zero_grad(set_to_none=True)
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        bar.note(nll=float(value.detach()))
    nll, median = over_all()
    return {"nll_before": first, "nll": nll, "scale_median": median, "steps": config.steps}

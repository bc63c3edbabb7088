"""Leave one out: each rollout against the mean of the others of its group (paper, Eq. 4; Ahmadian et al. 2024, arXiv:2402.14740).

Not normalised: an advantage of 0.1 means 0.1 of the return.
"""

from __future__ import annotations

import torch


def baseline(value: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """Mean return of the other rollouts with the same group key: `value` (R,) floating, `group` (R,) integer -> (R,) like `value`.

    Keys are labels: groups may be of different sizes and in any order. ValueError where a rollout is alone in its group.
    """
    if value.dim() != 1 or group.shape != value.shape:
        raise ValueError(f"leave one out: value {tuple(value.shape)}, group {tuple(group.shape)}: want twice (R,)")
    _, index, size = torch.unique(group, return_inverse=True, return_counts=True)
    if bool((size < 2).any()):
        alone = group[(size < 2)[index]].tolist()
        raise ValueError(f"leave one out: groups {alone[:4]} hold one rollout; give every context at least 2")
    total = torch.zeros(len(size), dtype=value.dtype, device=value.device).index_add_(0, index, value)
    others: torch.Tensor = (total[index] - value) / (size[index] - 1)
    return others


def leave_one_out(value: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """Advantage (R,): return minus `baseline`."""
    return value - baseline(value, group)

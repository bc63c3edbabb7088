"""What the processes of one training stage know of each other: who they are, and sums over all of them. Alone, everything is as without.

`worldenv.distributed` starts them; the group itself is torch.distributed's.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist


def rank() -> int:
    """Number of this process; 0 leads: it alone writes files."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def count() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def total(value: float, device: torch.device) -> float:
    """The sum of everybody's `value`, the same bits for everybody."""
    if count() == 1:
        return value
    summed = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(summed)
    return float(summed)


def share(tensors: Iterable[torch.Tensor]) -> None:
    """Overwrite everybody's `tensors` by the leader's."""
    if count() > 1:
        for tensor in tensors:
            whole = tensor.detach().contiguous()  # a channels-last weight travels in its plain layout
            dist.broadcast(whole, 0)
            tensor.detach().copy_(whole)


def sum_up(tensors: Iterable[torch.Tensor]) -> None:
    """Replace everybody's `tensors`, as many and alike, by their sums over all processes."""
    if count() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def agreed(value: str | None) -> str | None:
    """The leader's `value`, for everybody; they wait for it."""
    if count() == 1:
        return value
    told = [value]
    dist.broadcast_object_list(told, 0, device=torch.device("cpu"))
    return told[0]

"""What the processes of one run know of each other: who they are, sums over all of them, and the machines that they are on. Alone, everything is as
without.

`worldenv.distributed` starts them; the group itself is torch.distributed's.
"""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from worldenv.nouns import Failed

PATIENCE = timedelta(days=7)
"""The others wait while the first one does whole stages alone."""
STEP_PATIENCE = timedelta(hours=1)
"""In a stage that all train in nobody waits longer for a sum: a machine that is frozen, or whose network is gone, has closed no connection. To save
what a large network has so far is minutes of it."""
ITERATION_PATIENCE = timedelta(days=1)
"""Machines wait for each other's rollouts, for the leader's update, and while it builds engines."""
T = TypeVar("T")


class ProcessError(Failed):
    """Another process of the run has failed or is gone. The message says which, as far as that is known."""


def rank() -> int:
    """Number of this process; 0 leads: it alone writes files, but for the rollouts that another machine has made."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def count() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def total(value: float, device: torch.device) -> float:
    """The sum of everybody's `value`, the same bits for everybody."""
    if count() == 1:
        return value
    summed = torch.tensor(value, dtype=torch.float64, device=device)
    with _reached():
        dist.all_reduce(summed)
    return float(summed)


def share(tensors: Iterable[torch.Tensor]) -> None:
    """Overwrite everybody's `tensors` by the leader's."""
    if count() > 1:
        _share(tensors, None)


def sum_up(tensors: Iterable[torch.Tensor]) -> None:
    """Replace everybody's `tensors`, as many and alike, by their sums over all processes."""
    if count() > 1:
        for tensor in tensors:
            with _reached():
                dist.all_reduce(tensor)


_waiting: dist.ProcessGroup | None = None


def join(backend: str) -> None:
    """Be one of the processes that torchrun started, by torch.distributed's `backend`."""
    global _waiting  # torch.distributed's own groups are as global
    dist.init_process_group(backend, timeout=STEP_PATIENCE)
    _waiting = dist.new_group(timeout=PATIENCE, backend="gloo")


def agreed(value: str | None) -> str | None:
    """The leader's `value`, for everybody; they wait for it, whatever it does alone before."""
    told: str | None = _told(value, _waiting) if count() > 1 else value
    return told


def _told(value: Any, group: dist.ProcessGroup | None) -> Any:
    told = [value]
    with _reached():
        dist.broadcast_object_list(told, 0, group, torch.device("cpu"))
    return told[0]


def _share(tensors: Iterable[torch.Tensor], group: dist.ProcessGroup | None) -> None:
    for tensor in tensors:
        whole = (tensor if group is None else tensor.cpu()).detach().contiguous()  # a channels-last weight travels in its plain layout
        with _reached():
            dist.broadcast(whole, 0, group)
        tensor.detach().copy_(whole)


@contextlib.contextmanager
def _reached() -> Iterator[None]:
    """ProcessError where the others cannot be reached in this block."""
    try:
        yield
    except RuntimeError as error:  # of torch.distributed: a connection was closed, or nothing came in time
        said = str(error).partition("\n")[0].partition(". ")[0]  # what Gloo guesses after that is no help
        if "timed out" in str(error).lower():
            raise ProcessError(f"{_me()}: another process says nothing any more: is its machine frozen, or its network gone? ({said})") from error
        raise ProcessError(f"{_me()}: another process has ended before its time, and says why where it ran ({said})") from error


def _me() -> str:
    return f"process {rank()} on {platform.node()}"


@dataclass(frozen=True)
class Machines:
    """The first processes of all machines, which make rollouts together: each asks all GPUs of its machine. By default this process alone."""

    number: int = 0
    """Of this one; 0 leads."""
    count: int = 1
    """Of all."""
    group: dist.ProcessGroup | None = None
    """Of torch.distributed, from host to host (Gloo); None where this process is alone."""

    def agreed(self, value: Any) -> Any:
        """As `agreed` above, of plain values."""
        return _told(value, self.group) if self.count > 1 else value

    def share(self, tensors: Iterable[torch.Tensor]) -> None:
        """As `share` above; by way of the hosts, where a closed connection is noticed."""
        if self.count > 1:
            _share(tensors, self.group)

    def dealt(self, some: Sequence[T]) -> list[T]:
        """This one's part of `some`, which everybody has alike: they are dealt out in turn."""
        return list(some[self.number :: self.count])

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Everybody's block has ended when anybody goes on. Where one has failed nobody does: the others raise ProcessError, which names it."""
        if self.count == 1:
            yield
            return
        failure: Exception | None = None
        try:
            yield
        except Exception as error:  # of whatever kind: the others would wait for this one
            failure = error
        mine = None if failure is None else f"{_me()}: {type(failure).__name__}: {failure}".partition("\n")[0]
        said: list[str | None] = [None] * self.count
        try:
            with _reached():
                dist.all_gather_object(said, mine, self.group)
        finally:
            if failure is not None:
                raise failure
        for line in said:
            if line is not None:
                raise ProcessError(line)

    @contextlib.contextmanager
    def leader_first(self) -> Iterator[None]:
        """As `together`, and the others begin when the leader's block has ended."""
        if self.number:
            with self.together():
                pass
        with self.together():
            yield
        if not self.number:
            with self.together():
                pass


def machines() -> Machines | None:
    """Those of this run; None in a process that is not the first one of its machine. All processes must call it."""
    if count() == 1:
        return Machines()
    numbers = [0] * count()
    with _reached():
        dist.all_gather_object(numbers, int(os.environ["LOCAL_RANK"]))
        firsts = [one for one, local in enumerate(numbers) if local == 0]
        group = dist.new_group(firsts, ITERATION_PATIENCE, "gloo")
    return Machines(firsts.index(rank()), len(firsts), group) if rank() in firsts else None

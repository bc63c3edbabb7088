"""Several processes for one run, one per device, as `torchrun` starts them on one machine or on several: joining, and leaving again.

    torchrun --nproc-per-node 8 -m worldenv.cli.train --preset tiny --out runs/tiny --until world

The processes share a disk. The first one runs the stages; the others wait for a stage in which they have a part (worldenv.train) and join it: all of
them train in sft and world, and the first one of every machine makes rollouts in loop, on all GPUs of its machine.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist

from worldenv import console
from worldenv.learning import processes


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Within this block, the processes that torchrun started are one group (NCCL on GPUs, Gloo on CPUs); alone, nothing happens.

    Only the first one speaks. Each gets its own GPU. Raises ValueError where there are fewer GPUs than processes on a machine that has any.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    cuda, local = torch.cuda.is_available(), int(os.environ["LOCAL_RANK"])
    if cuda and local >= torch.cuda.device_count():
        raise ValueError(f"process {local} of this machine has no GPU: it has {torch.cuda.device_count()}; lower torchrun's --nproc-per-node")
    if cuda:
        torch.cuda.set_device(local)
    processes.join("cpu:gloo,cuda:nccl" if cuda else "gloo")
    if dist.get_rank():
        console.be_quiet()
    try:
        yield
    finally:
        dist.destroy_process_group()

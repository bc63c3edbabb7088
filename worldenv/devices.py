"""Which devices a name means, being on one, and working on several at once."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TypeVar

import torch

Worker = TypeVar("Worker")
Job = TypeVar("Job")
Made = TypeVar("Made")

torch.backends.cudnn.allow_tf32 = False
"""Float32 is float32: by default cuDNN rounds what convolutions read to 10 bits, which parity and LOOP's check of its ratio would see."""

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
"""Of GPUs that kernels and engines are made for."""


def architectures(names: str) -> list[str]:
    """Those in `--arch sm_80,sm_90`. ValueError for another one, and for none."""
    found = [name for name in names.split(",") if name]
    if odd := [name for name in found or [names] if name not in ARCHITECTURES]:
        raise ValueError(f"--arch {odd[0]}: there are {', '.join(ARCHITECTURES)}")
    return found


def device_of(name: str) -> torch.device:
    """What `--device` names: auto is cuda where there is one, else cpu. Raises ValueError for one that is not there."""
    if name != "auto" and name.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"--device {name}: want auto, cpu, cuda, or one GPU as cuda:0")
    try:
        found = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return found


def gpus_of(device: torch.device, wanted: int) -> list[torch.device]:
    """`device`, or where it is "cuda" `wanted` GPUs of this machine (0: all), the present one first, with numbers. ValueError: fewer there."""
    if device != torch.device("cuda"):
        if wanted > 1:
            raise ValueError(f"gpus={wanted}: the device is {device}; for several, set device to cuda")
        return [device]
    there = torch.cuda.device_count()
    if wanted > there:
        raise ValueError(f"gpus={wanted}: this machine has {there}; ask for fewer")
    first = torch.cuda.current_device()
    return [torch.device("cuda", number) for number in (first, *(other for other in range(there) if other != first))][: wanted or there]


def on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """With `device` as the present GPU, which is where kernels are launched and TensorRT and AOTInductor load a plan; nothing on a CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def give_back(device: torch.device) -> None:
    """Give the driver what torch keeps of GPUs for tensors to come, before memory is taken past torch; nothing on a CPU. What cycles of references
    hold is let go first: an exported program, with a network's weights, is in one.
    """
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def dealt(workers: Sequence[Worker], jobs: Iterable[Job], work: Callable[[Worker, Job], Made]) -> Iterator[Made]:
    """`work` (worker, job) of each of `jobs`, in their order: by one worker here, by several side by side, each on a thread of its own.

    `jobs` is read on this thread, no further ahead than there are workers. Raises what `work` raises, when the others have ended; KeyboardInterrupt
    at once: a job may take a quarter of an hour.
    """
    if len(workers) == 1:
        yield from (work(workers[0], job) for job in jobs)
        return
    waiting = SimpleQueue[tuple[Future[Made], Job] | None]()

    def serve(worker: Worker) -> None:
        while (one := waiting.get()) is not None:
            answer, job = one
            try:
                answer.set_result(work(worker, job))
            except Exception as error:
                answer.set_exception(error)

    threads = [threading.Thread(target=serve, args=(worker,), daemon=True) for worker in workers]
    for thread in threads:
        thread.start()
    begun = deque[Future[Made]]()
    stopped = False
    try:
        for job in jobs:
            begun.append(Future())
            waiting.put((begun[-1], job))
            if len(begun) == len(workers):
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    except KeyboardInterrupt:
        stopped = True
        raise
    finally:
        for _ in threads:
            waiting.put(None)
        if not stopped:
            for thread in threads:
                thread.join()

"""Which devices a name means, and being on one."""

from __future__ import annotations

import contextlib

import torch

torch.backends.cudnn.allow_tf32 = False
"""Float32 is float32: by default cuDNN rounds what convolutions read to 10 bits, which parity and LOOP's check of its ratio would see."""


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

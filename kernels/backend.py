"""kernels/backend.py: which implementation runs here, and how every Triton kernel is started.

The one rule: where all tensors are on a CUDA device, the Triton kernel; everywhere else the definition (PyTorch, NumPy, OpenCV, csrc/core).
Triton's interpreter runs the kernels on a CPU too, thousands of times slower: it is for tests, which call the `*_triton` functions themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from worldenv.devices import on


def uses_kernel(*given: torch.Tensor | torch.device | None) -> bool:
    """The rule above, for tensors and for the device of a result; None is left out. ValueError where they are on different devices."""
    devices = {one if isinstance(one, torch.device) else one.device for one in given if one is not None}
    if torch.device("cuda") in devices and any(one.index is not None for one in devices):  # without a number: the present one
        devices = devices - {torch.device("cuda")} | {torch.device("cuda", torch.cuda.current_device())}
    if len(devices) > 1:
        raise ValueError(f"tensors on {' and '.join(sorted(map(str, devices)))}: move all of them to one device")
    return {one.type for one in devices} == {"cuda"}


@dataclass(frozen=True)
class Build:
    """One way in which a kernel is compiled: what `launch` may be asked for, and what is compiled ahead of time."""

    kernel: Any
    """The function that triton.jit made."""
    types: Mapping[str, str]
    """Argument to Triton type: "*fp32", "i32"; pointers are aligned to 16 bytes."""
    constants: Mapping[str, Any]
    """Arguments that are fixed when it is compiled."""
    warps: int = 4
    contract: bool = field(default=True)
    """Whether a product and a sum may become one rounding."""

    @property
    def name(self) -> str:
        """The kernel, what it points to, and its constants: "_draw_kernel[*bf16 *fp32 COUNTER=True ...]"."""
        kinds = [kind for kind in dict.fromkeys(self.types.values()) if kind.startswith("*")]
        return f"{self.kernel.__name__}[{' '.join([*kinds, *(f'{name}={value}' for name, value in self.constants.items())])}]"


def launch(
    kernel: Any, grid: int, arguments: Mapping[str, Any], constants: Mapping[str, Any], warps: int = 4, contract: bool = True
) -> None:
    """Start `grid` programs of `kernel` on the device of the first tensor; `warps`, `contract` as in `Build`."""
    device = next(value.device for value in arguments.values() if isinstance(value, torch.Tensor))
    with on(device):
        kernel[(grid,)](**arguments, **constants, num_warps=warps, enable_fp_fusion=contract)

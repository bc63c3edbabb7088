"""CUDA graphs over static shapes: the launches of a call are recorded once for each shape of its inputs, and replayed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

_WARM_UP = 3
"""Calls on a side stream before capture, as torch asks for: libraries make their workspaces in them."""
MOST_SHAPES = 32
"""Graphs kept; each holds memory for its inputs and outputs. Shapes beyond these run as they are."""


class Replayed:
    """`call` on CUDA, from a graph where its shapes have come up before. Outputs are copies: the next replay does not overwrite them."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call, self._lock = call, threading.Lock()
        self._graphs: dict[tuple[Any, ...], tuple[torch.cuda.CUDAGraph, tuple[torch.Tensor, ...], Any]] = {}

    def __call__(self, *given: torch.Tensor) -> Any:
        """As `call`, on the device of the first input; one thread at a time, since a graph has one place for its inputs."""
        key = tuple((one.shape, one.dtype) for one in given)
        with self._lock, torch.cuda.device(given[0].device):
            if key not in self._graphs:
                if len(self._graphs) >= MOST_SHAPES:
                    return self._call(*given)
                self._graphs[key] = self._captured(given)
            graph, inputs, outputs = self._graphs[key]
            for own, new in zip(inputs, given, strict=True):
                own.copy_(new)
            graph.replay()
            return tuple(one.clone() for one in outputs) if isinstance(outputs, tuple | list) else outputs.clone()

    def _captured(self, given: tuple[torch.Tensor, ...]) -> tuple[torch.cuda.CUDAGraph, tuple[torch.Tensor, ...], Any]:
        inputs = tuple(one.clone() for one in given)
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                self._call(*inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # workers of other GPUs allocate meanwhile
            outputs = self._call(*inputs)
        return graph, inputs, outputs

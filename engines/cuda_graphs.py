"""CUDA graphs over static shapes: the launches of a call are recorded once for each shape of its inputs, and replayed."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch

from worldenv.engines.recipe import said

_WARM_UP = 3
"""Calls on a side stream before capture, as torch asks for: libraries make their workspaces in them."""
MOST_SHAPES = 32
"""Graphs kept; each holds memory for its inputs and outputs. Shapes beyond these run as they are."""
_CAPTURING = threading.Lock()
"""One capture at a time in a process, as torch asks for."""
_Captured = tuple[torch.cuda.CUDAGraph, tuple[torch.Tensor, ...], Any, Callable[..., Any]]
"""A graph, its inputs and outputs, and the call that it was captured from: what that holds must live as long."""


class Replayed:
    """`call` on CUDA, from a graph where its shapes have come up before. Outputs are copies: the next replay does not overwrite them."""

    def __init__(self, call: Callable[..., Any], few: bool, own: Callable[[], Callable[..., Any]] | None = None) -> None:
        """Unless `few` shapes come up (`EngineRecipe.few`), all calls are made as they are: each graph would hold a copy of what a language model is
        given, hundreds of megabytes of keys and values, for a length that hardly comes up again. Where a call has state that a graph does not share,
        `own` makes another one for each graph.
        """
        self._call, self._own, self._lock = call, own, threading.Lock()
        self._most = MOST_SHAPES if few else 0
        self._graphs: dict[tuple[Any, ...], _Captured | None] = {}
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None
        self._done: torch.cuda.Event | None = None
        """The last call's end: its caller may have been on another stream, and all calls share memory, of the graphs or of an engine's context."""

    def __call__(self, *given: torch.Tensor) -> Any:
        """As `call`, on the device of the first input; one thread at a time, since a graph has one place for its inputs.

        Where a call cannot be captured it is made as it is, which is said once for each shape.
        """
        key = tuple((one.shape, one.dtype) for one in given)
        with self._lock, torch.cuda.device(given[0].device):
            if self._done is None:
                self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            else:
                torch.cuda.current_stream().wait_event(self._done)
            try:
                return self._made(key, given)
            finally:
                self._done.record()

    def _made(self, key: tuple[Any, ...], given: tuple[torch.Tensor, ...]) -> Any:
        if key not in self._graphs and len(self._graphs) < self._most:
            self._graphs[key] = self._captured(given)
        captured = self._graphs.get(key)
        if captured is None:
            return self._call(*given)
        graph, inputs, outputs, _ = captured
        for own, new in zip(inputs, given, strict=True):
            own.copy_(new)
        graph.replay()
        return tuple(one.clone() for one in outputs) if isinstance(outputs, tuple | list) else outputs.clone()

    def _captured(self, given: tuple[torch.Tensor, ...]) -> _Captured | None:
        present = torch.cuda.current_stream()
        if self._stream is None:  # of this device; all graphs share its memory, since one runs at a time and outputs are copied out of it
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            self._pool = torch.cuda.graph_pool_handle()
        side, inputs = self._stream, tuple(one.clone() for one in given)
        call = self._call if self._own is None else self._own()
        side.wait_stream(present)
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                call(*inputs)
        present.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: workers of other GPUs allocate meanwhile
            with _CAPTURING, torch.cuda.graph(graph, pool=self._pool, stream=side, capture_error_mode="thread_local"):
                outputs = call(*inputs)
        except RuntimeError as error:
            torch.cuda.set_stream(present)  # a capture that fails at its end leaves its own stream behind
            shapes = ", ".join(str(tuple(one.shape)) for one in given)
            warnings.warn(f"inputs {shapes} run without a CUDA graph: {said(error)[0]}", RuntimeWarning, stacklevel=3)
            return None
        return graph, inputs, outputs, call

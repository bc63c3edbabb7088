"""Back end onnxruntime: the CPU's. A plan is the graph with our own operators (`onnx_fusion`) and its weights; a session is made as it is loaded."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from worldenv import _core, checkpoint
from worldenv.engines import export, onnx_fusion
from worldenv.engines.backend import Engine, only_here
from worldenv.engines.recipe import EngineError, EngineRecipe
from worldenv.engines.refit import check_shapes
from worldenv.engines.store import Store

# before it is imported: else it puts an id of this machine into the home and sends usage events from then on
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


class OnnxRuntime:
    """See `Engine`. One thread: whoever has more cores calls from several threads, which share it, or takes one `on_threads`.

    Where few shapes come up, each gets a session of its own; else one session takes all.
    """

    back_end = "onnxruntime"

    def __init__(self, graph: bytes, weights: Mapping[str, torch.Tensor], recipe: EngineRecipe, threads: int = 1) -> None:
        self.recipe, self._graph, self._threads = recipe, graph, threads
        self._lock = threading.Lock()
        self._take(weights)

    def _take(self, weights: Mapping[str, torch.Tensor]) -> None:
        self._weights = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
        self._sessions: dict[tuple[tuple[str, int], ...], tuple[Any, list[tuple[str, int]]]] = {}
        most = self.recipe.cpu_rows
        usual = {name: opt if most is None else min(opt, most) for name, (_, opt, _) in self.recipe.ranges.items()}
        self._session(usual if self.recipe.few else {})

    def _session(self, lengths: Mapping[str, int]) -> tuple[Any, list[tuple[str, int]]]:
        """For these lengths: who knows them computes no shapes. Which session a call gets depends on its shape alone, for bits do too.

        And the inputs that its graph has kept: their names, and which of the recipe's they are.
        """
        key = tuple(lengths.items())
        with self._lock:
            if key not in self._sessions:
                self._sessions[key] = self._opened(lengths)
            return self._sessions[key]

    def _opened(self, lengths: Mapping[str, int]) -> tuple[Any, list[tuple[str, int]]]:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self._threads, 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # a waiting thread would take a core from who works
        options.enable_mem_reuse = False  # not planned beforehand: what was freed last is taken first, and still in the cache
        options.log_severity_level = 3
        try:
            options.register_custom_ops_library(_core.__file__)  # it holds our operators beside what Python calls
        except Exception as error:  # its errors have no base of their own
            raise EngineError(f"{self.recipe.name}: {_core.__file__} has no operators for ONNX Runtime ({error}): build worldenv anew") from error
        for name, length in lengths.items():
            options.add_free_dimension_override_by_name(name, length)
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(_array(tensor)) for tensor in self._weights.values()]
        options.add_external_initializers(list(self._weights), values)
        try:
            session = onnxruntime.InferenceSession(self._graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # as above
            raise EngineError(f"{self.recipe.name}: ONNX Runtime does not load its graph: {error}; build it anew") from error
        names, asked = [one.name for one in self.recipe.inputs], [one.name for one in session.get_inputs()]
        if unknown := set(asked) - set(names):
            raise EngineError(f"{self.recipe.name}: the graph asks for {sorted(unknown)}: another recipe's; build it anew")
        return session, [(name, names.index(name)) for name in asked]

    def __call__(self, *given: torch.Tensor) -> Any:
        """See `Engine`."""
        self.recipe.check(given)
        if (rows := self.recipe.cpu_rows) is None or all(len(one) <= rows for one in given):
            return self._run(given)
        parts = [self._run(part) for part in self._parts(given, rows)]
        return tuple(torch.cat(some) for some in zip(*parts, strict=True)) if isinstance(parts[0], tuple) else torch.cat(parts)

    def _parts(self, given: Sequence[torch.Tensor], rows: int) -> Iterator[tuple[torch.Tensor, ...]]:
        """`given`, `rows` rows at a time."""
        ranged = [bool(binding.ranged) for binding in self.recipe.inputs]
        count = next(len(one) for one, cut in zip(given, ranged, strict=True) if cut)
        for first in range(0, count, rows):
            yield tuple(one[first : first + rows] if cut else one for one, cut in zip(given, ranged, strict=True))

    def _run(self, given: Sequence[torch.Tensor]) -> Any:
        session, asked = self._session(self.recipe.lengths(given) if self.recipe.few else {})
        feed = {name: _array(given[i].detach()) for name, i in asked}
        try:
            with _without_denormals():
                made = session.run(None, feed)
        except Exception as error:  # as above
            raise EngineError(f"{self.recipe.name}: ONNX Runtime does not run it: {error}") from error
        out = tuple(torch.from_numpy(one) for one in made)
        return out[0] if len(out) == 1 else out

    def on_threads(self, threads: int) -> OnnxRuntime:
        """The same, each operator of which runs on so many threads."""
        return OnnxRuntime(self._graph, self._weights, self.recipe, threads)

    def refit(self, weights: Mapping[str, torch.Tensor]) -> None:
        """See `Engine`. A session takes its weights when it is made, so this makes one: a fraction of a second at the tiny size."""
        copies = {name: tensor.detach().clone() for name, tensor in weights.items()}  # sessions are opened later too, and weights change in place
        check_shapes(self.recipe.name, self._weights, copies)
        self._take(copies)


@contextlib.contextmanager
def _without_denormals() -> Iterator[None]:
    """Numbers below 1e-38 are 0 in this thread: the runtime's exponential makes one of every masked score, and each costs a hundred others.

    The session option of that purpose does nothing where the caller's thread is the one that computes.
    """
    smallest = sys.float_info.min
    before = smallest / 2 == 0.0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def _array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any] = tensor.contiguous().numpy()
    return array


def requires() -> str | None:
    """onnxruntime, and what exports."""
    for name in ("onnxruntime", "onnx", "onnxscript"):
        if not _installed(name):
            return f"onnxruntime: {name} is not installed: pip install {name}"
    return None


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def versions() -> dict[str, str]:
    """Of what writes a plan and what runs it, our own operators among that."""
    installed = {name: importlib.metadata.version(name) for name in ("onnxruntime", "onnx", "onnxscript")}
    return {"torch": torch.__version__, "operators": _core.OPERATORS, **installed}


def architecture(device: torch.device) -> str:
    """A graph runs on every CPU; on no GPU, since it is the CPU's build that is used."""
    if device.type != "cpu":
        raise EngineError(f"onnxruntime runs on a CPU here, not on {device}: take inductor or tensorrt")
    return "cpu"


def build(module: nn.Module, recipe: EngineRecipe, folder: Path, arch: str, store: Store) -> None:
    """See `backend`. Float32 only: ONNX Runtime's CPU kernels have no bfloat16 convolution."""
    if arch != "cpu":
        only_here("onnxruntime", arch, torch.device("cpu"))
    if recipe.precision != "fp32":
        raise EngineError(f"{recipe.name}: onnxruntime on a CPU has no {recipe.precision} kernels: take precision fp32")
    import onnx_ir as ir

    export.exported(module, recipe, store, folder)
    model = ir.load(folder / export.GRAPH)
    onnx_fusion.fuse(model)
    with checkpoint.atomic(folder / export.GRAPH) as temporary:
        ir.save(model, temporary)


def load(folder: Path, recipe: EngineRecipe, device: torch.device) -> Engine:
    """See `backend`. EngineError where the weights cannot be read."""
    architecture(device)
    try:
        graph, weights = (folder / export.GRAPH).read_bytes(), load_file(folder / export.WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise EngineError(f"{folder}: {error}; build it anew") from error
    return OnnxRuntime(graph, weights, recipe)

"""Back end tensorrt, brought by the user; the same code with another library is tensorrt_rtx, which builds plans without a GPU.

    plan.engine     the plan            plan.log      what the builder said, from INFO up
    timing.cache    what it measured, or for RTX knew; the next build on this machine begins with it

Networks are strongly typed: precisions are those of the graph, which `export.prepared` decides, and no flag overrides them.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from worldenv import checkpoint, console
from worldenv.devices import give_back
from worldenv.engines import export
from worldenv.engines.backend import Engine, capability, compute_capability, only_here
from worldenv.engines.cuda_graphs import Replayed
from worldenv.engines.recipe import EngineError, EngineRecipe
from worldenv.engines.refit import refit_tensorrt
from worldenv.engines.store import Store

PLAN, LOG, TIMING = "plan.engine", "plan.log", "timing.cache"
FULL, RTX = "tensorrt", "tensorrt_rtx"
OPSET = 20
_WORKSPACE = 8 * 2**30
_ALIGNED = 256
"""Of every address that a context is given [bytes]; none may be null, not even of a tensor without values (NvInferRuntime.h)."""
_TYPES = {"FLOAT": torch.float32, "BF16": torch.bfloat16, "HALF": torch.float16, "INT64": torch.int64, "INT32": torch.int32, "BOOL": torch.bool}


def library(name: str) -> Any:
    """The module `tensorrt` or `tensorrt_rtx`. EngineError names what is missing."""
    if missing := missing_library(name):
        raise EngineError(missing)
    return importlib.import_module(name)


def missing_library(name: str) -> str | None:
    """What is missing for it, or None."""
    try:
        importlib.import_module(name)
    except ImportError as error:
        cure = "pip install tensorrt-rtx-cu13" if name == RTX else "install NVIDIA's TensorRT 10.1 or later, with its Python package"
        return f"{name}: {error}: {cure}"
    return None


def _logger(trt: Any, said: list[str]) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.INFO:
                said.append(f"{str(severity).rpartition('.')[2]}: {message}")

    return Log()


def _parsed(trt: Any, builder: Any, logger: Any, graph: Path, recipe: EngineRecipe) -> tuple[Any, Any]:
    """Network and parser. EngineError names the operator and the node that the parser does not take."""
    flags = getattr(trt, "NetworkDefinitionCreationFlag", None)
    typed = getattr(flags, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        said = "; ".join(f"{one.node_operator()} ({one.node_name()}): {one.desc()}" for one in errors[:3])
        raise EngineError(f"{recipe.name}: {trt.__name__} does not parse the graph: {said}")
    return network, parser


def _configured(trt: Any, builder: Any) -> Any:
    """Float32 is float32 here too (worldenv/devices.py): TF32, which is on by default, rounds what products read to 10 bits."""
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    if hasattr(config, "set_memory_pool_limit"):
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, _WORKSPACE)
    return config


def _refittable(trt: Any, network: Any, config: Any, recipe: EngineRecipe, weights: Collection[str]) -> None:
    """Have the plan take new `weights`, and those alone: with plain REFIT it would also ask for every constant of the graph, which the parser names.

    EngineError names a weight that TensorRT does not know.
    """
    config.set_flag(trt.BuilderFlag.REFIT_INDIVIDUAL)
    for one in weights:
        if not network.mark_weights_refittable(one):
            raise EngineError(f"{recipe.name}: {trt.__name__} knows no weight {one} in the graph, so it could not be refitted; use back end inductor")


def _begin_with(config: Any, kept: Path) -> None:
    """Have a build begin with the timings in `kept`; with none where there are none, or TensorRT refuses them, which is said."""
    held = kept.read_bytes() if kept.is_file() else b""
    cache = config.create_timing_cache(held) if held else None
    if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
        return
    if held:
        console.say(f"engines: {kept}: TensorRT refuses these timings; it measures anew")
    config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)


def _target(trt: Any, arch: str) -> Any:
    """What RTX calls `arch`. EngineError where it builds nothing for it, which an export of minutes should not come before."""
    if (target := getattr(trt.ComputeCapability, arch.replace("sm_", "SM"), None)) is None:
        has = sorted(one for one in dir(trt.ComputeCapability) if one.startswith("SM"))
        raise EngineError(f"tensorrt_rtx has no target {arch}, only {', '.join(has)}: for {arch}, use tensorrt or inductor on such a machine")
    return target


def build_with(name: str, module: nn.Module, recipe: EngineRecipe, folder: Path, arch: str, store: Store) -> None:
    """Write a plan for `arch` into `folder`; `module` is used up. EngineError: what the library says."""
    trt = library(name)
    here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == RTX:
        target = _target(trt, arch)
    else:
        only_here(name, arch, here)
    weights = list(export.state(module))  # an export uses the module up
    export.exported(module, recipe, store, folder, OPSET)
    module.to("meta")  # the weights are in a file now, and the builder wants all the memory that there is
    give_back(here)
    said: list[str] = []
    logger = _logger(trt, said)
    builder = trt.Builder(logger)
    network, _parser = _parsed(trt, builder, logger, folder / export.GRAPH, recipe)
    config = _configured(trt, builder)
    profile = builder.create_optimization_profile()
    for binding in recipe.inputs:
        profile.set_shape(binding.name, *(recipe.shape(binding, at) for at in range(3)))
    config.add_optimization_profile(profile)
    if name == RTX:
        config.num_compute_capabilities = 1
        config.set_compute_capability(target, 0)
    elif recipe.refit:
        _refittable(trt, network, config, recipe, weights)
    kept = store.root / "timing" / f"{name}-{arch}-{trt.__version__}.cache"
    _begin_with(config, kept)
    plan = builder.build_serialized_network(network, config)
    (folder / LOG).write_text("\n".join(said) + "\n", encoding="utf-8")
    if plan is None:
        wrong = [one for one in said if one.startswith(("ERROR", "INTERNAL"))]
        raise EngineError(f"{recipe.name}: {name} builds no plan for {arch}: {'; '.join(wrong[-2:])}")
    (folder / PLAN).write_bytes(bytes(plan))
    made = config.get_timing_cache()
    (folder / TIMING).write_bytes(bytes(made.serialize()) if made is not None else b"")
    with checkpoint.atomic(kept) as temporary:  # another build may read it now, or write its own: the last one stays, whole
        shutil.copyfile(folder / TIMING, temporary)
    for left in (export.GRAPH, export.WEIGHTS):  # the plan holds the weights; the graph is in the store by itself
        (folder / left).unlink()


class TensorRT:
    """See `Engine`. From CUDA graphs where few shapes come up, each of an execution context of its own: another shape set there would change what
    the graph was captured from. Contexts share one memory for activations, since one runs at a time (`Replayed`).

    TensorRT for RTX is not captured: its plans would have to leave all memory to us, and it exchanges kernels after the first calls.
    """

    def __init__(self, name: str, plan: Path, recipe: EngineRecipe, device: torch.device) -> None:
        trt = library(name)
        self.back_end, self.recipe, self._device, self._trt, self._said = name, recipe, device, trt, list[str]()
        self._logger = _logger(trt, self._said)
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(plan.read_bytes())
        if self._engine is None:
            raise EngineError(f"{recipe.name}: {name} does not load {plan}: {'; '.join(self._said[-2:]) or 'no GPU, or a plan of another version'}")
        self._nothing = torch.empty(_ALIGNED, dtype=torch.uint8, device=device)
        self._captures = name == FULL and recipe.few
        self._scratch = torch.empty(max(1, self._engine.device_memory_size_v2), dtype=torch.uint8, device=device) if self._captures else None
        self._call = self._begun()

    def _begun(self) -> Replayed:
        return Replayed(self._on_context(), self._captures, self._on_context)

    def _on_context(self) -> Callable[..., Any]:
        """A call with a context of its own. EngineError where there is no room for one."""
        if self._scratch is None:
            context = self._engine.create_execution_context()
        else:
            context = self._engine.create_execution_context(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            raise EngineError(f"{self.recipe.name}: {self.back_end} makes no execution context: {'; '.join(self._said[-2:]) or 'out of memory'}")
        if self._scratch is not None:
            context.set_device_memory(self._scratch.data_ptr(), self._scratch.numel())
        return functools.partial(self._run, context)

    def _run(self, context: Any, *given: torch.Tensor) -> Any:
        given = tuple(one.clone() if one.data_ptr() % _ALIGNED else one for one in given)  # a view may begin anywhere
        for binding, tensor in zip(self.recipe.inputs, given, strict=True):
            context.set_input_shape(binding.name, tuple(tensor.shape))
            context.set_tensor_address(binding.name, (tensor if tensor.numel() else self._nothing).data_ptr())
        made = []
        for name in (f"out_{one}" for one in self.recipe.outputs):
            kind = _TYPES[str(self._engine.get_tensor_dtype(name)).rpartition(".")[2]]
            out = torch.empty(tuple(context.get_tensor_shape(name)), dtype=kind, device=self._device)
            context.set_tensor_address(name, (out if out.numel() else self._nothing).data_ptr())
            made.append(out)
        if not context.execute_async_v3(torch.cuda.current_stream(self._device).cuda_stream):
            raise EngineError(f"{self.recipe.name}: {self.back_end} did not run: {'; '.join(self._said[-2:])}")
        return made[0] if len(made) == 1 else tuple(made)

    def __call__(self, *given: torch.Tensor) -> Any:
        """See `Engine`."""
        self.recipe.check(given)
        return self._call(*(one.contiguous() for one in given))

    def refit(self, weights: Mapping[str, torch.Tensor]) -> None:
        """See `Engine`. Contexts are made anew: a captured graph may hold copies of the old weights."""
        trt = self._trt
        torch.cuda.synchronize(self._device)
        held = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
        kinds = {kind: getattr(trt.DataType, name) for name, kind in _TYPES.items() if hasattr(trt.DataType, name)}
        named = {name: trt.Weights(kinds[one.dtype], one.data_ptr(), one.numel()) for name, one in held.items()}
        refit_tensorrt(self.recipe.name, trt.Refitter(self._engine, self._logger), named)
        self._call = self._begun()


def requires() -> str | None:
    """TensorRT, and what exports."""
    return missing_library(FULL)


def versions_of(name: str) -> dict[str, str]:
    """Of the library and of torch."""
    return {name: str(library(name).__version__), "torch": torch.__version__, "onnx": importlib.metadata.version("onnx"), "opset": str(OPSET)}


def versions() -> dict[str, str]:
    """See `versions_of`."""
    return versions_of(FULL)


def architecture(device: torch.device) -> str:
    """Of the GPU. EngineError where there is none."""
    if device.type != "cuda":
        raise EngineError(f"tensorrt runs on an NVIDIA GPU, not on {device}")
    arch = compute_capability(device)
    capability(arch)
    return arch


def build(module: nn.Module, recipe: EngineRecipe, folder: Path, arch: str, store: Store) -> None:
    """See `backend`."""
    build_with(FULL, module, recipe, folder, arch, store)


def load(folder: Path, recipe: EngineRecipe, device: torch.device) -> Engine:
    """See `backend`."""
    architecture(device)
    return TensorRT(FULL, folder / PLAN, recipe, device)

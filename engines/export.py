"""A network as an ONNX graph, with its weights beside it in safetensors: every ONNX runtime reads them from there, whatever their size.

    graph.onnx             operators and shapes; each weight is named as in the module, and refers to its bytes in
    weights.safetensors    the module's state, which can be exchanged without touching the graph
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.metadata
import inspect
import json
import logging
import re
import shutil
import struct
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from worldenv import __version__, checkpoint
from worldenv.engines.onnx_forms import FORMS
from worldenv.engines.recipe import EngineError, EngineRecipe, said, symbol
from worldenv.engines.store import Store, Wanted
from worldenv.kernels import group_norm

OPSET = 20
"""The newest that TensorRT-RTX 1.7 builds is 22; from 21 on the exporter writes GroupNormalization, which the CPU runs slower."""
NEWEST_OPSET = 22
GRAPH, WEIGHTS = "graph.onnx", "weights.safetensors"


class ExportError(EngineError):
    """A module that cannot be turned into a graph. The message names the module and the operator."""


class _Wide(nn.Module):
    """A layer that computes in float32 between layers that do not."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide: torch.Tensor = self.layer(x.float())
        return wide.to(x.dtype)


def prepared(
    module: nn.Module, recipe: EngineRecipe, recorded: Sequence[Sequence[torch.Tensor]] = (), back_end: str = "eager"
) -> nn.Module:
    """A copy of `module` in the recipe's precision, without gradients; the norms named in `recipe.wide` compute in float32.

    A layer that at every call computes something of its weights alone has a method `folded`, which gives a layer that holds the result: its
    weights are constants of the graph, as runtimes want them (TensorRT takes no other in a transposed convolution), and can be set anew.
    fp8 is as `back_end` takes it, see `fp8.quantised`. EngineError where its quantiser is not installed.
    """
    made = _exchanged(copy.deepcopy(module), _by("folded"))
    made = made.eval().requires_grad_(False)
    if recipe.dtype == torch.float32:
        return made.float()
    floating = [one for one in made.modules() if next(one.parameters(recurse=False), None) is not None]
    for one in floating:
        for parameter in one.parameters(recurse=False):
            parameter.data = parameter.data.to(recipe.dtype)
    if recipe.precision == "fp8":
        from worldenv.engines import fp8

        made = fp8.quantised(made, recipe, back_end, recorded)

    def wide(name: str, one: nn.Module) -> nn.Module | None:
        named = any(name == end or name.endswith(f".{end}") for end in recipe.wide)
        return _Wide(one.float()) if named and isinstance(one, nn.LayerNorm | nn.GroupNorm) else None

    return _exchanged(made, wide)


def _exchanged(module: nn.Module, given: Callable[[str, nn.Module], nn.Module | None]) -> nn.Module:
    """`module`, each layer of which is now what `given` makes of its name and it, where that is not None."""
    for name, one in list(module.named_modules()):
        if (other := given(name, one)) is not None:
            parent, _, last = name.rpartition(".")
            setattr(module.get_submodule(parent), last, other)
    return module


def _by(method: str) -> Callable[[str, nn.Module], nn.Module | None]:
    """What a layer's `method` gives, where it has one."""
    return lambda _, one: getattr(one, method)() if hasattr(one, method) else None


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer by name, those too that a state dict leaves out."""
    return {name: tensor.detach() for name, tensor in (*module.named_parameters(), *module.named_buffers())}


class Weights(Mapping[str, torch.Tensor]):
    """`state` of a module that is `prepared`, without one: each tensor is made when it is asked for and not kept, so that a refit needs no room for
    a second set. Where nothing is to be changed, it is the very tensor that was given.
    """

    def __init__(self, bare: nn.Module, recipe: EngineRecipe, given: Callable[[str], torch.Tensor]) -> None:
        """`bare`: the module on the meta device, no layer of which has `folded`; `given`: its weights, by name there."""
        made = prepared(bare, recipe)
        wide = [f"{name}." for name, one in made.named_modules() if isinstance(one, _Wide)]
        self._kinds = {name: tensor.dtype for name, tensor in state(made).items()}
        self._names = {name: name for name in self._kinds}
        for layer in wide:
            self._names |= {name: layer + name.removeprefix(f"{layer}layer.") for name in self._kinds if name.startswith(layer)}
        self._recipe, self._given = recipe, given

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._given(self._names[name]).detach().to(self._recipe.dtype).to(self._kinds[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._kinds)

    def __len__(self) -> int:
        return len(self._kinds)


def architecture(module: nn.Module, recipe: EngineRecipe) -> str:
    """SHA-256 of everything that decides the graph: the recipe, layers with their shapes, and the source of all that they are made of."""
    digest = hashlib.sha256(json.dumps(recipe.plain(), sort_keys=True).encode())
    for name, tensor in sorted(state(module).items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
    digest.update(f"{module!r} {__version__}".encode())  # of an installed project, only some of the sources are looked at
    files = {inspect.getsourcefile(type(one)) for one in module.modules()} | {__file__}
    rooms = {Path(str(file)).parent for file in files if "worldenv" in str(file) and "site-packages" not in str(file)}
    sources = {Path(file) for file in files if file is not None} | {path for room in rooms for path in room.glob("*.py")}
    sources.add(Path(str(group_norm.__file__)))  # whoever has imported it, or not: a function of no layer's file
    for path in sorted(sources, key=lambda one: (one.name, str(one))):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def write_weights(path: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Write `weights` as safetensors, whole or not at all."""
    checkpoint.write_tensors(path, {name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()})


def offsets(path: Path) -> dict[str, tuple[int, int]]:
    """Where each tensor of a safetensors file begins, and its length [bytes]."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    return {name: (8 + length + one["data_offsets"][0], one["data_offsets"][1] - one["data_offsets"][0])
            for name, one in header.items() if name != "__metadata__"}  # fmt: skip


def dynamic_shapes(module: nn.Module, recipe: EngineRecipe) -> tuple[Any, ...]:
    """The recipe's ranges as torch.export takes them, in the order of the module's arguments."""
    dims = {name: torch.export.Dim(name, min=max(1, low), max=high) for name, (low, _, high) in recipe.ranges.items() if low < high}
    shapes = [
        {i: dims[symbol(axis)] for i, axis in enumerate(binding.axes) if symbol(axis) in dims} for binding in recipe.inputs
    ]
    kinds = [one.kind for one in inspect.signature(module.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL not in kinds:
        return tuple(shapes)
    plain = kinds.index(inspect.Parameter.VAR_POSITIONAL)
    return (*shapes[:plain], tuple(shapes[plain:]))


def _wrong_operator(error: BaseException) -> str:
    """The operator that an exporter's error is about, as well as can be told."""
    said = ""
    cause: BaseException | None = error
    while cause is not None:
        said += f"\n{cause}"
        cause = cause.__cause__ or cause.__context__
    found = re.search(r"(aten[.:][\w.:]+|prims[.:][\w.:]+|torch\.ops\.[\w.]+|torchvision[.:][\w.:]+)", said)
    return found.group(1) if found else "?"


def _where(program: torch.export.ExportedProgram | None, operator: str) -> str:
    """The module whose operator that is."""
    for node in program.graph.nodes if program is not None else ():
        if node.op == "call_function" and operator.split(".")[-1] in str(node.target) and (stack := node.meta.get("nn_module_stack")):
            return str(list(stack.values())[-1][0]).removeprefix("L['self'].")
    return ""


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.__trace", "onnxscript")]
    levels = [one.level for one in loggers]
    for one in loggers:
        one.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)


def traced(module: nn.Module, recipe: EngineRecipe, given: tuple[torch.Tensor, ...] | None = None) -> torch.export.ExportedProgram:
    """`module` as one graph of torch's operators, for all lengths of the recipe. ExportError as `to_onnx`."""
    if given is None:
        device = next((one.device for one in state(module).values()), torch.device("cpu"))
        given = recipe.example({name: max(2, opt) for name, (_, opt, _) in recipe.ranges.items()}, device=str(device))
    try:
        with torch.no_grad(), _quietly():
            return torch.export.export(module, given, dynamic_shapes=dynamic_shapes(module, recipe), strict=False)
    except Exception as error:
        raise ExportError(
            f"{recipe.name}: {type(module).__name__} cannot be traced for {dict(recipe.ranges)} (operator {_wrong_operator(error)}): "
            f"{said(error)[0]}"
        ) from error


def to_onnx(module: nn.Module, recipe: EngineRecipe, folder: Path, opset: int = OPSET) -> None:
    """Write `graph.onnx` and `weights.safetensors` of `module` (in the recipe's precision, see `prepared`) into `folder`; `module` is used up.

    A layer that has a method `channels_first` is exchanged for what that gives: the same function and weights, as ONNX's runtimes lay out pictures.

    Raises ExportError that names the module and the operator, EngineError where onnx or onnxscript is not installed.
    """
    if opset > NEWEST_OPSET:
        raise EngineError(f"{recipe.name}: opset {opset}: TensorRT builds {NEWEST_OPSET} at most")
    try:
        import onnx_ir as ir
        import onnxscript  # noqa: F401 -- torch.onnx needs it
    except ImportError as error:
        raise EngineError(f"{recipe.name}: {error.name} is not installed, and exports need it: pip install onnx onnxscript") from error
    module = _exchanged(module.cpu(), _by("channels_first"))
    program = traced(module, recipe)  # its example is made there; `prepared` made this copy
    names = [binding.name for binding in recipe.inputs]
    outputs = [f"out_{name}" for name in recipe.outputs]  # operators of a graph are called mean and the like, and names must differ
    try:
        with torch.no_grad(), _quietly():
            made = torch.onnx.export(
                program, (), dynamo=True, opset_version=opset, input_names=names, output_names=outputs, verbose=False, optimize=False,
                custom_translation_table=FORMS,
            )
    except Exception as error:
        operator = _wrong_operator(error)
        place = _where(program, operator)
        raise ExportError(
            f"{recipe.name}: {type(module).__name__}{f'.{place}' if place else ''}: operator {operator} has no ONNX form at opset {opset}; "
            "write it with others, or use back end inductor, which needs none"
        ) from error
    assert made is not None
    graph, weights = made.model, state(module)
    _fold(graph, weights)
    for node in graph.graph.all_nodes():
        node.metadata_props.clear()  # stack traces of whoever exported it: megabytes, and never the same
    kept = {name: weights[name] for name in graph.graph.initializers if name in weights}
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder / WEIGHTS, kept)
    place_of = offsets(folder / WEIGHTS)
    for name in kept:
        value = graph.graph.initializers[name]
        tensor = value.const_value
        offset, length = place_of[name]
        value.const_value = ir.ExternalTensor(WEIGHTS, offset, length, tensor.dtype, shape=tensor.shape, name=name, base_dir=str(folder))
    with checkpoint.atomic(folder / GRAPH) as temporary:
        ir.save(graph, temporary)


def _fold(graph: Any, weights: Mapping[str, torch.Tensor]) -> None:
    """Compute what depends on neither inputs nor weights: TensorRT wants axes that are constants.

    All of onnxscript's optimizer tries its rules at every node: that takes longer than the export, and ends with the same operators.
    """
    from onnxscript import optimizer

    def should_fold(node: Any) -> bool | None:
        return False if any(one is not None and one.name in weights for one in node.inputs) else None

    optimizer.fold_constants_ir(graph, should_fold=should_fold)
    optimizer.remove_unused_nodes(graph)


def exported(module: nn.Module, recipe: EngineRecipe, store: Store, folder: Path, opset: int = OPSET) -> None:
    """As `to_onnx`; the graph is taken from `store` where it has been exported before, with whatever weights: that is the slow part.

    EngineError where the weights do not lie in the file as the graph has them.
    """
    versions = {"torch": torch.__version__, "opset": str(opset), **{name: _version(name) for name in ("onnx", "onnxscript")}}
    wanted = Wanted(recipe.name, "graph", "any", recipe.precision, architecture(module, recipe), "any", versions)
    graph = store.get(wanted, lambda part: to_onnx(module, recipe, part, opset))
    place_of, weights = offsets(graph.folder / WEIGHTS), state(module)
    write_weights(folder / WEIGHTS, {name: weights[name] for name in place_of})
    if offsets(folder / WEIGHTS) != place_of:
        raise EngineError(f"{recipe.name}: weights of other shapes or types than the graph in {graph.folder}; remove that, and build anew")
    shutil.copyfile(graph.folder / GRAPH, folder / GRAPH)
    store.release(graph.key)  # a plan has a copy: the graph only spares the next export


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"

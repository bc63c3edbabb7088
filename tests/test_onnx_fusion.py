"""Our own operators in graphs of ONNX Runtime: they take the place of a pattern and give what it gave; where it nearly is one, they do not."""

from __future__ import annotations

import contextlib
import copy
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from mutation import mutate
from onnx import TensorProto, helper
from torch import nn

from worldenv import _core
from worldenv.engines import export, onnx_fusion, onnxruntime
from worldenv.engines.recipe import Binding, EngineError, EngineRecipe, relative_error
from worldenv.engines.store import Store

TOLERANCE = 3e-6
BATCH = {"batch": (1, 2, 4)}
Forward = Callable[..., torch.Tensor]


class Made(nn.Module):
    """A function of inputs and of the weights of layers."""

    def __init__(self, forward: Forward, **layers: nn.Module) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        for name, layer in layers.items():
            self.add_module(name, layer)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        self._forward = forward

    def forward(self, *given: torch.Tensor) -> torch.Tensor:
        return self._forward(self, *given)


def pictures(channels: int, row: int = 20) -> tuple[Binding, ...]:
    return (Binding("x", {**BATCH, "channel": channels, "height": 5, "width": row}, spread=2.0),)


def rows(*names: str, width: int = 12) -> tuple[Binding, ...]:
    return tuple(Binding(name, {**BATCH, "row": 7, "width": width}, spread=2.0) for name in names)


def tokens(name: str, count: int, heads_first: bool = False) -> Binding:
    axes = {"head": 3, f"{name}_token": count} if heads_first else {f"{name}_token": count, "head": 3}
    return Binding(name, {**BATCH, **axes, "width": 10})


def norm() -> nn.GroupNorm:
    return nn.GroupNorm(3, 12, eps=1e-2)


def last(y: torch.Tensor) -> torch.Tensor:
    return y.permute(0, 2, 3, 1)


def attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None, mask: torch.Tensor | None = None) -> torch.Tensor:
    return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask, scale=scale).transpose(1, 2)


def attends(keys: int, **more: Any) -> tuple[nn.Module, tuple[Binding, ...]]:
    module = Made(lambda m, q, k, v: attended(q, k.transpose(1, 2), v.transpose(1, 2), **more))
    return module, (tokens("q", 19), tokens("k", keys), tokens("v", keys))


def convolves(row: int = 20, channels: int = 7, channels_in: int = 6, **more: Any) -> tuple[nn.Module, tuple[Binding, ...]]:
    given = {"kernel_size": 3, "padding": 1, **more}
    return Made(lambda m, x: m.conv(x), conv=nn.Conv2d(channels_in, channels, **given)), pictures(channels_in, row)


def _learned(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = (q.transpose(1, 2) * module.t[0]) @ k.transpose(1, 2).transpose(2, 3)
    return (scores.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2)


CASES: dict[str, tuple[tuple[nn.Module, tuple[Binding, ...]], dict[str, int]]] = {
    "norm": ((Made(lambda m, x: m.norm(x), norm=norm()), pictures(12)), {"GroupNorm": 1}),
    "norm and SiLU": ((Made(lambda m, x: F.silu(m.norm(x)) + 1.0, norm=norm()), pictures(12)), {"GroupNorm": 1}),
    "norm, turned, and SiLU": ((Made(lambda m, x: F.silu(last(m.norm(x))) + 1.0, norm=norm()), pictures(12)), {"GroupNorm": 1}),
    "norm that two use": ((Made(lambda m, x: F.silu(m.norm(x)) + last(m.norm(x)).sum(), norm=norm()), pictures(12)), {"GroupNorm": 2}),
    "its SiLU is not all": ((Made(lambda m, x: _twice(m.norm(x)), norm=norm()), pictures(12)), {"GroupNorm": 1}),
    "turned, its SiLU is not all": ((Made(lambda m, x: _twice(last(m.norm(x))), norm=norm()), pictures(12)), {"GroupNorm": 1}),
    "its sigmoid is used": ((Made(lambda m, x: _sigmoid(m.norm(x)), norm=norm()), pictures(12)), {"GroupNorm": 1}),
    "layer norm": ((Made(lambda m, x: m.norm(x), norm=nn.LayerNorm(12, eps=1e-2)), rows("x")), {"LayerNorm": 1}),
    "layer norm of two axes": ((Made(lambda m, x: m.norm(x), norm=nn.LayerNorm((7, 12))), rows("x")), {}),
    "layer norm without bias": ((Made(lambda m, x: m.norm(x), norm=nn.LayerNorm(12, bias=False)), rows("x")), {}),
    "gate behind": ((Made(lambda m, x, y: x * F.gelu(y)), rows("x", "y")), {"GatedGelu": 1}),
    "gate before": ((Made(lambda m, x, y: F.gelu(x) * y), rows("x", "y")), {"GatedGelu": 1}),
    "another GELU": ((Made(lambda m, x, y: x * F.gelu(y, approximate="tanh")), rows("x", "y")), {}),
    "one gate for all": ((Made(lambda m, x, y: x * F.gelu(y[:, :, :1])), rows("x", "y")), {}),
    "own keys": (attends(12), {"FewKeysAttention": 1}),
    "a scale that is learned": (
        (Made(_learned, t=nn.ParameterList([torch.ones(1)])), (tokens("q", 19), tokens("k", 12), tokens("v", 12))), {},
    ),
    "own keys, own scale": (attends(31, scale=0.7), {"FewKeysAttention": 1}),
    "keys of a context": (
        (Made(lambda m, q, k, v: attended(q, k, v)), (tokens("q", 19), tokens("k", 16, True), tokens("v", 16, True))), {"FewKeysAttention": 1},
    ),
    "many keys": (attends(33), {}),
    "seen keys": (attends(12, mask=torch.ones(19, 12).tril()), {}),
    "narrow": (convolves(), {"NarrowConv": 1}),
    "narrow and many": (convolves(row=256), {"NarrowConv": 1}),
    "wide": (convolves(channels=9), {}),
    "short rows": (convolves(row=15), {}),
    "long rows": (convolves(row=257), {}),
    "every other": (convolves(stride=2), {}),
    "spread": (convolves(dilation=2), {}),
    "not padded": (convolves(padding=0), {}),
    "two taps": (convolves(kernel_size=2), {}),
    "in groups": (convolves(channels=6, groups=2), {}),
    "without bias": (convolves(bias=False), {"NarrowConv": 1}),
    "three rows": (convolves(channels=32, channels_in=16), {"WinogradConv": 1}),
    "three rows, nothing above": (convolves(channels=16, channels_in=17, padding=(0, 1)), {"WinogradConv": 1}),
    "three rows of one column": (convolves(channels=48, channels_in=16, kernel_size=(3, 1), padding=0), {"WinogradConv": 1}),
    "three rows of one column, one above": (convolves(channels=16, channels_in=16, kernel_size=(3, 1), padding=(1, 0)), {"WinogradConv": 1}),
    "every other of three rows": (convolves(channels=16, channels_in=16, stride=2), {}),
    "three columns": (convolves(channels=16, channels_in=16, kernel_size=(1, 3), padding=(0, 1)), {}),
    "rows of 18": (convolves(row=18, channels=16, channels_in=16), {}),
    "24 channels": (convolves(channels=24, channels_in=16), {}),
    "from few channels": (convolves(channels=16, channels_in=15), {}),
    "a weight that is given": (
        (Made(lambda m, x, w: F.conv2d(x, w, padding=1)), (*pictures(16), Binding("w", {"out": 16, "in": 16, "row": 3, "column": 3}))), {},
    ),
    "columns without zeros": (convolves(channels=16, channels_in=16, padding=(1, 0)), {}),
}  # fmt: skip


def _twice(y: torch.Tensor) -> torch.Tensor:
    return F.silu(y) + y


def _sigmoid(y: torch.Tensor) -> torch.Tensor:
    gate = torch.sigmoid(y)
    return y * gate + gate


def built(case: str, folder: Path) -> tuple[EngineRecipe, dict[str, int]]:
    """A plan in `folder`, and our operators in it."""
    (module, inputs), _ = CASES[case]
    recipe = EngineRecipe("toy", inputs, ("y",), TOLERANCE)
    onnxruntime.build(export.prepared(module, recipe), recipe, folder, "cpu", Store(folder / "graphs"))
    model = onnx.load(folder / export.GRAPH, load_external_data=False)
    return recipe, dict(Counter(node.op_type for node in model.graph.node if node.domain == onnx_fusion.DOMAIN))


def error(case: str, folder: Path) -> float:
    """Largest over several batches."""
    module, (recipe, _) = CASES[case][0][0], built(case, folder)
    engine = onnxruntime.load(folder, recipe, torch.device("cpu"))
    given = [recipe.example({"batch": batch}, seed=batch) for batch in (1, 2, 4)]
    with torch.no_grad():
        return max(relative_error(engine(*one), module(*one)) for one in given)


def is_wrong(case: str, folder: Path) -> bool:
    """Another result, or an operator that refuses what it is given."""
    try:
        return not error(case, folder) < TOLERANCE
    except EngineError as refused:
        return re.search(r"worldenv\.\w+: want", str(refused)) is not None


@pytest.mark.parametrize("case", CASES)
def test_takes_the_place_of_a_pattern(case: str, tmp_path: Path) -> None:
    assert built(case, tmp_path)[1] == CASES[case][1]
    assert error(case, tmp_path) < TOLERANCE


@pytest.mark.parametrize("case", ["norm", "layer norm", "narrow", "three rows"])
def test_a_refit_reaches_its_weights(case: str, tmp_path: Path) -> None:
    module, (recipe, _) = CASES[case][0][0], built(case, tmp_path)
    engine = onnxruntime.load(tmp_path, recipe, torch.device("cpu"))
    given, other = recipe.example({"batch": 2}, seed=2), copy.deepcopy(module)
    for parameter in other.parameters():
        parameter.data = parameter.data.flip(0) - 0.5
    engine.refit(export.state(other))
    with torch.no_grad():
        assert relative_error(engine(*given), other(*given)) < TOLERANCE
        assert not relative_error(engine(*given), module(*given)) < 0.1


WRONG: dict[str, tuple[str, Callable[..., Any], str, str]] = {
    "SiLU always": ("norm", onnx_fusion._group_norm, "silu=int(activated is not None)", "silu=1"),
    "SiLU never": ("norm, turned, and SiLU", onnx_fusion._group_norm, "silu=int(activated is not None)", "silu=0"),
    "SiLU for the others too": ("its SiLU is not all", onnx_fusion._silu, "len(users) != 2 or by_kind.keys() != ", "not by_kind.keys() >= "),
    "SiLU for its sigmoid too": ("its sigmoid is used", onnx_fusion._silu, ' or _used_by(by_kind["Sigmoid"].outputs[0]) != [by_kind["Mul"]]', ""),
    "one group": ("norm", onnx_fusion._group_norm, "groups=len(ones)", "groups=1"),
    "another epsilon": ("norm", onnx_fusion._group_norm, "epsilon=epsilon", "epsilon=1e-5"),
    "bias for weight": ("norm", onnx_fusion._group_norm, "source, weight, bias", "source, bias, weight"),
    "another epsilon of rows": ("layer norm", onnx_fusion._layer_norm, 'norm.attributes.get_float("epsilon", 1e-5)', "1e-5"),
    "gate for value": ("gate behind", onnx_fusion._gated_gelu, "value, gelu.inputs[0])", "gelu.inputs[0], value)"),
    "any GELU": ("another GELU", onnx_fusion._gated_gelu, 'gelu.attributes.get_string("approximate", "none") != "none"', "False"),
    "gates of any shape": ("one gate for all", onnx_fusion._gated_gelu, " or value.shape != gate.shape", ""),
    "no scale": ("own keys", onnx_fusion._few_keys, "scale=float(scale.reshape(()))", "scale=1.0"),
    "heads behind rows": ("keys of a context", onnx_fusion._few_keys, "heads_first=int(heads_first)", "heads_first=0"),
    "values for keys": ("own keys", onnx_fusion._few_keys, '"FewKeysAttention", q, k, v', '"FewKeysAttention", q, v, k'),
    "any number of keys": ("many keys", onnx_fusion._fits, "keys <= _core.MOST_KEYS", "keys"),
    "any stride": ("every other", onnx_fusion._conv, '("strides", "dilations")', '("dilations",)'),
    "any dilation": ("spread", onnx_fusion._conv, '("strides", "dilations")', '("strides",)'),
    "any padding": ("not padded", onnx_fusion._narrow_conv, "or pads != (1, 1, 1, 1) ", ""),
    "any groups": ("in groups", onnx_fusion._conv, 'and asked.get_int("group", 1) == 1', ""),
    "any channels": ("wide", onnx_fusion._narrow_conv, "channels_out <= _core.MOST_CHANNELS_OUT and ", ""),
    "other points": ("three rows", onnx_fusion._winograd_conv, "ir.tensor(_POINTS)", "ir.tensor(abs(_POINTS))"),
    "rows for columns": ("three rows", onnx_fusion._winograd_conv, '{"perm": (0, 3, 1, 2)}', '{"perm": (0, 2, 1, 3)}'),
    "channels in another order": ("three rows", onnx_fusion._winograd_conv, '{"perm": (4, 0, 2, 3, 1)}', '{"perm": (4, 1, 2, 3, 0)}'),
    "zeros above always": ("three rows, nothing above", onnx_fusion._winograd_conv, "above=pads[0]", "above=1"),
    "zeros above never": ("three rows", onnx_fusion._winograd_conv, "above=pads[0]", "above=0"),
    "zeros beside or not": ("columns without zeros", onnx_fusion._winograd_conv, "pads not in zeros.get((taps[0], taps[1]), []) or ", ""),
    "any row of quads": ("rows of 18", onnx_fusion._winograd_conv, "row % _core.QUAD or ", ""),
    "any row": ("long rows", onnx_fusion._narrow_conv, "<= row <= _core.MOST_ROW", "<= row"),
}


def break_rule(monkeypatch: pytest.MonkeyPatch, name: str, old: str, new: str) -> None:
    """Change the source of a rule, or of what it calls."""
    mutate(monkeypatch, onnx_fusion, name, old, new)
    monkeypatch.setattr(onnx_fusion, "_RULES", {kind: getattr(onnx_fusion, one.__name__) for kind, one in onnx_fusion._RULES.items()})


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_rule_is_seen(wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, rule, old, new = WRONG[wrong]
    break_rule(monkeypatch, rule.__name__, old, new)
    assert is_wrong(case, tmp_path)


GRAPHS = {
    "GroupNorm": """(float[N,6,5,4] x, float[6] w, float[6] b) => (float[N,6,5,4] out)
        <float[3] ones = {1.0, 1.0, 1.0}, float[3] zeros = {0.0, 0.0, 0.0}, int64[3] groups = {0, 3, -1}, int64[4] whole = {0, 6, 5, 4},
         float[6] mean = {0.0, 0.0, 0.0, 0.0, 0.0, 0.0}, float[6] spread = {1.0, 1.0, 1.0, 1.0, 1.0, 1.0}>
        {view = Reshape(x, groups)
         normed = InstanceNormalization<epsilon = 0.01>(view, ones, zeros)
         back = Reshape(normed, whole)
         y = BatchNormalization<epsilon = 0.0>(back, w, b, mean, spread)
         gate = Sigmoid(y)
         z = Mul(y, gate)
         out = Neg(z)}""",
    "LayerNorm": """(float[N,7,6] x, float[6] w, float[6] b) => (float[N,7,6] out) {out = LayerNormalization<axis = -1>(x, w, b)}""",
    "GatedGelu": """(float[N,7,6] x, float[N,7,6] y) => (float[N,7,6] out) {gate = Gelu<approximate = "none">(y)
         out = Mul(x, gate)}""",
    "NarrowConv": """(float[N,64,5,20] x, float[8,64,3,3] w, float[8] b) => (float[N,8,5,20] out)
        {out = Conv<pads = [1, 1, 1, 1]>(x, w, b)}""",
    "FewKeysAttention": """(float[3,3,3,128] q, float[3,32,3,128] k, float[3,32,3,128] v, float[1] other) => (float[3,3,3,128] out)
        <float[1] scale = {0.3}>
        {heads = Transpose<perm = [0, 2, 1, 3]>(q)
         scaled = Mul(heads, scale)
         keys = Transpose<perm = [0, 2, 1, 3]>(k)
         turned = Transpose<perm = [0, 1, 3, 2]>(keys)
         scores = MatMul(scaled, turned)
         shares = Softmax<axis = -1>(scores)
         values = Transpose<perm = [0, 2, 1, 3]>(v)
         seen = MatMul(shares, values)
         out = Transpose<perm = [0, 2, 1, 3]>(seen)}""",
}
"""Each holds the pattern of one operator, once."""
NEARLY: dict[str, tuple[str, str, str, str, str, str]] = {
    "weight of the view": ("GroupNorm", "ones = {1.0, 1.0", "ones = {1.0, 2.0", "_group_norm", "not _all(norm.inputs[1], 1.0) or ", ""),
    "bias of the view": ("GroupNorm", "zeros = {0.0, 0.0", "zeros = {0.0, 1.0", "_group_norm", " or not _all(norm.inputs[2], 0.0)", ""),
    "mean": ("GroupNorm", "mean = {0.0, 0.0", "mean = {0.0, 1.0", "_group_norm", "_all(mean, 0.0) and ", ""),
    "variance": ("GroupNorm", "spread = {1.0, 1.0", "spread = {1.0, 2.0", "_group_norm", "_all(variance, 1.0) and ", ""),
    "a second epsilon": (
        "GroupNorm", "epsilon = 0.0>", "epsilon = 0.1>",
        "_group_norm", ' and batch_norm.attributes.get_float("epsilon", 1e-5) == 0.0', "",
    ),
    "view of others": ("GroupNorm", "{0, 3, -1}", "{0, 3, 40}", "_group_norm", "groups is None or groups.tolist() != [0, len(ones), -1]", "False"),
    "another shape": ("GroupNorm", "float[N,6,5,4] x", "float[N,6,4,5] x", "_group_norm", " or source.shape != y.shape", ""),
    "rows of one weight": ("LayerNorm", "float[6] w", "float[1] w", "_layer_norm", "one is None or one.shape != x.shape[-1:]", "False"),
    "other rows": ("LayerNorm", "axis = -1", "axis = 1", "_layer_norm", ' or norm.attributes.get_int("axis", -1) != -1', ""),
    "channels in": ("NarrowConv", "64,", "65,", "_narrow_conv", " and channels_in <= _core.MOST_CHANNELS_IN", ""),
    "no bias": ("NarrowConv", "(x, w, b)", '(x, w, "")', "_conv", " or bias is None", ""),
    "padding by a name": (
        "NarrowConv", "pads", 'auto_pad = "VALID", pads',
        "_conv", ' or asked.get_string("auto_pad", "NOTSET") != "NOTSET"', "",
    ),
    "another axis": ("FewKeysAttention", "axis = -1", "axis = 2", "_few_keys", ' or softmax.attributes.get_int("axis", -1) != -1', ""),
    "a scale that is given": ("FewKeysAttention", "(heads, scale)", "(heads, other)", "_few_keys", "scale is None or scale.size != 1", "False"),
    "many scales": ("FewKeysAttention", "float[1] scale = {0.3}", "float[3,1,1] scale = {0.3, 0.4, 0.5}", "_few_keys", " or scale.size != 1", ""),
    "keys not turned": (
        "FewKeysAttention", "[0, 1, 3, 2]", "[1, 0, 3, 2]",
        "_few_keys", 'tuple(turned.attributes.get_ints("perm", ())) != (0, 1, 3, 2) or ', "",
    ),
    "rows not last": (
        "FewKeysAttention", "out = Transpose<perm = [0, 2, 1, 3]", "out = Transpose<perm = [0, 1, 2, 3]",
        "_few_keys", " or not _swap(users[0])", "",
    ),
    "rows not first": (
        "FewKeysAttention", "heads = Transpose<perm = [0, 2, 1, 3]", "heads = Transpose<perm = [0, 1, 2, 3]",
        "_few_keys", " and _swap(query)", "",
    ),
    "too wide": ("FewKeysAttention", ",128]", ",129]", "_fits", " and wide <= _core.MOST_WIDTH", ""),
    "no keys": ("FewKeysAttention", "[3,32,", "[3,0,", "_fits", "0 < keys", "keys"),
    "keys for all": ("FewKeysAttention", "[3,32,", "[1,32,", "_fits", "(k.shape[0], k.shape[1], wide) == (batch, heads, width)", "True"),
    "a head for all": ("FewKeysAttention", "32,3,", "32,1,", "_fits", "(k.shape[0], k.shape[1], wide) == (batch, heads, width)", "True"),
}  # fmt: skip
"""A graph, what makes it another one, and what of the rules sees that."""


def fused(text: str) -> list[ir.Node]:
    """Nodes of ours in a graph after fusion."""
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": {export.OPSET}]> graph {text}')
    graph = ir.from_proto(onnx.shape_inference.infer_shapes(model))
    onnx_fusion.fuse(graph)
    return [node for node in graph.graph if node.domain == onnx_fusion.DOMAIN]


@pytest.mark.parametrize("case", NEARLY)
def test_what_is_nearly_a_pattern_stays(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, old, new, rule, guard, without = NEARLY[case]
    assert old in GRAPHS[name]
    assert [one.op_type for one in fused(GRAPHS[name])] == [name]
    nearly = GRAPHS[name].replace(old, new)
    assert fused(nearly) == []
    break_rule(monkeypatch, rule, guard, without)
    with contextlib.suppress(AttributeError, ValueError):  # the rule cannot go on without it
        assert [one.op_type for one in fused(nearly)] == [name]


def test_a_silu_that_the_graph_gives_out_stays() -> None:
    inside = GRAPHS["GroupNorm"]
    given_out = inside.replace("(float[N,6,5,4] out)", "(float[N,6,5,4] z)").replace("out = Neg(z)", "")
    assert [one.attributes.get_int("silu") for text in (inside, given_out) for one in fused(text)] == [1, 0]


def operator(name: str, shapes: list[list[int]], **attributes: float) -> None:
    """Run one of our operators alone on numbers of these shapes."""
    names = [f"x{i}" for i in range(len(shapes))]
    inputs = [helper.make_tensor_value_info(one, TensorProto.FLOAT, shape) for one, shape in zip(names, shapes, strict=True)]
    node = helper.make_node(name, names, ["y"], domain=onnx_fusion.DOMAIN, **attributes)
    graph = helper.make_graph([node], "one", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    opsets = [helper.make_opsetid("", export.OPSET), helper.make_opsetid(onnx_fusion.DOMAIN, 1)]
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(_core.__file__)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    session.run(None, {one: torch.ones(shape).numpy() for one, shape in zip(names, shapes, strict=True)})


NORMED = {"groups": 3, "epsilon": 1e-5, "silu": 0}
KEYED = {"heads_first": 0, "scale": 1.0}


@pytest.mark.parametrize(
    ("name", "fits", "does_not", "attributes"),
    [
        ("GroupNorm", [[2, 6, 4], [6], [6]], [[2, 6, 4], [5], [6]], NORMED),
        ("GroupNorm", [[2, 6, 4], [6], [6]], [[2, 7, 4], [7], [7]], NORMED),
        ("LayerNorm", [[2, 6], [6], [6]], [[2, 6], [6], [1]], {"epsilon": 1e-5}),
        ("GatedGelu", [[2, 6], [2, 6]], [[2, 6], [1, 6]], {}),
        ("NarrowConv", [[2, 6, 4, 5], [8, 6, 3, 3], [8]], [[2, 6, 4, 5], [9, 6, 3, 3], [9]], {}),
        ("NarrowConv", [[2, 6, 4, 5], [8, 6, 3, 3], [8]], [[2, 6, 4, 5], [8, 6, 3, 2], [8]], {}),
        ("WinogradConv", [[2, 6, 4, 8], [6, 2, 3, 6, 16], [32]], [[2, 6, 4, 8], [6, 2, 2, 6, 16], [32]], {"above": 1}),
        ("WinogradConv", [[2, 6, 4, 8], [6, 2, 3, 6, 16], [32]], [[2, 6, 4, 8], [6, 2, 3, 5, 16], [32]], {"above": 1}),
        ("WinogradConv", [[2, 6, 4, 8], [6, 2, 1, 6, 16], [32]], [[2, 6, 4, 9], [6, 2, 1, 6, 16], [32]], {"above": 0}),
        ("WinogradConv", [[2, 6, 3, 8], [6, 2, 1, 6, 16], [32]], [[2, 6, 2, 8], [6, 2, 1, 6, 16], [32]], {"above": 0}),
        ("WinogradConv", [[2, 6, 4, 8], [6, 2, 3, 6, 16], [32]], [[2, 6, 4, 8], [6, 2, 3, 6, 16], [16]], {"above": 1}),
        ("FewKeysAttention", [[2, 9, 3, 8], [2, 4, 3, 8], [2, 4, 3, 8]], [[2, 9, 3, 8], [2, 33, 3, 8], [2, 33, 3, 8]], KEYED),
        ("FewKeysAttention", [[2, 9, 3, 8], [2, 4, 3, 8], [2, 4, 3, 8]], [[2, 9, 3, 8], [1, 4, 3, 8], [1, 4, 3, 8]], KEYED),
    ],
)
def test_an_operator_refuses_what_does_not_fit(name: str, fits: list[list[int]], does_not: list[list[int]], attributes: dict[str, float]) -> None:
    operator(name, fits, **attributes)
    with pytest.raises(Exception, match=f"worldenv.{name}: want"):
        operator(name, does_not, **attributes)
    if attributes:
        with pytest.raises(Exception, match="worldenv: "):  # an attribute that is not there
            operator(name, fits)

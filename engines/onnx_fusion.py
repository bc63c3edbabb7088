"""Operators of our own in a graph for ONNX Runtime on a CPU (csrc/onnxruntime): each stands for several of ONNX's, in one pass over memory.

    GroupNorm          an instance norm of groups between two views, then a batch norm (`onnx_forms`), and SiLU where that follows
    LayerNorm          LayerNormalization over the last axis
    GatedGelu          value * Gelu(gate)
    NarrowConv         a 3x3 convolution to so few channels that the runtime's blocks of 16 are half empty
    WinogradConv       a convolution of three rows and one or three columns, by half of the products (csrc/onnxruntime/winograd.hpp)
    FewKeysAttention   softmax(scale q k^T) v for few keys, with the transposes around it

All are of domain "worldenv", take float32, and give what they stand for to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from worldenv import _core

if TYPE_CHECKING:
    import onnx_ir as ir

DOMAIN = "worldenv"
_LEAST_ROW = 16
"""Pixels that NarrowConv computes at once: in shorter rows the runtime's own convolution is as fast."""
_LEAST_CHANNELS_IN, _MOST_CHANNELS_IN = 16, 256
"""Of WinogradConv: with fewer, what it does beside products costs what it saves; with more, weights leave the cache."""
_POINTS = np.array(
    [[1 / 4, -1 / 6, -1 / 6, 1 / 24, 1 / 24, 0], [0, -1 / 6, 1 / 6, 1 / 12, -1 / 12, 0], [0, -1 / 6, -1 / 6, 1 / 6, 1 / 6, 1]], np.float32
)
"""G of Winograd's F(4, 3), turned: three rows of a weight at the points 0, 1, -1, 2, -2 and infinity."""
_SWAPPED = (0, 2, 1, 3)
"""Heads before rows, or behind them again."""
Fused = tuple["ir.Value", "list[ir.Node]"]
"""What is replaced, and the nodes that give it, the last of which is the operator."""


def fuse(model: ir.Model) -> None:
    """Change `model` wherever a pattern is found that computes in float32."""
    import onnx_ir as ir
    from onnxscript import optimizer

    for node in list(model.graph):
        float32 = all(one is not None and one.dtype == ir.DataType.FLOAT for one in node.outputs)
        fused = _RULES[node.op_type](node) if float32 and node.domain == "" and node.op_type in _RULES else None
        if fused is None:
            continue
        replaced, nodes = fused
        node.append(nodes)
        (made,) = nodes[-1].outputs
        made.shape, made.type = replaced.shape, replaced.type
        if replaced.is_graph_output():  # it keeps its name there
            made.name, replaced.name = replaced.name, f"{replaced.name}_unfused"
        replaced.replace_all_uses_with(made, replace_graph_outputs=True)
        model.graph.opset_imports[DOMAIN] = 1
    optimizer.remove_unused_nodes(model)


def _own(name: str, *inputs: ir.Value | None, **attributes: float) -> list[ir.Node]:
    import onnx_ir as ir

    return [ir.node(name, inputs, attributes, domain=DOMAIN)]


def _made_by(kind: str, value: ir.Value | None) -> ir.Node | None:
    """The node of that kind which made `value`, where nothing but one node uses it."""
    node = None if value is None or value.is_graph_output() or len(value.uses()) != 1 else value.producer()
    return node if node is not None and node.domain == "" and node.op_type == kind else None


def _used_by(value: ir.Value) -> list[ir.Node]:
    """All nodes that use `value`; none where the graph gives it out."""
    return [] if value.is_graph_output() else [use.node for use in value.uses()]


def _constant(value: ir.Value | None) -> Any:
    """Its array, or None where it is no constant."""
    import onnx_ir as ir

    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    if isinstance(tensor, ir.ExternalTensor):  # a weight, which a refit changes
        return None
    return None if tensor is None else tensor.numpy()


def _all(value: ir.Value | None, number: float) -> bool:
    array = _constant(value)
    return array is not None and bool((array == number).all())


def _swap(node: ir.Node | None) -> bool:
    return node is not None and tuple(node.attributes.get_ints("perm", ())) == _SWAPPED


def _group_norm(batch_norm: ir.Node) -> Fused | None:
    x, weight, bias, mean, variance = batch_norm.inputs
    back = _made_by("Reshape", x)
    norm = back and _made_by("InstanceNormalization", back.inputs[0])
    view = norm and _made_by("Reshape", norm.inputs[0])
    if not (back and norm and view and _all(mean, 0.0) and _all(variance, 1.0) and batch_norm.attributes.get_float("epsilon", 1e-5) == 0.0):
        return None
    y, ones, source = batch_norm.outputs[0], _constant(norm.inputs[1]), view.inputs[0]
    groups = _constant(view.inputs[1])
    if ones is None or groups is None or groups.tolist() != [0, len(ones), -1] or not _all(norm.inputs[1], 1.0) or not _all(norm.inputs[2], 0.0):
        return None
    if source is None or y.shape is None or source.shape != y.shape:
        return None
    activated = _silu(y)
    if activated is not None:
        value, mul = activated
        mul.outputs[0].replace_all_uses_with(value)  # the operator gives it already
    epsilon = norm.attributes.get_float("epsilon", 1e-5)
    return y, _own("GroupNorm", source, weight, bias, groups=len(ones), epsilon=epsilon, silu=int(activated is not None))


def _silu(y: ir.Value) -> tuple[ir.Value, ir.Node] | None:
    """`y`, or `y` transposed, where both of its uses are in value * Sigmoid(value), and that product."""
    users = _used_by(y)
    if len(users) == 1 and users[0].op_type == "Transpose":
        y = users[0].outputs[0]
        users = _used_by(y)
    by_kind = {one.op_type: one for one in users}
    if len(users) != 2 or by_kind.keys() != {"Sigmoid", "Mul"} or _used_by(by_kind["Sigmoid"].outputs[0]) != [by_kind["Mul"]]:
        return None
    return None if by_kind["Mul"].outputs[0].is_graph_output() else (y, by_kind["Mul"])


def _layer_norm(norm: ir.Node) -> Fused | None:
    if len(norm.inputs) != 3 or norm.attributes.get_int("axis", -1) != -1:
        return None
    x, weight, bias = norm.inputs
    if x is None or x.shape is None or any(one is None or one.shape != x.shape[-1:] for one in (weight, bias)):
        return None
    return norm.outputs[0], _own("LayerNorm", *norm.inputs, epsilon=norm.attributes.get_float("epsilon", 1e-5))


def _gated_gelu(mul: ir.Node) -> Fused | None:
    for value, gate in (mul.inputs, mul.inputs[::-1]):
        gelu = _made_by("Gelu", gate)
        if gelu is None or value is None or gate is None or value.shape is None or value.shape != gate.shape:
            continue
        if gelu.attributes.get_string("approximate", "none") != "none":
            continue
        return mul.outputs[0], _own("GatedGelu", value, gelu.inputs[0])
    return None


def _conv(conv: ir.Node) -> Fused | None:
    """By `_narrow_conv` or `_winograd_conv`, where one fits: plain ones, with weights and rows of a known size."""
    if len(conv.inputs) != 3:
        return None
    x, weight, bias = conv.inputs
    asked = conv.attributes
    plain = all(tuple(asked.get_ints(name, (1, 1))) == (1, 1) for name in ("strides", "dilations")) and asked.get_int("group", 1) == 1
    if x is None or weight is None or bias is None or not plain or asked.get_string("auto_pad", "NOTSET") != "NOTSET":
        return None
    if x.shape is None or len(x.shape) != 4 or weight.shape is None or not weight.shape.is_static() or not isinstance(row := x.shape[3], int):
        return None
    pads, shape = tuple(asked.get_ints("pads", (0, 0, 0, 0))), weight.shape.numpy()
    own = _narrow_conv(conv, row, shape, pads) or _winograd_conv(conv, row, shape, pads)
    return None if own is None else (conv.outputs[0], own)


def _narrow_conv(conv: ir.Node, row: int, shape: tuple[int, ...], pads: tuple[int, ...]) -> list[ir.Node] | None:
    channels_out, channels_in, *taps = shape
    few = channels_out <= _core.MOST_CHANNELS_OUT and channels_in <= _core.MOST_CHANNELS_IN
    if taps != [3, 3] or pads != (1, 1, 1, 1) or not few or not _LEAST_ROW <= row <= _core.MOST_ROW:
        return None
    return _own("NarrowConv", *conv.inputs)


def _winograd_conv(conv: ir.Node, row: int, shape: tuple[int, ...], pads: tuple[int, ...]) -> list[ir.Node] | None:
    import onnx_ir as ir

    (x, weight, bias), (channels_out, channels_in, *taps) = conv.inputs, shape
    zeros = {(3, 1): [(0, 0, 0, 0), (1, 0, 1, 0)], (3, 3): [(0, 1, 0, 1), (1, 1, 1, 1)]}  # above, left, below, right
    if pads not in zeros.get((taps[0], taps[1]), []) or row % _core.QUAD or channels_out % _core.PANEL:
        return None
    if not _LEAST_CHANNELS_IN <= channels_in <= _MOST_CHANNELS_IN or weight is None or not weight.is_initializer():
        return None
    turned = ir.node("Transpose", [weight], {"perm": (0, 3, 1, 2)})
    points = ir.node("Constant", [], {"value": ir.tensor(_POINTS)})
    made = ir.node("MatMul", [turned.outputs[0], points.outputs[0]])
    panels = ir.node("Constant", [], {"value": ir.tensor([channels_out // _core.PANEL, _core.PANEL, taps[1], channels_in, 6])})
    cut = ir.node("Reshape", [made.outputs[0], panels.outputs[0]])
    beside = ir.node("Transpose", [cut.outputs[0]], {"perm": (4, 0, 2, 3, 1)})
    # Of a weight alone, all but the last: the runtime computes that once, when it loads the graph with whatever weights.
    return [turned, points, made, panels, cut, beside, *_own("WinogradConv", x, beside.outputs[0], bias, above=pads[0])]


def _few_keys(product: ir.Node) -> Fused | None:
    softmax = _made_by("Softmax", product.inputs[0])
    scores = softmax and _made_by("MatMul", softmax.inputs[0])
    scaled = scores and _made_by("Mul", scores.inputs[0])
    query = scaled and _made_by("Transpose", scaled.inputs[0])
    turned = scores and _made_by("Transpose", scores.inputs[1])
    if not (softmax and scores and scaled and query and turned and _swap(query)) or softmax.attributes.get_int("axis", -1) != -1:
        return None
    users, scale = _used_by(product.outputs[0]), _constant(scaled.inputs[1])
    if len(users) != 1 or users[0].op_type != "Transpose" or not _swap(users[0]) or scale is None or scale.size != 1:
        return None
    q, k, v = query.inputs[0], turned.inputs[0], product.inputs[1]
    if q is None or k is None or v is None or tuple(turned.attributes.get_ints("perm", ())) != (0, 1, 3, 2) or not _fits(q, k, v):
        return None
    rows_first = [_made_by("Transpose", one) for one in (k, v)]
    heads_first = not all(_swap(one) for one in rows_first)
    if not heads_first:
        k, v = (one and one.inputs[0] for one in rows_first)
    return users[0].outputs[0], _own("FewKeysAttention", q, k, v, heads_first=int(heads_first), scale=float(scale.reshape(())))


def _fits(q: ir.Value, k: ir.Value, v: ir.Value) -> bool:
    """`q` (B, L, H, E), `k` and `v` (B, H, keys, E): as many rollouts and heads in all, few keys, and not too wide."""
    if q.shape is None or k.shape is None or v.shape is None or k.shape != v.shape:
        return False
    batch, _, heads, width = q.shape
    keys, wide = k.shape[2], k.shape[3]
    counted = isinstance(keys, int) and isinstance(wide, int) and 0 < keys <= _core.MOST_KEYS and wide <= _core.MOST_WIDTH
    return counted and (k.shape[0], k.shape[1], wide) == (batch, heads, width)


_RULES: dict[str, Callable[[ir.Node], Fused | None]] = {
    "BatchNormalization": _group_norm, "LayerNormalization": _layer_norm, "Mul": _gated_gelu, "Conv": _conv,
    "MatMul": _few_keys,
}  # fmt: skip
"""By the kind of a pattern's last node of its own."""

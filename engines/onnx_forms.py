"""How operators of torch are written in ONNX, where the exporter's own form computes shapes anew at every call, which no runtime sees through.

Each takes what torch's operator takes, and is called while a graph is written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def _attention(
    query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:  # fmt: skip
    """softmax(q k^T scale + mask) v of (B, heads, L, E); a mask is added, or true where a key is seen.

    The transposed keys go straight into the product, so that a runtime's product can read them as they lie.
    """
    import onnx_ir as ir
    from onnxscript import opset18 as op

    if dropout_p or is_causal:
        raise NotImplementedError("attention with dropout or is_causal: give it a mask")
    if enable_gqa:
        key, value = (_repeated(one, query.shape[1]) for one in (key, value))
    factor = op.Constant(value_float=query.shape[-1] ** -0.5 if scale is None else scale)
    scores = op.MatMul(op.Mul(query, op.CastLike(factor, query)), op.Transpose(key, perm=[0, 1, 3, 2]))
    if attn_mask is not None and attn_mask.dtype == ir.DataType.BOOL:
        scores = op.Where(attn_mask, scores, op.CastLike(op.Constant(value_float=float("-inf")), scores))
    elif attn_mask is not None:
        scores = op.Add(scores, attn_mask)
    return op.MatMul(op.Softmax(scores, axis=-1), value)


def _repeated(one: Any, heads: int) -> Any:
    """(B, heads, L, E) of (B, fewer, L, E): each for as many heads in a row as share it."""
    from onnxscript import opset18 as op

    _, fewer, _, width = one.shape
    wide = op.Expand(op.Unsqueeze(one, op.Constant(value_ints=[2])), op.Constant(value_ints=[1, 1, heads // fewer, 1, 1]))
    return op.Reshape(wide, op.Constant(value_ints=[0, heads, -1, width]))


def _group_norm(
    x: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, cudnn_enabled: bool = True
) -> Any:
    """Of (N, C, H, W), of which N alone may be unknown: an instance norm of groups, then weight and bias in one pass, as batch norms have it."""
    from onnxscript import opset18 as op

    channels = x.shape[1]
    ones, zeros = (op.CastLike(op.Constant(value_floats=[value] * num_groups), x) for value in (1.0, 0.0))
    groups = op.Reshape(x, op.Constant(value_ints=[0, num_groups, -1]))
    y = op.Reshape(op.InstanceNormalization(groups, ones, zeros, epsilon=eps), op.Constant(value_ints=[0, *x.shape[1:]]))
    if weight is None and bias is None:
        return y
    one, zero = (op.CastLike(op.Constant(value_floats=[value] * channels), x) for value in (1.0, 0.0))
    return op.BatchNormalization(y, one if weight is None else weight, zero if bias is None else bias, zero, one, epsilon=0.0)


FORMS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten.scaled_dot_product_attention.default: _attention,
    torch.ops.aten.group_norm.default: _group_norm,
}
"""By torch's operator, as `torch.onnx.export` takes them."""

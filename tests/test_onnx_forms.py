"""Attention and group norm as ONNX has them here, run by ONNX Runtime against torch, at lengths that the example did not have."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mutation import mutate
from torch import nn

from worldenv.engines import export, onnx_forms, onnxruntime
from worldenv.engines.recipe import Binding, EngineError, EngineRecipe, relative_error

TOLERANCE = 1e-5
HEADS, SHARED, WIDTH, CHANNELS, GROUPS = 4, 2, 6, 12, 3


class Attention(nn.Module):
    """Queries to keys and values that fewer heads have, `scale` and mask as given."""

    def __init__(self, scale: float | None, shared: bool) -> None:
        super().__init__()
        self.scale, self.shared = scale, shared

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale, enable_gqa=self.shared)


class Plain(nn.Module):
    """Without a mask."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class Dropped(nn.Module):
    """What the form does not have."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Norm(nn.Module):
    """With weights that are not 1 and 0, or without."""

    def __init__(self, weight: bool, bias: bool) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(CHANNELS, generator=draw), False) if weight else None
        self.bias = nn.Parameter(torch.randn(CHANNELS, generator=draw), False) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.group_norm(x, GROUPS, self.weight, self.bias, 1e-3)


def attention_inputs(shared: bool, mask: str | None) -> tuple[Binding, ...]:
    rows, heads = {"batch": (1, 2, 4)}, SHARED if shared else HEADS
    keys = {**rows, "head": heads, "key": (1, 5, 40), "channel": WIDTH}
    inputs = [Binding("q", {**rows, "head": HEADS, "query": (1, 3, 40), "channel": WIDTH}), Binding("k", keys), Binding("v", keys)]
    if mask is not None:
        inputs.append(Binding("mask", {**rows, "one": 1, "query": (1, 3, 40), "key": (1, 5, 40)}, "bool" if mask == "bool" else "model"))
    return tuple(inputs)


NORM = (Binding("x", {"batch": (1, 2, 4), "channel": CHANNELS, "height": 3, "width": 5}, spread=0.3),)
CASES: dict[str, tuple[nn.Module, tuple[Binding, ...]]] = {
    "plain": (Plain(), attention_inputs(False, None)),
    "bool mask": (Attention(None, False), attention_inputs(False, "bool")),
    "added mask, own scale": (Attention(0.3, False), attention_inputs(False, "model")),
    "shared heads": (Attention(None, True), attention_inputs(True, "bool")),
    "norm": (Norm(True, True), NORM),
    "norm with bias alone": (Norm(False, True), NORM),
    "norm without weights": (Norm(False, False), NORM),
}


def exported(module: nn.Module, inputs: tuple[Binding, ...], folder: Path) -> EngineRecipe:
    """`module` as a graph in `folder`."""
    recipe = EngineRecipe("toy", inputs, ("y",), 1e-5)
    export.to_onnx(export.prepared(module, recipe), recipe, folder)
    return recipe


def error(case: str, folder: Path) -> float:
    """Largest over several lengths, keys half masked."""
    module, inputs = CASES[case]
    recipe = exported(module, inputs, folder)
    engine, worst = onnxruntime.load(folder, recipe, torch.device("cpu")), 0.0
    for batch, query, key in ((2, 3, 5), (1, 1, 7), (3, 40, 1), (4, 2, 33)):
        given = list(recipe.example({"batch": batch, "query": query, "key": key}, seed=batch))
        if given[-1].dtype == torch.bool:
            given[-1] = torch.rand(given[-1].shape, generator=torch.Generator().manual_seed(key)) < 0.5
            given[-1][..., 0] = True
        worst = max(worst, relative_error(engine(*given), module(*given)))
    return worst


@pytest.mark.parametrize("case", CASES)
def test_is_torchs(case: str, tmp_path: Path) -> None:
    assert error(case, tmp_path) < TOLERANCE


SCALE, REPEATS = "query.shape[-1] ** -0.5 if scale is None else scale", "[2])), op.Constant(value_ints=[1, 1, heads // fewer, 1, 1]"
WRONG: dict[str, tuple[str, Callable[..., Any], str, str]] = {
    "no scale": ("plain", onnx_forms._attention, SCALE, "1.0"),
    "its own scale": ("added mask, own scale", onnx_forms._attention, SCALE, "query.shape[-1] ** -0.5"),
    "softmax over queries": ("plain", onnx_forms._attention, "axis=-1", "axis=-2"),
    "mask turned round": ("bool mask", onnx_forms._attention, "op.Where(attn_mask, ", "op.Where(op.Not(attn_mask), "),
    "mask forgotten": ("added mask, own scale", onnx_forms._attention, "op.Add(scores, attn_mask)", "scores"),
    "heads in turn": ("shared heads", onnx_forms._repeated, REPEATS, "[1])), op.Constant(value_ints=[1, heads // fewer, 1, 1, 1]"),
    "another epsilon": ("norm", onnx_forms._group_norm, "epsilon=eps", "epsilon=1e-5"),
    "an epsilon twice": ("norm", onnx_forms._group_norm, "epsilon=0.0", "epsilon=1e-3"),
    "bias forgotten": ("norm", onnx_forms._group_norm, "zero if bias is None else bias", "zero"),
    "one group": ("norm", onnx_forms._group_norm, "[0, num_groups, -1]", "[0, 1, -1]"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_form_is_seen(wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, function, old, new = WRONG[wrong]
    mutate(monkeypatch, onnx_forms, function.__name__, old, new)
    monkeypatch.setattr(export, "FORMS", {operator: getattr(onnx_forms, form.__name__) for operator, form in onnx_forms.FORMS.items()})
    with contextlib.suppress(EngineError):  # a graph that does not run is seen as well
        assert not error(case, tmp_path) < TOLERANCE


def test_no_shape_is_computed_when_it_runs(tmp_path: Path) -> None:
    import onnx

    for case in ("shared heads", "norm"):
        exported(*CASES[case], tmp_path / case)
        graph = onnx.load(tmp_path / case / export.GRAPH, load_external_data=False).graph
        assert not {"Shape", "Gather", "Slice", "Concat"} & {node.op_type for node in graph.node}, case


def test_what_has_no_form_is_named(tmp_path: Path) -> None:
    with pytest.raises(export.ExportError, match="scaled_dot_product_attention"):
        exported(Dropped(), attention_inputs(False, None), tmp_path)

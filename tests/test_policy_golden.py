"""Wrong versions of the published model do not give its numbers (test_golden.py holds that ours does), and what the cases leave open."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from tests.golden.oft import KINDS, network_of
from worldenv.policy import heads, llama, processing, vision
from worldenv.policy.heads import by_step
from worldenv.policy.llama import LlamaModel
from worldenv.policy.openvla_oft import Network

CASES = Path(__file__).parent / "golden" / "cases"


def _case(name: str) -> tuple[Path, dict[str, Any]]:
    folder = CASES / name
    return folder, json.loads((folder / "case.json").read_text())


def test_jpeg_is_exact() -> None:
    """Stricter than the limit, which allows an accurate decoder: TensorFlow's own bytes."""
    folder, case = _case("preprocess")
    made = KINDS["preprocess"](folder, case)
    with np.load(folder / "images.npz", allow_pickle=False) as stored:
        for i in range(3):
            assert np.array_equal(made[f"img{i}.after_jpeg"], stored[f"img{i}.after_jpeg"])


def _mu(network: Network, swap: bool = False) -> torch.Tensor:
    t = load_file(CASES / "oft_model" / "tensors.safetensors")
    pixels = t["img1.pixel_values"].float()
    if swap:
        pixels = pixels[:, [3, 4, 5, 0, 1, 2]]
    with torch.no_grad():
        hidden = network(pixels, t["img1.input_ids"], None, t["img1.proprio"])
        mu: torch.Tensor = network.action_head(hidden)
    return (mu - t["img1.mu"]).abs().max()


def _causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: torch.Tensor | None = None, **kw: Any) -> torch.Tensor:
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    return ORIGINAL(q, k, v, attn_mask=mask, **kw)


ORIGINAL = F.scaled_dot_product_attention


class _Functional:
    """torch.nn.functional with one function replaced, for one module."""

    def __init__(self, **replaced: Callable[..., torch.Tensor]) -> None:
        self._replaced = replaced

    def __getattr__(self, name: str) -> Any:
        return self._replaced.get(name, getattr(F, name))


def test_wrong_versions_are_far_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each slip moves mu by more than the limit, 3e-5; where case.json made the slip as it is made here, by as much."""
    folder, case = _case("oft_model")
    network = network_of(folder, case)
    assert float(_mu(network)) < 3e-5
    far: dict[str, tuple[float, str]] = {"channels swapped": (float(_mu(network, swap=True)), "")}
    with monkeypatch.context() as patch:
        patch.setattr(llama, "F", _Functional(scaled_dot_product_attention=_causal))
        far["causal"] = float(_mu(network)), ""
    with monkeypatch.context() as patch:
        right = LlamaModel.forward
        patch.setattr(LlamaModel, "forward", lambda self, *a: right(self, *a)[:, 1:])
        far["slice"] = float(_mu(network)), "slice_shifted_by_one"
    with monkeypatch.context() as patch:
        tanh = _Functional(gelu=lambda x: F.gelu(x, approximate="tanh"))
        patch.setattr(vision, "F", tanh)
        patch.setattr(heads, "F", tanh)
        patch.setattr("worldenv.policy.openvla_oft.F", tanh)
        far["tanh"] = float(_mu(network)), "tanh_gelu_everywhere"
    llm = {**case["config"]["llm"], "rms_norm_eps": 1e-5}
    wrong = {**case, "config": {**case["config"], "llm": llm}}
    far["eps"] = float(_mu(network_of(folder, wrong))), "rms_norm_eps_swapped"
    for name, (distance, published) in far.items():
        assert distance > 3e-5, name
        if published:
            assert distance == pytest.approx(case["wrong_variant_distance"][published], rel=0.1), name
    assert float(_mu(network_of(folder, case, attention="prefix_lm"))) > 1e-3


def test_prefix_lm_is_full_attention_where_the_prefix_sees_no_slots() -> None:
    """Its definition: full attention with a mask that hides the last 58 tokens from the others."""
    folder, case = _case("oft_model")
    t = load_file(folder / "tensors.safetensors")
    network = network_of(folder, case, attention="prefix_lm")
    inputs = (t["batch.pixel_values"].float(), t["batch.input_ids"][:, :23], torch.tensor([23, 19]), t["batch.proprio"])

    def masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: torch.Tensor, **kw: Any) -> torch.Tensor:
        sees = torch.ones(k.shape[2], k.shape[2], dtype=torch.bool)
        sees[:-58, -58:] = False
        return ORIGINAL(q, k, v, attn_mask=attn_mask & sees[-q.shape[2] :], **kw)

    with torch.no_grad():
        got = network(*inputs)
        network.config = dataclasses.replace(network.config, attention="full")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(llama, "F", _Functional(scaled_dot_product_attention=masked))
            want = network(*inputs)
    torch.testing.assert_close(got, want, rtol=0, atol=3e-5)


def test_prefix_lm_gives_no_gradient_to_what_comes_before_the_slots() -> None:
    folder, case = _case("oft_model")
    t = load_file(folder / "tensors.safetensors")
    network = network_of(folder, case, attention="prefix_lm")
    network(t["img1.pixel_values"].float(), t["img1.input_ids"], None, t["img1.proprio"]).sum().backward()
    assert network.projector.fc1.weight.grad is None
    assert network.proprio_projector.fc1.weight.grad is None
    assert float(network.language_model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum()) > 0


def test_heads_read_rows_of_seven_slots() -> None:
    hidden = torch.arange(2 * 56 * 3, dtype=torch.bfloat16).reshape(2, 56, 3)
    rows = by_step(hidden)
    assert rows.dtype == torch.float32
    assert torch.equal(rows[1, 2], hidden[1, 14:21].flatten().float())


def test_pictures_other_than_the_published_size() -> None:
    """Odd sizes against an accurate decoder, within what the fast one differs by: edges and padding are right."""
    pillow = pytest.importorskip("PIL.Image")
    x, y = np.meshgrid(np.linspace(0, 6, 50), np.linspace(0, 4, 37))
    frame = np.stack([127 + 100 * np.sin(x), 127 + 100 * np.cos(y), 127 + 60 * np.sin(x + y)], axis=-1).astype(np.uint8)
    written = io.BytesIO()
    pillow.fromarray(frame).save(written, "JPEG", quality=95, subsampling=2)
    accurate = np.asarray(pillow.open(written)).astype(int)
    ours = processing.jpeg_round_trip(torch.from_numpy(frame)[None])[0].numpy().astype(int)
    assert np.abs(ours - accurate).max() <= 14
    assert np.abs(ours - accurate).mean() <= 1.3

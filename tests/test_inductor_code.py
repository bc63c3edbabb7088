"""What Inductor makes of the engines' graphs for a GPU: that it does make something, and what of it would be waste. Built, never run."""

from __future__ import annotations

import json
from typing import Any

import pytest
from test_pretend_gpu import pretended

from tests.pretend_gpu import NOT_HERE

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(NOT_HERE), reason=NOT_HERE)]


def lowered(*arguments: str) -> list[dict[str, Any]]:
    """A row for each graph, see tests/inductor_code.py."""
    return [json.loads(line) for line in pretended("--kernels", "tests.inductor_code", *arguments).splitlines() if line.startswith("{")]


def test_a_denoising_step_lays_nothing_out_anew() -> None:
    """Neither its weights nor what its convolutions are given.

    Seen to fail on: weights of temporal convolutions whose channels are not last in memory (all are copied at every step); frames joined as pictures
    of frames by pixels, or as clips (some are written with frames last, to be copied again).
    """
    (row,) = lowered("--one", "--no-compile", "simulator_unet")
    assert row["launches"] > 100
    assert row["library_calls"] > 100
    assert row["weights_copied"] == []
    assert len(row["copies"]) <= 1  # channels of what is given become last


def test_kernels_of_graphs_with_masks_and_varying_lengths_compile() -> None:
    """Attention with a mask is padded for every length, and every configuration that a GPU would time compiles, without spills."""
    rows = lowered("policy_backbone", "policy_heads", "reflector_llm")
    assert [row["network"] for row in rows] == ["policy_backbone", "policy_heads", "reflector_llm"]
    for row in rows:
        assert row["configurations"] > row["kernels"] > 5
        assert row["library_calls"] > 5
        assert row["spilling"] == []
        assert row["weights_copied"] == []

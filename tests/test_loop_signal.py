"""The gradient's signal beside its noise (benchmarks.loop_signal)."""

from __future__ import annotations

import pytest
import torch

from worldenv.benchmarks.loop_signal import signal


def drawn(mean: float, groups: int) -> torch.Tensor:
    """Gradients of 2000 weights of very different sizes; one weight never moves."""
    generator = torch.Generator().manual_seed(0)
    size = torch.logspace(-6, 3, 2000)
    size[7] = 0.0
    return (mean + torch.randn(groups, 2000, generator=generator)) * size


def test_signal_over_noise_is_what_was_put_in() -> None:
    """Of a mean of 0.2 deviations, 24 groups: 24 * 0.04, whatever the weights' sizes and however many groups it is measured with."""
    for groups in (100, 400):
        assert abs(signal(drawn(0.2, groups), 24) - 0.96) < 0.08


def test_noise_alone_has_no_signal() -> None:
    """The squared length of a mean of noise is not 0: without the correction this would be 24 / 30."""
    assert abs(signal(drawn(0.0, 30), 24)) < 0.03


def test_where_no_two_groups_have_a_gradient_it_says_so() -> None:
    gradients = torch.zeros(5, 7)
    gradients[2] = 1.0
    with pytest.raises(ValueError, match=r"of 5 groups fewer than 2 have returns that differ: .* --contexts"):
        signal(gradients, 24)

"""The density: what is drawn is what is scored, with factor and floor inside."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from worldenv.policy import laplace

BETA = torch.tensor([-9.0, -3.0, -1.0, 0.5], dtype=torch.float64)


@pytest.mark.parametrize(("factor", "floor"), [(1.0, 0.0), (3.0, 0.0), (1.0, 0.02), (0.5, 0.3)])
def test_scale_is_factor_times_the_floored_scale(factor: float, floor: float) -> None:
    want = factor * torch.clamp(BETA.exp(), min=floor)
    torch.testing.assert_close(laplace.scale(BETA, factor, floor).exp(), want, rtol=1e-14, atol=0)


def test_below_the_floor_beta_has_no_gradient() -> None:
    beta = BETA.clone().requires_grad_()
    laplace.scale(beta, 2.0, 0.1).sum().backward()
    assert beta.grad is not None
    assert beta.grad.tolist() == [0.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize(("factor", "floor"), [(0.0, 0.1), (-1.0, 0.1), (1.0, -0.1), (float("nan"), 0.0)])
def test_refuses_what_is_no_scale(factor: float, floor: float) -> None:
    with pytest.raises(ValueError, match="want factor > 0, 0 <= floor < ceiling"):
        laplace.scale(BETA, factor, floor)


def test_a_ceiling_holds_from_above() -> None:
    beta = BETA.clone().requires_grad_()
    log_scale = laplace.scale(beta, 2.0, 0.01, 0.5)
    torch.testing.assert_close(log_scale.detach().exp(), 2.0 * BETA.exp().clamp(0.01, 0.5), rtol=1e-14, atol=0)
    log_scale.sum().backward()
    assert beta.grad is not None
    assert beta.grad.tolist() == [0.0, 1.0, 1.0, 0.0]
    with pytest.raises(ValueError, match=r"ceiling 0\.01"):
        laplace.scale(BETA, 1.0, 0.01, 0.01)


@pytest.mark.parametrize(("factor", "floor", "ceiling"), [(1.0, 0.0, None), (3.0, 0.02, None), (0.5, 0.2, None), (2.0, 0.0, 0.03)])
def test_draws_follow_the_density_that_scores_them(factor: float, floor: float, ceiling: float | None) -> None:
    """The share of draws below a point is the integral of exp(log_density) up to it, for every factor, floor and ceiling.

    Fails where sampling knows another factor or floor than scoring (off by 0.05 or more here; the tolerance is that of the integral).
    """
    mu, beta = torch.tensor(0.3, dtype=torch.float64), torch.tensor(-2.5, dtype=torch.float64)
    log_scale = laplace.scale(beta, factor, floor, ceiling)
    n = 200_001
    uniform = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    draws = laplace.sample(mu, log_scale, uniform)
    grid = torch.linspace(-8.0, 8.6, 400_001, dtype=torch.float64)
    cdf = torch.cumulative_trapezoid(laplace.log_density(grid, mu, log_scale).exp(), grid)
    for point in (0.1, 0.25, 0.3, 0.4, 0.8):
        share = float((draws < point).double().mean())
        assert share == pytest.approx(float(cdf[int((point + 8.0) / 16.6 * 400_000)]), abs=2e-3)
    assert float(cdf[-1]) == pytest.approx(1.0, abs=1e-6)


@given(st.floats(-3, 3), st.floats(-6, 1), st.floats(1e-9, 1 - 1e-9))
def test_inverse_cdf_gives_back_its_uniform(mu: float, beta: float, u: float) -> None:
    drawn = float(laplace.sample(*(torch.tensor(x, dtype=torch.float64) for x in (mu, beta, u))))
    z = (drawn - mu) / math.exp(beta)
    assert (0.5 * math.exp(z) if z < 0 else 1 - 0.5 * math.exp(-z)) == pytest.approx(u, rel=1e-6, abs=1e-12)


def test_log_prob_sums_the_action_dimensions_alone() -> None:
    draw = np.random.default_rng(0)
    action, mu, beta = (torch.from_numpy(draw.normal(size=(2, 8, 7))) for _ in range(3))
    want = torch.distributions.Laplace(mu, beta.exp()).log_prob(action)
    torch.testing.assert_close(laplace.log_density(action, mu, beta), want, rtol=1e-12, atol=1e-12)
    assert laplace.log_prob(action, mu, beta).shape == (2, 8)
    torch.testing.assert_close(laplace.log_prob(action, mu, beta), want.sum(-1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(laplace.nll(action, mu, beta), -want.mean(), rtol=1e-12, atol=1e-12)


def test_the_likelihood_is_a_mean_over_all_dimensions() -> None:
    action, mu = torch.full((2, 3, 7), 0.5), torch.full((2, 3, 7), 0.1)
    assert float(laplace.nll(action, mu, torch.full((2, 3, 7), math.log(0.2)))) == pytest.approx(2.0 + math.log(0.4))


def test_entropy_is_the_mean_of_minus_log_density() -> None:
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    mu, log_scale = torch.tensor(1.0, dtype=torch.float64), torch.tensor(-2.0, dtype=torch.float64)
    draws = laplace.sample(mu, log_scale, u)
    assert float(laplace.nll(draws, mu, log_scale)) == pytest.approx(float(laplace.entropy(log_scale)), abs=1e-3)

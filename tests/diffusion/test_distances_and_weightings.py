"""Distances between images, and loss weightings."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cmbench.diffusion.distances import (
    huber_constant,
    l1_mean,
    l2_mean,
    l2_norm,
    pseudo_huber,
    squared_l2_sum,
)
from cmbench.diffusion.grids import karras_sigmas
from cmbench.diffusion.preconditioning import edm_scalings
from cmbench.diffusion.weightings import (
    adaptive_weighted_loss,
    edm_weight,
    inverse_gap_weight,
    snr_plus_one_weight,
    truncated_snr_weight,
)

DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "squared_l2_sum": squared_l2_sum,
    "l2_mean": l2_mean,
    "l1_mean": l1_mean,
    "l2_norm": l2_norm,
    "pseudo_huber": lambda a, b: pseudo_huber(a, b, 0.03),
    "pseudo_huber_0": lambda a, b: pseudo_huber(a, b, 0.0),
}


@pytest.fixture
def pair(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    a, b = (torch.randn((5, 3, 4, 4), generator=generator, dtype=torch.float64) for _ in range(2))
    return a, b


@pytest.mark.parametrize("name", DISTANCES)
def test_distance_is_one_symmetric_value_an_image(name: str, pair: tuple[Tensor, Tensor]) -> None:
    distance, (a, b) = DISTANCES[name], pair
    value = distance(a, b)
    assert value.shape == (5,)
    assert bool((value > 0).all())
    assert torch.equal(value, distance(b, a))
    for i in range(5):  # no image sees another
        torch.testing.assert_close(distance(a[i : i + 1], b[i : i + 1])[0], value[i])


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_images_have_distance_and_gradient_zero(name: str, dtype: torch.dtype) -> None:
    a = torch.ones((2, 3, 2, 2), dtype=dtype, requires_grad=True)
    value = DISTANCES[name](a, torch.ones((2, 3, 2, 2), dtype=dtype))
    (gradient,) = torch.autograd.grad(value.sum(), a)
    assert bool((value == 0).all())
    assert bool((gradient == 0).all())


@pytest.mark.parametrize("name", DISTANCES)
def test_distance_gradients(name: str, pair: tuple[Tensor, Tensor]) -> None:
    a, b = pair[0].requires_grad_(), pair[1]
    assert torch.autograd.gradcheck(lambda x: DISTANCES[name](x, b), a, check_forward_ad=True)


def test_distances_are_their_formulas(pair: tuple[Tensor, Tensor]) -> None:
    a, b = pair
    vector = (a - b).flatten(1)
    torch.testing.assert_close(squared_l2_sum(a, b), (vector**2).sum(1))
    torch.testing.assert_close(l2_mean(a, b), (vector**2).mean(1))
    torch.testing.assert_close(l1_mean(a, b), vector.abs().mean(1))
    torch.testing.assert_close(l2_norm(a, b), vector.norm(dim=1))
    for c in (1e-3, 0.03, 2.0):
        expected = torch.sqrt((vector**2).sum(1) + c**2) - c
        torch.testing.assert_close(pseudo_huber(a, b, c), expected, rtol=1e-12, atol=0)


def test_pseudo_huber_is_quadratic_near_and_linear_far() -> None:
    near = torch.full((1, 4), 1e-6, dtype=torch.float64)
    far = torch.full((1, 4), 1e6, dtype=torch.float64)
    zero = torch.zeros_like(near)
    assert pseudo_huber(near, zero, 0.5).item() == pytest.approx(4e-12 / (2 * 0.5), rel=1e-9)
    assert pseudo_huber(far, zero, 0.5).item() == pytest.approx(2e6 - 0.5, rel=1e-12)


def test_pseudo_huber_does_not_cancel_in_float32() -> None:
    a = torch.full((1, 3072), 1e-6)
    exact = pseudo_huber(a.double(), torch.zeros_like(a).double(), 0.03).item()
    assert pseudo_huber(a, torch.zeros_like(a), 0.03).item() == pytest.approx(exact, rel=1e-5)


def test_huber_constants_of_the_paper() -> None:
    assert huber_constant(3 * 32 * 32) == pytest.approx(0.02993, abs=5e-6)
    assert huber_constant(3 * 64 * 64) == pytest.approx(0.05986, abs=5e-6)


# --- weightings --------------------------------------------------------------------------------

levels = st.floats(0.002, 80.0)


@given(sigma=levels, sigma_data=st.floats(0.1, 2))
def test_edm_weight_undoes_c_out(sigma: float, sigma_data: float) -> None:
    level = torch.tensor([sigma], dtype=torch.float64)
    c_out = edm_scalings(level, sigma_data).c_out
    torch.testing.assert_close(edm_weight(level, sigma_data) * c_out**2, torch.ones_like(level))


@given(sigma=levels)
def test_snr_weights(sigma: float) -> None:
    level = torch.tensor([sigma], dtype=torch.float64)
    assert truncated_snr_weight(level).item() == pytest.approx(max(sigma**-2, 1))
    assert snr_plus_one_weight(level).item() == pytest.approx(sigma**-2 + 1)


def test_snr_plus_one_is_the_squared_v_error(pair: tuple[Tensor, Tensor]) -> None:
    x0, guess = pair
    sigma = torch.tensor([0.1, 0.5, 1.0, 5.0, 40.0], dtype=torch.float64)[:, None, None, None]
    alpha, beta = 1 / torch.sqrt(1 + sigma**2), sigma / torch.sqrt(1 + sigma**2)
    x = alpha * x0 + beta * guess.flip(0)

    def v(denoised: Tensor) -> Tensor:
        return (alpha * x - denoised) / beta

    torch.testing.assert_close(
        squared_l2_sum(v(guess), v(x0)),
        snr_plus_one_weight(sigma.flatten()) * squared_l2_sum(guess, x0),
    )


@given(n=st.integers(2, 1281))
def test_inverse_gap_weights_fall_with_noise(n: int) -> None:
    grid = karras_sigmas(n)
    weights = inverse_gap_weight(grid[1:], grid[:-1])
    assert bool((weights > 0).all())
    assert bool((weights.diff() < 0).all())
    torch.testing.assert_close(weights * grid.diff(), torch.ones(n - 1, dtype=torch.float64))


def test_adaptive_weight_is_optimal_at_the_inverse_error() -> None:
    error, dims = torch.tensor([0.5, 20.0, 3000.0], dtype=torch.float64), 64
    best = torch.log(dims / error).requires_grad_()
    loss = adaptive_weighted_loss(error, best, dims)
    (gradient,) = torch.autograd.grad(loss.sum(), best)
    torch.testing.assert_close(gradient, torch.zeros(3, dtype=torch.float64), atol=1e-14, rtol=0)
    for change in (-0.3, 0.3):
        assert bool((adaptive_weighted_loss(error, best + change, dims) > loss).all())

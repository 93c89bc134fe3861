"""Conversions between EDM, TrigFlow and VP."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cmbench.diffusion.frames import (
    append_dims,
    cosine_time_to_sigma,
    denoised_to_velocity,
    edm_to_trig,
    edm_to_vp,
    predictions_to_velocity,
    quarter_log_sigma,
    sigma_to_t,
    sigma_to_vp_time,
    t_to_sigma,
    trig_to_edm,
    velocity_to_denoised,
    vp_time_to_sigma,
)

SD = 0.7  # not 0.5, and not 1, which hides missing factors
levels = st.floats(0.002, 80.0)
SIGMAS = torch.tensor([0.002, 0.1, 0.7, 3.0, 80.0], dtype=torch.float64)


@pytest.fixture
def truth(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Data and unit noise."""
    x0 = 0.3 + SD * torch.randn((5, 2, 3, 3), generator=generator, dtype=torch.float64)
    return x0, torch.randn((5, 2, 3, 3), generator=generator, dtype=torch.float64)


def noisy(truth: tuple[Tensor, Tensor], sigma: Tensor = SIGMAS) -> Tensor:
    return truth[0] + append_dims(sigma, truth[0]) * truth[1]


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@given(sigma=levels, sigma_data=st.floats(0.05, 5))
def test_sigma_and_angle_are_inverse(sigma: float, sigma_data: float) -> None:
    level = torch.tensor([sigma], dtype=torch.float64)
    t = sigma_to_t(level, sigma_data)
    assert 0 < t.item() < math.pi / 2
    torch.testing.assert_close(t_to_sigma(t, sigma_data), level, rtol=1e-10, atol=0)
    torch.testing.assert_close(
        quarter_log_sigma(t, sigma_data), level.log() / 4, rtol=0, atol=1e-10
    )


def test_published_angles() -> None:
    for sigma, t in ((80, 1.564546), (0.98238, 1.1), (0.821, 1.02378), (1.1, 1.14417)):
        ours = sigma_to_t(torch.tensor(float(sigma), dtype=torch.float64), 0.5).item()
        assert ours == pytest.approx(t, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(sigma=levels)
def test_round_trip_from_edm_to_trigflow(dtype: torch.dtype, sigma: float) -> None:
    level = torch.tensor([sigma], dtype=dtype)
    x = torch.tensor([[1.3, -0.2, 70.0]], dtype=dtype)
    x_back, sigma_back = trig_to_edm(*edm_to_trig(x, level, 0.5), 0.5)
    # float32 angles near pi/2 resolve sigma = 80 to about 1e-5.
    tolerance = 1e-6 if dtype == torch.float64 else 3e-5
    torch.testing.assert_close(x_back, x, rtol=tolerance, atol=0)
    torch.testing.assert_close(sigma_back, level, rtol=tolerance, atol=0)


def test_float32_round_trip_below_sigma_one() -> None:
    level = torch.logspace(math.log10(0.002), 0, 50)
    x = torch.ones(50, 1, 1, 1)
    x_back, sigma_back = trig_to_edm(*edm_to_trig(x, level, 0.5), 0.5)
    torch.testing.assert_close(x_back, x, rtol=1e-6, atol=0)
    torch.testing.assert_close(sigma_back, level, rtol=1e-6, atol=0)


def test_trigflow_is_the_process(truth: tuple[Tensor, Tensor]) -> None:
    x_t, t = edm_to_trig(noisy(truth), SIGMAS, SD)
    wide = append_dims(t, x_t)
    assert_close(x_t, torch.cos(wide) * truth[0] + torch.sin(wide) * SD * truth[1])


def test_velocity_predictions_agree(truth: tuple[Tensor, Tensor]) -> None:
    x0, epsilon = truth
    x_t, t = edm_to_trig(noisy(truth), SIGMAS, SD)
    wide = append_dims(t, x_t)
    velocity = torch.cos(wide) * SD * epsilon - torch.sin(wide) * x0
    assert_close(predictions_to_velocity(t, x0, epsilon, SD), velocity)
    assert_close(velocity_to_denoised(x_t, t, velocity), x0)
    assert_close(denoised_to_velocity(x_t, t, x0), velocity)


def test_variance_preserving(truth: tuple[Tensor, Tensor]) -> None:
    x0, epsilon = truth
    x_vp, alpha, beta = edm_to_vp(noisy(truth), SIGMAS)
    assert_close(alpha**2 + beta**2, torch.ones(5, dtype=torch.float64))
    a, b = append_dims(alpha, x0), append_dims(beta, x0)
    assert_close(x_vp, a * x0 + b * epsilon)


def test_trigflow_equals_v_prediction_on_unit_data(truth: tuple[Tensor, Tensor]) -> None:
    x0, epsilon = truth
    x_vp, alpha, beta = edm_to_vp(noisy(truth), SIGMAS)
    x_t, t = edm_to_trig(noisy(truth), SIGMAS, 1.0)
    assert_close(x_t, x_vp)
    v = append_dims(alpha, x0) * epsilon - append_dims(beta, x0) * x0
    assert_close(predictions_to_velocity(t, x0, epsilon, 1.0), v)


@given(tau=st.floats(1e-5, 1.0))
def test_vp_time_and_sigma_are_inverse(tau: float) -> None:
    time = torch.tensor([tau], dtype=torch.float64)
    sigma = vp_time_to_sigma(time)
    assert sigma.item() == pytest.approx(
        math.sqrt(math.expm1(0.5 * 19.9 * tau**2 + 0.1 * tau)), rel=1e-12
    )
    torch.testing.assert_close(sigma_to_vp_time(sigma), time, rtol=1e-9, atol=0)


def test_cosine_schedule() -> None:
    u = torch.linspace(0, 1, 11, dtype=torch.float64)
    sigma = cosine_time_to_sigma(u)
    assert sigma[0].item() == pytest.approx(math.exp(-10))
    assert sigma[-1].item() == pytest.approx(math.exp(10))
    assert bool((sigma.diff() > 0).all())


def test_quarter_log_sigma_is_finite_at_both_ends() -> None:
    t = torch.tensor([0.0, math.pi / 2])  # float32's pi/2 is beyond pi/2
    noise = quarter_log_sigma(t, 0.5)
    assert bool(noise.isfinite().all())
    assert noise[0] < -10
    assert noise[1] > 3


def test_append_dims() -> None:
    x = torch.zeros(4, 3, 2, 2)
    assert append_dims(torch.ones(4), x).shape == (4, 1, 1, 1)
    scalar = torch.tensor(2.0, dtype=torch.float64)
    assert (append_dims(scalar, x) * x).dtype == torch.float32

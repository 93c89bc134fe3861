"""Scalings, boundary conditions, and the models and consistency functions built from them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import trigflow_scalings
from torch import Tensor

from cmbench.diffusion.frames import append_dims, denoised_to_velocity, edm_to_trig, sigma_to_t
from cmbench.diffusion.gaussian_mixture import GaussianMixture
from cmbench.diffusion.grids import karras_sigmas
from cmbench.diffusion.models import (
    DiffusionModel,
    EDMConsistency,
    EDMModel,
    MixtureModel,
    TrigFlowConsistency,
    TrigFlowModel,
)
from cmbench.diffusion.preconditioning import boundary_scalings, edm_scalings, precondition

Network = Callable[..., Tensor]
SD = 0.7
SIGMAS = torch.tensor([0.002, 0.1, 0.7, 3.0, 80.0], dtype=torch.float64)


@pytest.fixture
def x(generator: torch.Generator) -> Tensor:
    return torch.randn((5, 2, 3, 3), generator=generator, dtype=torch.float64)


# --- scalings ----------------------------------------------------------------------------------


@given(sigma=st.floats(0, 200), sigma_data=st.floats(0.05, 5))
def test_edm_scalings_give_unit_variances(sigma: float, sigma_data: float) -> None:
    """Input and effective target have unit variance (Karras et al. 2022, App. B.6)."""
    s = edm_scalings(torch.tensor([sigma], dtype=torch.float64), sigma_data)
    variance = sigma**2 + sigma_data**2
    assert s.c_in.item() ** 2 * variance == pytest.approx(1)
    target = ((1 - s.c_skip.item()) * sigma_data) ** 2 + (s.c_skip.item() * sigma) ** 2
    assert target == pytest.approx(s.c_out.item() ** 2, abs=1e-12)
    if sigma > 1e-300:
        assert s.c_noise.item() == pytest.approx(math.log(sigma) / 4)
    assert math.isfinite(s.c_noise.item())


@given(sigma=st.floats(0.002, 200), sigma_data=st.floats(0.05, 5))
def test_boundary_scalings_are_the_formula(sigma: float, sigma_data: float) -> None:
    s = boundary_scalings(torch.tensor([sigma], dtype=torch.float64), sigma_data, 0.002)
    gap = sigma - 0.002
    assert s.c_skip.item() == pytest.approx(sigma_data**2 / (gap**2 + sigma_data**2))
    assert s.c_out.item() == pytest.approx(sigma_data * gap / math.hypot(sigma, sigma_data))


def test_boundary_at_zero_is_edm() -> None:
    ours, plain = boundary_scalings(SIGMAS, SD, 0.0), edm_scalings(SIGMAS, SD)
    for name in ("c_skip", "c_out", "c_in", "c_noise"):
        torch.testing.assert_close(getattr(ours, name), getattr(plain, name), rtol=1e-14, atol=0)


def test_trigflow_scalings_are_edm_in_the_other_frame() -> None:
    t = sigma_to_t(SIGMAS, SD)
    trig, edm = trigflow_scalings(t, SD), edm_scalings(SIGMAS, SD)
    cosine = torch.cos(t)  # x_t = cos(t) x_sigma
    torch.testing.assert_close(trig.c_skip * cosine, edm.c_skip, rtol=1e-10, atol=0)
    torch.testing.assert_close(trig.c_out, -edm.c_out, rtol=1e-10, atol=0)
    torch.testing.assert_close(trig.c_in * cosine, edm.c_in, rtol=1e-10, atol=0)
    assert trig.c_noise is t


values = st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sigma_min", [0.002, 0.003, 0.0])
@given(values=values, sigma_data=st.floats(0.05, 5))
def test_consistency_is_the_identity_at_its_boundary_bitwise(
    dtype: torch.dtype, sigma_min: float, values: list[float], sigma_data: float
) -> None:
    x = torch.tensor([values], dtype=dtype)

    def network(x_in: Tensor, c_noise: Tensor, labels: Tensor | None) -> Tensor:
        assert bool(c_noise.isfinite().all())
        return 3 * x_in + append_dims(c_noise, x_in)

    f = EDMConsistency(network, sigma_data, sigma_min)
    boundary = karras_sigmas(18, sigma_min)[:1].to(dtype)
    assert torch.equal(f(x, boundary), x)
    trig = TrigFlowConsistency(network, sigma_data)
    assert torch.equal(trig(x, torch.zeros(1, dtype=dtype)), x)
    log_trig = TrigFlowConsistency(network, sigma_data, noise_embedding="log-sigma")
    assert torch.equal(log_trig(x, torch.zeros(1, dtype=dtype)), x)


def test_training_at_zero_noise_has_finite_gradients(x: Tensor) -> None:
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    model = EDMModel(lambda x_in, c, labels: scale * x_in + append_dims(c, x_in), SD)
    denoised = model.denoise(x, torch.zeros(5, dtype=torch.float64))
    assert torch.equal(denoised, x)
    (gradient,) = torch.autograd.grad(denoised.sum(), scale)
    assert gradient == 0


def test_precondition_passes_labels_and_arguments(x: Tensor) -> None:
    seen: dict[str, Any] = {}

    def network(x_in: Tensor, c_noise: Tensor, labels: Tensor | None, **kwargs: Any) -> Tensor:
        seen.update(kwargs, labels=labels, shape=c_noise.shape)
        return x_in

    labels, extra = torch.arange(5), torch.ones(5, 9)
    scalings = edm_scalings(SIGMAS, SD)
    out = precondition(network, x, scalings, labels, augment_labels=extra)
    assert seen["labels"] is labels
    assert seen["augment_labels"] is extra
    assert seen["shape"] == (5,)
    gain = scalings.c_skip + scalings.c_out * scalings.c_in
    torch.testing.assert_close(out, append_dims(gain, x) * x)


# --- models --------------------------------------------------------------------------------------


def test_edm_velocity_is_its_denoiser_in_the_other_frame(student: Network, x: Tensor) -> None:
    model = EDMModel(student, SD)
    x_t, t = edm_to_trig(x, SIGMAS, SD)
    by_division = denoised_to_velocity(x_t, t, model.denoise(x, SIGMAS))
    torch.testing.assert_close(model.velocity(x_t, t), by_division, rtol=0, atol=1e-11)


def test_sign_flip_is_accurate_in_float32_where_division_is_not(
    student: Network, x: Tensor
) -> None:
    model = EDMModel(student, SD)
    sigma = torch.full((5,), 0.002, dtype=torch.float64)
    x_t, t = edm_to_trig(x, sigma, SD)
    exact = model.velocity(x_t, t)
    x_32, t_32 = edm_to_trig(x.float(), sigma.float(), SD)
    flipped = (model.velocity(x_32, t_32) - exact).abs().max()
    denoised = model.denoise(x.float(), sigma.float())
    divided = (denoised_to_velocity(x_32, t_32, denoised) - exact).abs().max()
    assert flipped < 1e-6
    assert divided > 20 * flipped


def test_edm_network_read_as_trigflow(student: Network, x: Tensor) -> None:
    edm = EDMModel(student, SD)
    trig = TrigFlowModel(student, SD, noise_embedding="log-sigma", output_sign=-1.0)
    x_t, t = edm_to_trig(x, SIGMAS, SD)
    torch.testing.assert_close(trig.velocity(x_t, t), edm.velocity(x_t, t), rtol=0, atol=1e-14)
    torch.testing.assert_close(trig.denoise(x, SIGMAS), edm.denoise(x, SIGMAS), rtol=0, atol=1e-11)
    f = TrigFlowConsistency(student, SD, "log-sigma", -1.0)
    torch.testing.assert_close(f(x_t, t), edm.denoise(x, SIGMAS), rtol=0, atol=1e-11)


def test_trigflow_model_is_its_scalings(student: Network, x: Tensor) -> None:
    x_t, t = edm_to_trig(x, SIGMAS, SD)
    expected = precondition(student, x_t, trigflow_scalings(t, SD))
    torch.testing.assert_close(TrigFlowConsistency(student, SD)(x_t, t), expected)
    torch.testing.assert_close(TrigFlowModel(student, SD).denoise(x, SIGMAS), expected)


@pytest.mark.parametrize("labels", [None, torch.tensor([0, 1, 1, 0, 1])])
def test_mixture_model_agrees_with_itself(
    lopsided: GaussianMixture, generator: torch.Generator, labels: Tensor | None
) -> None:
    model = MixtureModel(lopsided, SD)
    unit = torch.randn((5, 2, 1, 1), generator=generator, dtype=torch.float64)
    x = unit * append_dims(SIGMAS, unit) + 0.4
    x_t, t = edm_to_trig(x, SIGMAS, SD)
    by_division = denoised_to_velocity(x_t, t, model.denoise(x, SIGMAS, labels))
    torch.testing.assert_close(model.velocity(x_t, t, labels), by_division, rtol=0, atol=1e-10)
    single = model.velocity(x_t.float(), t.float(), labels)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), by_division, rtol=0, atol=2e-5)


def test_models_satisfy_the_protocol(student: Network, ring: GaussianMixture) -> None:
    for model in (EDMModel(student, SD), TrigFlowModel(student, SD), MixtureModel(ring, SD)):
        assert isinstance(model, DiffusionModel)
    assert not isinstance(EDMConsistency(student, SD, 0.002), DiffusionModel)


@pytest.mark.parametrize("kind", ["edm", "trigflow", "edm-denoiser", "edm-velocity"])
def test_both_modes_of_differentiation(kind: str, student: Network, x: Tensor) -> None:
    functions: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "edm": EDMConsistency(student, SD, 0.002),
        "trigflow": TrigFlowConsistency(student, SD),
        "edm-denoiser": EDMModel(student, SD).denoise,
        "edm-velocity": EDMModel(student, SD).velocity,
    }
    time = torch.tensor([0.3, 1.2], dtype=torch.float64, requires_grad=True)
    images = x[:2, :1, :2, :2].clone().requires_grad_()
    assert torch.autograd.gradcheck(functions[kind], (images, time), check_forward_ad=True)

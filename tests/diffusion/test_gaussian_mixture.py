"""Closed forms of Gaussian mixtures, and the exact flow map, against independent truth."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from oracles import gaussian_flow_map
from scipy.integrate import solve_ivp
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from cmbench.diffusion.gaussian_mixture import GaussianMixture, image_mixture, ring_mixture
from cmbench.diffusion.ode import integrate
from cmbench.errors import UserError

SIGMAS = torch.tensor([0.0, 0.05, 0.5, 3.0, 80.0], dtype=torch.float64)


@pytest.fixture
def x(generator: torch.Generator) -> Tensor:
    unit = torch.randn((5, 2, 1, 1), generator=generator, dtype=torch.float64)
    return unit * (1 + SIGMAS[:, None, None, None])


def reference(mixture: GaussianMixture, sigma: float) -> MixtureSameFamily:
    """The noisy data's distribution by torch.distributions."""
    stds = torch.sqrt(mixture.stds.reshape(mixture.means.flatten(1).shape) ** 2 + sigma**2)
    components = Independent(Normal(mixture.means.flatten(1), stds), 1)
    return MixtureSameFamily(Categorical(mixture.weights), components)


def full(n: int, value: float) -> Tensor:
    return torch.full((n,), value, dtype=torch.float64)


# --- closed forms --------------------------------------------------------------------------------


def test_score_is_the_gradient_and_denoiser_is_tweedie(
    lopsided: GaussianMixture, x: Tensor
) -> None:
    x.requires_grad_()
    log_densities = [
        reference(lopsided, sigma).log_prob(x[i : i + 1].flatten(1)).sum()
        for i, sigma in enumerate(SIGMAS.tolist())
    ]
    (gradient,) = torch.autograd.grad(sum(log_densities), x)  # type: ignore[arg-type]
    score = lopsided.score(x, SIGMAS)
    torch.testing.assert_close(score, gradient, rtol=1e-10, atol=1e-12)
    wide = SIGMAS[:, None, None, None]
    denoised, epsilon = lopsided.predictions(x, SIGMAS)
    torch.testing.assert_close(denoised, x + wide**2 * score, rtol=0, atol=1e-10)
    torch.testing.assert_close(epsilon, -wide * score, rtol=1e-12, atol=1e-14)
    assert torch.equal(denoised, lopsided.denoised(x, SIGMAS))
    torch.testing.assert_close(denoised[0], x[0], rtol=0, atol=1e-15)  # sigma = 0


def test_denoiser_minimises_the_squared_error(
    lopsided: GaussianMixture, generator: torch.Generator
) -> None:
    """E[x0 | x] by definition: E[(x0 - D) h(x)] = 0 for any h, within its standard error."""
    n, sigma = 100_000, 0.4
    x0, labels = lopsided.sample(n, generator, dtype=torch.float64)
    noisy = x0 + sigma * torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    for given_labels in (None, labels):
        residual = (x0 - lopsided.denoised(noisy, full(n, sigma), given_labels)).flatten(1)
        for h in (torch.ones_like(noisy), noisy, torch.sin(3 * noisy)):
            products = residual * h.flatten(1)
            error = products.std(0) / math.sqrt(n)
            assert bool((products.mean(0).abs() < 4.5 * error).all())


def test_a_label_conditions_on_its_components(lopsided: GaussianMixture, x: Tensor) -> None:
    alone = GaussianMixture(lopsided.means[1:], lopsided.stds[1:], lopsided.weights[1:])
    ones = torch.ones(5, dtype=torch.int64)
    for ours, expected in zip(
        lopsided.predictions(x, SIGMAS, ones), alone.predictions(x, SIGMAS), strict=True
    ):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


def test_both_ways_of_computing_agree(images: GaussianMixture, generator: torch.Generator) -> None:
    general = GaussianMixture(images.means, images.stds, images.weights, images.labels)
    general.__dict__["_shares_covariance"] = False
    x = torch.randn((5, 1, 8, 8), generator=generator, dtype=torch.float64)
    x = x * (1 + SIGMAS[:, None, None, None])
    for labels in (None, torch.tensor([0, 3, 5, 9, 9])):
        for ours, theirs in zip(
            images.predictions(x, SIGMAS, labels),
            general.predictions(x, SIGMAS, labels),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("builder", [ring_mixture, image_mixture])
def test_results_keep_the_dtype_and_float64_accuracy(
    builder: Callable[[], GaussianMixture], generator: torch.Generator
) -> None:
    mixture = builder()
    x = torch.randn((6, *mixture.shape), generator=generator) * 3
    sigma = torch.full((6,), 1.5)
    ours = mixture.denoised(x, sigma)
    assert ours.dtype == torch.float32
    exact = mixture.denoised(x.double(), sigma.double())
    torch.testing.assert_close(ours, exact.float(), rtol=0, atol=0)


@pytest.mark.parametrize("shared", [True, False])
def test_both_modes_of_differentiation(
    lopsided: GaussianMixture, ring: GaussianMixture, shared: bool
) -> None:
    mixture = ring if shared else lopsided
    x = torch.tensor([[0.3, -0.7], [1.1, 0.2]], dtype=torch.float64).reshape(2, 2, 1, 1)
    x.requires_grad_()
    sigma = torch.tensor([0.3, 0.8], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(mixture.predictions, (x, sigma), check_forward_ad=True)


# --- samples -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ring", "images", "lopsided"])
def test_samples_have_the_moments(
    name: str, request: pytest.FixtureRequest, generator: torch.Generator
) -> None:
    mixture: GaussianMixture = request.getfixturevalue(name)
    n = 50_000
    x, labels = mixture.sample(n, generator, dtype=torch.float64)
    assert x.shape == (n, *mixture.shape)
    assert labels is not None
    error = x.std(0) / math.sqrt(n)
    assert bool(((x.mean(0) - mixture.mean()).abs() < 5 * error).all())
    squares = (x - mixture.mean()) ** 2
    error = squares.std(0) / math.sqrt(n)
    assert bool(((squares.mean(0) - mixture.variance()).abs() < 5 * error).all())
    assert mixture.labels is not None
    share = torch.zeros(mixture.n_classes, dtype=torch.float64).index_add(
        0, mixture.labels, mixture.weights / mixture.weights.sum()
    )
    counts = torch.bincount(labels, minlength=mixture.n_classes)
    assert bool(((counts - n * share).abs() < 5 * (n * share).sqrt()).all())


def test_built_in_mixtures_are_the_same_every_time() -> None:
    for builder in (ring_mixture, image_mixture):
        one, two = builder(), builder()
        assert torch.equal(one.means, two.means)
        assert torch.equal(one.stds, two.stds)
        assert one.data_std() == pytest.approx(0.5, abs=1e-12)
    a, _ = ring_mixture().sample(5, torch.Generator().manual_seed(3))
    b, _ = ring_mixture().sample(5, torch.Generator().manual_seed(3))
    assert torch.equal(a, b)
    assert a.dtype == torch.float32


def test_built_in_shapes_and_classes() -> None:
    assert ring_mixture(5, 0.05, 0.8, labelled=False).sample(3, torch.Generator())[1] is None
    assert ring_mixture(5, 0.05, 0.8).data_std() == pytest.approx(0.8)
    colour = image_mixture(4, 6, 3)
    assert colour.shape == (3, 6, 6)
    assert colour.n_classes == 4
    assert colour.means.abs().max() < 1
    assert float(colour.mean().abs().max()) > 0.01  # not centred


# --- the flow map --------------------------------------------------------------------------------


def test_flow_map_of_one_gaussian_is_the_closed_form(generator: torch.Generator) -> None:
    mean = torch.tensor([0.4, -1.0], dtype=torch.float64).reshape(2, 1, 1)
    std = torch.tensor([0.3, 0.05], dtype=torch.float64).reshape(2, 1, 1)
    mixture = GaussianMixture(mean[None], std[None], torch.ones(1, dtype=torch.float64))
    x = torch.randn((6, 2, 1, 1), generator=generator, dtype=torch.float64)
    sigma = torch.tensor([80.0, 80.0, 5.0, 1.0, 0.1, 0.002], dtype=torch.float64)
    end = torch.tensor([0.0, 0.002, 0.5, 40.0, 0.0, 80.0], dtype=torch.float64)  # up as well
    x = mean + x * torch.sqrt(std**2 + sigma[:, None, None, None] ** 2)
    ours = mixture.flow_map(x, sigma, end)
    exact = gaussian_flow_map(mean, std, x, sigma, end)
    torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-10)


def test_flow_map_in_one_dimension_matches_quantiles() -> None:
    """In 1-D the PF-ODE keeps the order of points: it is the monotone map of the distributions."""
    means = torch.tensor([-0.8, 0.1, 0.9], dtype=torch.float64)
    stds = torch.tensor([0.2, 0.1, 0.3], dtype=torch.float64)
    weights = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    mixture = GaussianMixture(means[:, None], stds[:, None], weights)

    def cdf(x: Tensor, sigma: float) -> Tensor:
        z = (x - means) / torch.sqrt(stds**2 + sigma**2)
        return (torch.special.ndtr(z) * weights).sum(1, keepdim=True)

    x = 80 * torch.linspace(-2.5, 2.5, 41, dtype=torch.float64)[:, None]
    end = mixture.flow_map(x, full(41, 80.0))
    torch.testing.assert_close(cdf(end, 0.0), cdf(x, 80.0), rtol=0, atol=1e-10)
    middle = mixture.flow_map(x, full(41, 80.0), 0.3)
    torch.testing.assert_close(cdf(middle, 0.3), cdf(x, 80.0), rtol=0, atol=1e-10)


@pytest.mark.parametrize("label", [None, 3])
def test_flow_map_agrees_with_scipy(
    ring: GaussianMixture, generator: torch.Generator, label: int | None
) -> None:
    """DOP853 on the ODE in ln sigma, another variable, another method: 1e-8."""
    x = 10 * torch.randn((8, 2, 1, 1), generator=generator, dtype=torch.float64)
    labels = None if label is None else torch.full((8,), label)

    def field(log_sigma: float, flat: np.ndarray) -> np.ndarray:
        state = torch.from_numpy(flat).reshape(8, 2, 1, 1)
        level = full(8, math.exp(log_sigma))
        return (state - ring.denoised(state, level, labels)).flatten().numpy()

    theirs = solve_ivp(
        field,
        (math.log(10.0), math.log(0.02)),
        x.flatten().numpy(),
        method="DOP853",
        rtol=1e-12,
        atol=1e-13,
    ).y[:, -1]
    ours = ring.flow_map(x, full(8, 10.0), 0.02, labels)
    torch.testing.assert_close(ours.flatten(), torch.from_numpy(theirs), rtol=0, atol=1e-8)


def test_flow_map_composes_and_inverts(images: GaussianMixture, generator: torch.Generator) -> None:
    x = 80 * torch.randn((6, 1, 8, 8), generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3, 4, 9])
    direct = images.flow_map(x, full(6, 80.0), 0.0, labels)
    middle = images.flow_map(x, full(6, 80.0), 0.7, labels)
    composed = images.flow_map(middle, full(6, 0.7), 0.0, labels)
    torch.testing.assert_close(composed, direct, rtol=0, atol=1e-8)
    back = images.flow_map(direct, full(6, 0.0), 80.0, labels)
    torch.testing.assert_close(back / 80, x / 80, rtol=0, atol=1e-8)


def test_a_trajectory_does_not_depend_on_its_batch(
    ring: GaussianMixture, generator: torch.Generator
) -> None:
    x = 80 * torch.randn((16, 2, 1, 1), generator=generator, dtype=torch.float64)
    together = ring.flow_map(x, full(16, 80.0))
    for i in (0, 7, 15):
        alone = ring.flow_map(x[i : i + 1], full(1, 80.0))
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-11)


def test_nothing_moves_between_equal_levels(ring: GaussianMixture) -> None:
    x = torch.ones((2, 2, 1, 1))
    ours = ring.flow_map(x, torch.full((2,), 0.5), 0.5)
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-7)
    assert ours.dtype == torch.float32


def test_integrator_on_a_known_equation() -> None:
    """x' = -k x + cos t with a rate of each sample, forwards and backwards."""
    rate = torch.tensor([0.1, 1.0, 30.0], dtype=torch.float64)

    def exact(t: Tensor) -> Tensor:
        particular = (rate * torch.cos(t) + torch.sin(t)) / (1 + rate**2)
        return particular + torch.exp(-rate * t)

    def field(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        return -rate[rows][:, None] * x + torch.cos(t)[:, None]

    zero, end = torch.zeros(3, dtype=torch.float64), full(3, 5.0)
    ours = integrate(field, exact(zero)[:, None], zero, end)
    torch.testing.assert_close(ours[:, 0], exact(end), rtol=0, atol=1e-11)
    slow = rate[:2]
    back = integrate(
        lambda x, t, rows: -slow[rows][:, None] * x + torch.cos(t)[:, None],
        exact(end)[:2, None],
        end[:2],
        zero[:2],
    )
    torch.testing.assert_close(back[:, 0], exact(zero)[:2], rtol=0, atol=1e-9)


# --- errors --------------------------------------------------------------------------------------


def test_bad_parameters_say_what_is_allowed() -> None:
    means = torch.zeros(3, 2, dtype=torch.float64)
    ones = torch.ones(3, dtype=torch.float64)
    with pytest.raises(UserError, match=r"weights \(2,\) and stds \(3,\) do not fit"):
        GaussianMixture(means, ones, torch.ones(2))
    with pytest.raises(UserError, match=r"smallest std 0, .*allowed: values above 0"):
        GaussianMixture(means, torch.tensor([1.0, 0.0, 1.0]), ones)
    with pytest.raises(UserError, match=r"component labels \[0, 2, 2\]"):
        GaussianMixture(means, ones, ones, torch.tensor([0, 2, 2]))
    with pytest.raises(UserError, match=r"ring_mixture: std 0\.6; allowed: 0 < std"):
        ring_mixture(8, 0.6)


def test_labels_of_an_unlabelled_mixture() -> None:
    mixture = ring_mixture(labelled=False)
    assert mixture.n_classes == 0
    with pytest.raises(UserError, match="labels were given, but its components have none"):
        mixture.denoised(torch.zeros(1, 2, 1, 1), torch.ones(1), torch.zeros(1, dtype=torch.int64))

"""Solvers against the exact flow map of a mixture, and against their own algebra."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import inverse_ddim
from scipy.integrate import quad
from torch import Tensor

from cmbench.diffusion.frames import edm_to_trig, sigma_to_t, sigma_to_vp_time, trig_to_edm
from cmbench.diffusion.gaussian_mixture import GaussianMixture
from cmbench.diffusion.grids import (
    sampling_karras_sigmas,
    sampling_log_sigmas,
    sampling_sigmas,
    sampling_vp_time_sigmas,
)
from cmbench.diffusion.solvers import (
    Denoiser,
    HeunPlan,
    amed,
    ddim_step,
    euler,
    euler_ancestral,
    heun,
    heun_nfe,
    heun_step,
    stochastic_heun,
    trigflow_ddim_step,
)
from cmbench.diffusion.solvers_adams import (
    _extrapolation_coefficients,
    adams_bashforth,
    deis_tab,
    ipndm,
)
from cmbench.diffusion.solvers_dpm import (
    _multistep_3,
    dpm_solver_multistep,
    dpm_solver_singlestep,
    singlestep_orders,
)
from cmbench.diffusion.solvers_dpm_v3 import (
    ModelStatistics,
    StatisticsBatch,
    dpm_solver_v3,
    estimate_statistics,
)
from cmbench.diffusion.solvers_sa import sa_solver
from cmbench.diffusion.solvers_unipc import unipc
from cmbench.errors import UserError

Solver = Callable[..., Tensor]


def dpm_solver_2(denoise: Denoiser, x: Tensor, sigmas: Tensor, **options: Any) -> Tensor:
    return dpm_solver_singlestep(denoise, x, sigmas, [2] * (len(sigmas) - 1), **options)


def dpm_solver_3(denoise: Denoiser, x: Tensor, sigmas: Tensor, **options: Any) -> Tensor:
    return dpm_solver_singlestep(denoise, x, sigmas, [3] * (len(sigmas) - 1), **options)


def amed_midpoint(denoise: Denoiser, x: Tensor, sigmas: Tensor, **options: Any) -> Tensor:
    steps = len(sigmas) - 1
    return amed(denoise, x, sigmas, [0.5] * steps, [1.0] * steps, **options)


def v3_degenerate(denoise: Denoiser, x: Tensor, sigmas: Tensor, **options: Any) -> Tensor:
    statistics = ModelStatistics.degenerate(LOW, HIGH, intervals=9600)
    return dpm_solver_v3(denoise, x, sigmas, statistics, **options)


HIGH, LOW = 80.0, 0.02

dpm_solver_pp_3m = partial(dpm_solver_multistep, order=3)
DETERMINISTIC: dict[str, Solver] = {
    "euler": euler,
    "heun": heun,
    "dpm_solver_2": dpm_solver_2,
    "dpm_solver_3": dpm_solver_3,
    "dpm_solver_pp_2s": partial(dpm_solver_2, prediction="data"),
    "dpm_solver_pp_3s": partial(dpm_solver_3, prediction="data"),
    "dpm_solver_pp_2m": dpm_solver_multistep,
    "dpm_solver_pp_2m_second_order_end": partial(dpm_solver_multistep, lower_order_final=False),
    "dpm_solver_pp_3m": dpm_solver_pp_3m,
    "dpm_solver_2m": partial(dpm_solver_multistep, prediction="noise"),
    "dpm_solver_3m": partial(dpm_solver_pp_3m, prediction="noise"),
    "dpm_solver_v3": v3_degenerate,
    "dpm_solver_v3_corrected": partial(v3_degenerate, corrector=True, pseudo=True),
    "amed": amed_midpoint,
    "ipndm": ipndm,
    "adams_bashforth": adams_bashforth,
    "sa_solver": partial(sa_solver, tau=lambda sigma: 0.0),
    "deis_tab_0": partial(deis_tab, order=0),
    "deis_tab_3": deis_tab,
    "unipc_1": partial(unipc, order=1),
    "unipc_3": unipc,
    "unipc_3_bh2": partial(unipc, variant="bh2"),
    "unipc_3_noise": partial(unipc, prediction="noise"),
}
#: NFE of n steps: on a grid that ends at 0, and on one that ends above.
NFE: dict[str, tuple[Callable[[int], int], Callable[[int], int]]] = {
    name: (lambda n: n, lambda n: n) for name in DETERMINISTIC
} | {
    "heun": (lambda n: 2 * n - 1, lambda n: 2 * n),
    "dpm_solver_2": (lambda n: 2 * n - 1, lambda n: 2 * n),
    "dpm_solver_3": (lambda n: 3 * n - 2, lambda n: 3 * n),
    "dpm_solver_pp_2s": (lambda n: 2 * n - 1, lambda n: 2 * n),
    "dpm_solver_pp_3s": (lambda n: 3 * n - 2, lambda n: 3 * n),
    "amed": (lambda n: 2 * n - 1, lambda n: 2 * n),
}


class Counted:
    """A denoiser that counts its calls and checks what it is called with."""

    def __init__(self, mixture: GaussianMixture) -> None:
        self.mixture, self.calls, self.labels = mixture, 0, set[int]()

    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        assert sigma.shape == (x.shape[0],)
        assert sigma.dtype == x.dtype
        assert bool((sigma > 0).all())
        self.calls += 1
        if labels is not None:
            self.labels.update(labels.tolist())
        return self.mixture.denoised(x, sigma, labels)


# --- convergence -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def problem(lopsided: GaussianMixture) -> tuple[Tensor, Tensor]:
    """Noise at sigma 80 and the exact flow map's image of it at 0.02."""
    generator = torch.Generator().manual_seed(7)
    x = HIGH * torch.randn((24, 2, 1, 1), generator=generator, dtype=torch.float64)
    sigma = torch.full((24,), HIGH, dtype=torch.float64)
    return x, lopsided.flow_map(x, sigma, LOW)


def slope(errors: dict[int, float]) -> float:
    """Least-squares slope of -log error over log steps."""
    n = torch.tensor([math.log(k) for k in errors])
    e = torch.tensor([math.log(v) for v in errors.values()])
    n, e = n - n.mean(), e - e.mean()
    return -float((n * e).sum() / (n * n).sum())


@pytest.mark.parametrize(
    ("solver", "order", "steps"),
    [
        (euler, 1, (40, 80, 160)),
        (heun, 2, (40, 80, 160)),
        (dpm_solver_2, 2, (40, 80, 160)),
        (dpm_solver_3, 3, (40, 80, 160)),
        (partial(dpm_solver_2, prediction="data"), 2, (40, 80, 160)),
        (partial(dpm_solver_3, prediction="data"), 3, (40, 80, 160)),
        (amed_midpoint, 2, (40, 80, 160)),
        (dpm_solver_multistep, 2, (40, 80, 160)),
        (partial(dpm_solver_multistep, prediction="noise"), 2, (40, 80, 160)),
        (partial(dpm_solver_pp_3m, prediction="noise", curvature="exact"), 3, (80, 160, 320)),
        (partial(v3_degenerate, order=1), 1, (40, 80, 160)),
        (partial(v3_degenerate, order=2, lower_order_final=False), 2, (40, 80, 160)),
        (partial(v3_degenerate, order=3, lower_order_final=False), 3, (40, 80, 160)),
        (partial(adams_bashforth, order=2), 2, (80, 160, 320)),
        (partial(adams_bashforth, order=3), 3, (80, 160, 320)),
        (partial(adams_bashforth, order=4), 4, (160, 320, 640)),
        (ipndm, 2, (80, 160, 320)),
        (dpm_solver_pp_3m, 2, (80, 160, 320)),
        (partial(dpm_solver_pp_3m, curvature="exact"), 3, (40, 80, 160)),
        (partial(deis_tab, order=0), 1, (40, 80, 160)),
        (partial(deis_tab, order=1), 2, (80, 160, 320)),
        (partial(deis_tab, order=2), 3, (80, 160, 320)),
        (partial(deis_tab, order=3), 4, (80, 160, 320)),
        (partial(unipc, order=1), 2, (40, 80, 160)),
        (partial(unipc, order=2), 3, (40, 80, 160)),
        (partial(unipc, order=2, variant="bh2"), 3, (40, 80, 160)),
    ],
)
def test_convergence_order(
    lopsided: GaussianMixture,
    problem: tuple[Tensor, Tensor],
    solver: Solver,
    order: int,
    steps: tuple[int, ...],
) -> None:
    x, exact = problem
    errors = {}
    for n in steps:
        error = solver(lopsided.denoised, x, sampling_log_sigmas(n, LOW, HIGH)) - exact
        errors[n] = float(error.flatten(1).norm(dim=1).mean())
    # Orders are whole numbers: half of what separates two of them would already do.
    assert slope(errors) == pytest.approx(order, abs=0.25), errors


@pytest.mark.parametrize(("predictor", "corrector", "order"), [(2, 0, 2), (2, 3, 3), (3, 0, 3)])
def test_order_of_the_stochastic_adams_method_without_noise(
    lopsided: GaussianMixture,
    problem: tuple[Tensor, Tensor],
    predictor: int,
    corrector: int,
    order: int,
) -> None:
    """In the form that corrects every step and returns the denoised images."""
    x, exact = problem
    exact = lopsided.denoised(exact, torch.full((len(x),), LOW, dtype=torch.float64))
    errors = {}
    for n in (40, 80, 160):
        ours = sa_solver(
            lopsided.denoised,
            x,
            sampling_log_sigmas(n, LOW, HIGH),
            predictor_order=predictor,
            corrector_order=corrector,
            tau=lambda sigma: 0.0,
            few_steps=False,
        )
        errors[n] = float((ours - exact).flatten(1).norm(dim=1).mean())
    assert slope(errors) == pytest.approx(order, abs=0.25), errors


def test_equal_steps_in_sigma_are_what_constant_weights_are_for(lopsided: GaussianMixture) -> None:
    """There iPNDM is Adams-Bashforth; on another grid the two differ."""
    x = torch.ones((4, 2, 1, 1), dtype=torch.float64)
    equal = torch.linspace(3.0, 0.5, 9, dtype=torch.float64)
    for order in (1, 2, 3, 4):
        constant = ipndm(lopsided.denoised, x, equal, order=order)
        exact = adams_bashforth(lopsided.denoised, x, equal, order=order)
        torch.testing.assert_close(constant, exact, rtol=1e-12, atol=1e-12)
    other = sampling_karras_sigmas(8, 0.5, 3.0)
    constant = ipndm(lopsided.denoised, x, other)
    exact = adams_bashforth(lopsided.denoised, x, other)
    assert float((constant - exact).abs().min()) > 1e-4


def test_unipc_3_is_of_fourth_order(
    lopsided: GaussianMixture, problem: tuple[Tensor, Tensor]
) -> None:
    """Its error changes sign on the way: a looser fit. Ending with lower orders costs the rest."""
    x, exact = problem
    full, lowered = {}, {}
    for n in (20, 40, 80, 160):
        grid = sampling_log_sigmas(n, LOW, HIGH)
        full[n] = float((unipc(lopsided.denoised, x, grid, lower_order_final=False) - exact).norm())
        lowered[n] = float((unipc(lopsided.denoised, x, grid) - exact).norm())
    assert slope(full) > 3.5, full
    assert slope(lowered) < slope(full)


def test_higher_order_pays(lopsided: GaussianMixture, problem: tuple[Tensor, Tensor]) -> None:
    """At 20 evaluations on the recommended grids each refinement of the family is closer."""
    x, exact = problem

    def error(solver: Solver, grid: Tensor) -> float:
        return float((solver(lopsided.denoised, x, grid) - exact).norm())

    log_grid = sampling_log_sigmas(20, LOW, HIGH)
    by_family = [error(solver, log_grid) for solver in (euler, dpm_solver_multistep, unipc)]
    assert by_family == sorted(by_family, reverse=True)
    vp_grid = sampling_vp_time_sigmas(20, LOW, HIGH)
    by_order = [error(partial(deis_tab, order=q), vp_grid) for q in range(4)]
    assert by_order == sorted(by_order, reverse=True)


def test_2m_ends_with_a_first_order_step_below_10_steps(images: GaussianMixture) -> None:
    """As released: better at every NFE from 2 to 9 but 3, and nothing changes from 10 on."""
    generator = torch.Generator().manual_seed(0)
    x = HIGH * torch.randn((64, *images.shape), generator=generator, dtype=torch.float64)
    exact = images.flow_map(x, torch.full((64,), HIGH, dtype=torch.float64), 0.002)
    better = []
    for n in range(1, 12):
        grid = sampling_log_sigmas(n, 0.002, HIGH)
        released = dpm_solver_multistep(images.denoised, x, grid)
        printed = dpm_solver_multistep(images.denoised, x, grid, lower_order_final=False)
        if n in (1, 10, 11):
            assert torch.equal(released, printed)
        elif float((released - exact).norm()) < float((printed - exact).norm()):
            better.append(n)
    assert better == [2, 4, 5, 6, 7, 8, 9]


def test_2m_written_out(ring: GaussianMixture) -> None:
    """Three steps with h = ln(sigma / s): first order, second order, and the end of either form."""
    x, (s0, s1, s2, s3) = torch.full((1, 2, 1, 1), 3.0, dtype=torch.float64), (8.0, 2.0, 1.0, 0.2)

    def d(x: Tensor, sigma: float) -> Tensor:
        return ring.denoised(x, torch.tensor([sigma], dtype=torch.float64))

    d0 = d(x, s0)
    x1 = s1 / s0 * x + (1 - s1 / s0) * d0
    d1 = d(x1, s1)
    bent = d1 + math.log(s1 / s2) / (2 * math.log(s0 / s1)) * (d1 - d0)
    x2 = s2 / s1 * x1 + (1 - s2 / s1) * bent
    d2 = d(x2, s2)
    bent = d2 + math.log(s2 / s3) / (2 * math.log(s1 / s2)) * (d2 - d1)
    grid = torch.tensor([s0, s1, s2, s3], dtype=torch.float64)
    for lower, last in ((None, d2), (True, d2), (False, bent)):
        ours = dpm_solver_multistep(ring.denoised, x, grid, lower_order_final=lower)
        torch.testing.assert_close(ours, s3 / s2 * x2 + (1 - s3 / s2) * last)


# --- cost, one step, dtype ---------------------------------------------------------------------


@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 9])
def test_nfe(ring: GaussianMixture, name: str, n: int) -> None:
    to_zero, above = NFE[name]
    for grid, expected in ((sampling_sigmas(n), to_zero(n)), (sampling_log_sigmas(n), above(n))):
        counted = Counted(ring)
        start = 80 * torch.ones(2, 2, 1, 1, dtype=torch.float64)
        end = DETERMINISTIC[name](counted, start, grid)
        assert counted.calls == expected
        assert bool(end.isfinite().all())


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_one_step_to_zero_is_the_denoiser(ring: GaussianMixture, name: str) -> None:
    x = torch.randn(3, 2, 1, 1, generator=torch.Generator().manual_seed(1)) * 80
    ours = DETERMINISTIC[name](ring.denoised, x, sampling_sigmas(1))
    assert torch.equal(ours, ring.denoised(x, torch.full((3,), 80.0)))


@pytest.mark.parametrize("name", [*DETERMINISTIC, "euler_ancestral", "stochastic_heun"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_state_keeps_its_dtype_and_labels_arrive(
    ring: GaussianMixture, name: str, dtype: torch.dtype
) -> None:
    solvers = DETERMINISTIC | {
        "euler_ancestral": euler_ancestral,
        "stochastic_heun": stochastic_heun,
    }
    counted = Counted(ring)
    x = torch.ones(3, 2, 1, 1, dtype=dtype) * 80
    end = solvers[name](
        counted,
        x,
        sampling_sigmas(4),
        labels=torch.tensor([1, 5, 7]),
        noise_sampler=lambda step: torch.zeros_like(x),
    )
    assert end.dtype == dtype
    assert counted.labels == {1, 5, 7}
    assert bool((x == 80).all())  # the caller's noise is not overwritten


@given(nfe=st.integers(1, 200), extra_euler=st.sampled_from(["first", "last"]))
@settings(max_examples=25)
def test_heun_plan_spends_exactly_the_budget(
    nfe: int, extra_euler: Literal["first", "last"]
) -> None:
    plan = heun_nfe(nfe, extra_euler=extra_euler)
    assert plan.nfe == nfe
    calls = 0

    def denoise(x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        nonlocal calls
        calls += 1
        return x / 2

    heun(denoise, torch.ones(1, 1), sampling_sigmas(plan.n_steps), **plan.options)
    assert calls == nfe


def test_heun_plan_of_published_budgets() -> None:
    assert [heun_nfe(n).n_steps for n in (1, 35, 79, 511)] == [1, 18, 40, 256]
    assert [heun_nfe(n).leading_euler_steps for n in (1, 2, 3, 4, 35)] == [0, 1, 0, 1, 0]


def test_even_budgets_of_heun(lopsided: GaussianMixture, generator: torch.Generator) -> None:
    """Where the extra Euler step goes: last beats first, and neither spoils the larger budgets."""
    x = 80 * torch.randn((64, 2, 1, 1), generator=generator, dtype=torch.float64)
    exact = lopsided.flow_map(x, torch.full((64,), 80.0, dtype=torch.float64))

    def error(plan: HeunPlan) -> float:
        ours = heun(lopsided.denoised, x, sampling_sigmas(plan.n_steps), **plan.options)
        return float((ours - exact).flatten(1).norm(dim=1).mean())

    for nfe in range(4, 40, 4):
        assert error(heun_nfe(nfe, extra_euler="last")) < error(heun_nfe(nfe))
    for nfe in range(10, 40, 4):
        for place in ("first", "last"):
            even = heun_nfe(nfe, extra_euler=place)  # type: ignore[arg-type]
            assert error(even) < error(heun_nfe(nfe - 1))


@given(nfe=st.integers(1, 100))
def test_fast_orders_sum_to_the_budget(nfe: int) -> None:
    orders = singlestep_orders(nfe)
    assert sum(orders) == nfe
    assert len(orders) == nfe // 3 + 1
    assert set(orders) <= {1, 2, 3}


def test_fast_orders_published() -> None:
    assert singlestep_orders(10) == (3, 3, 3, 1)
    assert singlestep_orders(12) == (3, 3, 3, 2, 1)
    assert singlestep_orders(11) == (3, 3, 3, 2)


def test_single_step_orders_are_counted(ring: GaussianMixture) -> None:
    counted = Counted(ring)
    x = torch.ones(1, 2, 1, 1, dtype=torch.float64) * 80
    orders = singlestep_orders(13)
    end = dpm_solver_singlestep(counted, x, sampling_log_sigmas(len(orders)), orders)
    assert counted.calls == 13
    assert bool(end.isfinite().all())


@pytest.mark.parametrize(
    ("solver", "fractions"),
    [(heun, (0, 1)), (dpm_solver_2, (0, 1 / 2)), (dpm_solver_3, (0, 1 / 3, 2 / 3))],
)
def test_noise_levels_inside_a_step(
    ring: GaussianMixture, solver: Solver, fractions: tuple[float, ...]
) -> None:
    """The midpoints are geometric; other ones make other methods of the same order."""
    seen: list[float] = []

    def denoise(x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        seen.append(sigma.item())
        return ring.denoised(x, sigma)

    high, low = 3.0, 0.2
    solver(denoise, torch.ones(1, 2, 1, 1, dtype=torch.float64), torch.tensor([high, low]).double())
    assert seen == pytest.approx([high ** (1 - r) * low**r for r in fractions], rel=1e-6)


# --- analytic first step, exact solutions, statistics --------------------------------------------


@pytest.mark.parametrize("solver", [ipndm, adams_bashforth, deis_tab, amed_midpoint])
def test_the_analytic_first_step_takes_the_state_for_the_noise(
    ring: GaussianMixture, solver: Solver
) -> None:
    """One evaluation less; the same as a network that answers so at the first level."""

    def denoise(x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        if sigma[0] < 80:
            return ring.denoised(x, sigma)
        return x - 80 * x / math.sqrt(1 + 80**2)

    x = 80 * torch.randn((4, 2, 1, 1), generator=torch.Generator().manual_seed(3)).double()
    grid, counted = sampling_karras_sigmas(4), Counted(ring)
    calls_without = 4 * (2 if solver is amed_midpoint else 1)
    ours = solver(counted, x, grid, analytic_first_step=True)
    assert counted.calls == calls_without - 1
    torch.testing.assert_close(ours, solver(denoise, x, grid), rtol=1e-12, atol=1e-12)


def test_the_analytic_first_step_at_nfe_1_evaluates_the_second_level(ring: GaussianMixture) -> None:
    seen: list[float] = []

    def denoise(x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        seen.extend(sigma.tolist())
        return ring.denoised(x, sigma)

    x = torch.ones(1, 2, 1, 1, dtype=torch.float64) * 80
    grid = torch.tensor([80.0, 2.0, 0.0], dtype=torch.float64)
    ours = ipndm(denoise, x, grid, analytic_first_step=True)
    assert seen == [2.0]
    there = x + (2.0 - 80.0) * x / math.sqrt(1 + 80.0**2)
    expected = ring.denoised(there, torch.tensor([2.0], dtype=torch.float64))
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def gaussian(mean: float, std: float) -> GaussianMixture:
    return GaussianMixture(
        means=torch.full((1, 2, 1, 1), mean, dtype=torch.float64),
        stds=torch.full((1, 2, 1, 1), std, dtype=torch.float64),
        weights=torch.ones(1, dtype=torch.float64),
    )


def statistics_of(mixture: GaussianMixture, std: float, grid: Tensor) -> ModelStatistics:
    generator = torch.Generator().manual_seed(5)
    shape = (32, 2, 1, 1)
    noise, data = (torch.randn(shape, generator=generator).double() for _ in range(2))
    signs = torch.randint(0, 2, shape, generator=generator).double() * 2 - 1
    batches = [StatisticsBatch(mixture.means[0] + std * data, noise, signs)]
    return estimate_statistics(mixture.denoised, batches, grid)


def test_estimated_statistics_of_a_normal_distribution() -> None:
    """``D`` is linear: l = sigma^2 / (std^2 + sigma^2), f = -l mean, s = 0, b = df/dlambda."""
    mean, std = 0.4, 0.5
    grid = torch.linspace(-math.log(HIGH), -math.log(LOW), 241, dtype=torch.float64)
    found = statistics_of(gaussian(mean, std), std, grid)
    variance = torch.exp(-2 * grid)
    linear = variance / (std**2 + variance)
    expected = linear[:, None, None, None].expand(-1, 2, 1, 1)
    torch.testing.assert_close(found.l, expected, rtol=1e-10, atol=1e-12)
    assert bool((found.s == 0).all())
    slope_of_l = -2 * linear * (1 - linear)
    expected = -mean * slope_of_l[:, None, None, None].expand(-1, 2, 1, 1)
    torch.testing.assert_close(found.b[1:-1], expected[1:-1], rtol=0, atol=2e-4)


@pytest.mark.parametrize("mean", [0.0, 0.4])
def test_with_statistics_few_first_order_steps_are_exact_for_a_normal_distribution(
    mean: float,
) -> None:
    std = 0.5
    mixture = gaussian(mean, std)
    grid = torch.linspace(-math.log(HIGH), -math.log(LOW), 961, dtype=torch.float64)
    x = HIGH * torch.randn((8, 2, 1, 1), generator=torch.Generator().manual_seed(1)).double()
    exact = mixture.flow_map(x, torch.full((8,), HIGH, dtype=torch.float64), LOW)
    sigmas = sampling_log_sigmas(3, LOW, HIGH)

    def error(statistics: ModelStatistics) -> float:
        ours = dpm_solver_v3(mixture.denoised, x, sigmas, statistics, order=1)
        return float((ours - exact).abs().max())

    fitted = error(statistics_of(mixture, std, grid))
    assert fitted < 1e-3  # of the trapezoid sums and the differences of l
    assert fitted < error(ModelStatistics.degenerate(LOW, HIGH, 960)) / 50


def test_statistics_fit_a_mixture_better_than_none(lopsided: GaussianMixture) -> None:
    """Estimated on its samples, they make steps of order 1 more accurate."""
    generator = torch.Generator().manual_seed(5)
    clean = lopsided.sample(512, generator)[0]
    noise = torch.randn(clean.shape, generator=generator, dtype=torch.float64)
    signs = torch.randint(0, 2, clean.shape, generator=generator).double() * 2 - 1
    grid = torch.linspace(-math.log(HIGH), -math.log(LOW), 121, dtype=torch.float64)
    found = estimate_statistics(lopsided.denoised, [StatisticsBatch(clean, noise, signs)], grid)
    x = HIGH * torch.randn((256, 2, 1, 1), generator=generator, dtype=torch.float64)
    exact = lopsided.flow_map(x, torch.full((256,), HIGH, dtype=torch.float64), LOW)
    errors = []
    for statistics in (found, ModelStatistics.degenerate(LOW, HIGH, 120)):
        ours = dpm_solver_v3(
            lopsided.denoised, x, sampling_log_sigmas(5, LOW, HIGH), statistics, order=1
        )
        errors.append(float((ours - exact).flatten(1).norm(dim=1).mean()))
    assert errors[0] < errors[1], errors


def test_noise_of_the_stochastic_adams_method(ring: GaussianMixture) -> None:
    """It is asked for in the steps to sigma in [0.05, 1] only, and by step."""
    asked: list[int] = []
    x = torch.ones(1, 2, 1, 1, dtype=torch.float64) * 80

    def noise(step: int) -> Tensor:
        asked.append(step)
        return torch.zeros_like(x)

    grid = torch.tensor([80.0, 5.0, 0.9, 0.3, 0.04, 0.002], dtype=torch.float64)
    sa_solver(ring.denoised, x, grid, noise_sampler=noise)
    assert asked == [1, 2]
    with pytest.raises(UserError, match="sa_solver"):
        sa_solver(ring.denoised, x, grid)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda d, x, g: ipndm(d, x, g, order=5), "ipndm: order 5"),
        (lambda d, x, g: adams_bashforth(d, x, g, order=0), "adams_bashforth: order 0"),
        (lambda d, x, g: sa_solver(d, x, g, corrector_order=5), "sa_solver: corrector order 5"),
        (lambda d, x, g: v3_degenerate(d, x, g, order=4), "dpm_solver_v3: order 4"),
        (lambda d, x, g: unipc(d, x, g, order=5), "unipc: order 5"),
    ],
)
def test_orders_that_do_not_exist(ring: GaussianMixture, call: Solver, said: str) -> None:
    with pytest.raises(UserError, match=said):
        call(ring.denoised, torch.ones(1, 2, 1, 1), sampling_log_sigmas(3))


# --- algebra of the steps ----------------------------------------------------------------------

finite = st.floats(-3, 3, allow_nan=False)


@given(x=finite, denoised=finite, sigma=st.floats(0.01, 80), fraction=st.floats(0, 0.99))
def test_inverse_ddim_undoes_ddim(x: float, denoised: float, sigma: float, fraction: float) -> None:
    x_sigma = torch.tensor([[x * sigma]], dtype=torch.float64)
    target = torch.tensor([[denoised]], dtype=torch.float64)
    level = torch.tensor([sigma], dtype=torch.float64)
    level_next = level * fraction
    moved = ddim_step(x_sigma, target, level, level_next)
    recovered = inverse_ddim(moved, x_sigma, level, level_next)
    scale = max(1.0, abs(x * sigma))
    torch.testing.assert_close(recovered, target, rtol=0, atol=1e-12 * scale / (1 - fraction))
    if fraction == 0:
        assert torch.equal(moved, target)


@given(t=st.floats(0.05, 1.56), fraction=st.floats(0, 0.95), x=finite, velocity=finite)
def test_trigflow_ddim_is_the_same_step(
    t: float, fraction: float, x: float, velocity: float
) -> None:
    sigma_data = 0.7
    start = torch.tensor([t], dtype=torch.float64)
    end = start * fraction
    x_t = torch.tensor([[x]], dtype=torch.float64)
    v = torch.tensor([[velocity]], dtype=torch.float64)
    ours = trigflow_ddim_step(x_t, v, start, end)
    x_sigma, sigma = trig_to_edm(x_t, start, sigma_data)
    denoised = torch.cos(start) * x_t - torch.sin(start) * v
    theirs = ddim_step(x_sigma, denoised, sigma, torch.tan(end) * sigma_data)
    theirs, t_end = edm_to_trig(theirs, torch.tan(end) * sigma_data, sigma_data)
    torch.testing.assert_close(t_end, end, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)
    assert sigma_to_t(sigma, sigma_data).item() == pytest.approx(t, abs=1e-12)


def test_halving_target_of_an_exact_teacher_on_one_point(generator: torch.Generator) -> None:
    """Two teacher steps, inverted as one, give the data where the teacher knows it."""
    point = torch.randn((4, 3, 2, 2), generator=generator, dtype=torch.float64)
    x = point + 5 * torch.randn(point.shape, generator=generator, dtype=torch.float64)
    sigma = torch.full((4,), 5.0, dtype=torch.float64)
    middle = ddim_step(x, point, sigma, sigma * 0.6)
    end = ddim_step(middle, point, sigma * 0.6, sigma * 0.3)
    target = inverse_ddim(end, x, sigma, sigma * 0.3)
    torch.testing.assert_close(target, point, rtol=0, atol=1e-12)


def test_heun_step_takes_a_level_for_each_image(lopsided: GaussianMixture) -> None:
    x = torch.randn(3, 2, 1, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    sigma = torch.tensor([0.5, 2.0, 10.0], dtype=torch.float64)
    together = heun_step(lopsided.denoised, x, sigma, sigma / 2)
    for i in range(3):
        alone = heun_step(lopsided.denoised, x[i : i + 1], sigma[i], sigma[i] / 2)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-14)
    # Per-image levels in float64 do not turn float32 images into float64.
    assert heun_step(lopsided.denoised, x.float(), sigma.float(), sigma.float() / 2).dtype == (
        torch.float32
    )


def test_three_slopes_integrate_a_parabola() -> None:
    """Exactly, with the exact curvature; the released weight misses phi_3 times the curvature."""
    sigmas = torch.tensor([5.0, 3.0, 1.7, 0.9], dtype=torch.float64)
    lam = -sigmas.log()
    steps = lam.diff()

    def parabola(u: float) -> float:
        return 0.3 - 0.7 * u + 0.4 * u**2

    def ours(weight: float) -> float:
        history = [torch.tensor(parabola(u), dtype=torch.float64) for u in lam[:3].flip(0).tolist()]
        start = torch.tensor(2.0, dtype=torch.float64)
        return float(_multistep_3("data", start, history, sigmas[2], sigmas[3], steps, weight))

    # x_s = (s / sigma) x + s * integral of e^lambda D(lambda)
    integral, _ = quad(lambda u: math.exp(u) * parabola(u), lam[2], lam[3], epsabs=1e-14)
    exact = 0.9 / 1.7 * 2.0 + 0.9 * integral
    assert ours(2.0) == pytest.approx(exact, abs=1e-13)
    h = float(steps[2])
    phi_3 = (math.expm1(-h) / h + 1) / h - 0.5
    assert ours(1.0) == pytest.approx(exact + phi_3 * 0.4 * h**2, abs=1e-13)


@pytest.mark.parametrize("n_past", [1, 2, 3, 4])
@pytest.mark.parametrize("step", [0, 3])
def test_deis_coefficients_integrate_polynomials(n_past: int, step: int) -> None:
    """They are exact for 1, tau, … tau^(n-1): compare with adaptive quadrature."""
    sigmas = sampling_vp_time_sigmas(7)
    newest = step + n_past - 1
    past, sigma, after = sigmas[step : newest + 1].flip(0), sigmas[newest], sigmas[newest + 1]
    coefficients = _extrapolation_coefficients(past, after, sigma_to_vp_time)
    for power in range(n_past):
        moments = (sigma_to_vp_time(past) ** power).tolist()
        ours = sum(c * m for c, m in zip(coefficients, moments, strict=True))
        expected, _ = quad(
            lambda u, p=power: (
                sigma_to_vp_time(torch.tensor(math.exp(u), dtype=torch.float64)).item() ** p
                * math.exp(u)
            ),
            math.log(sigma),
            math.log(after),
            epsabs=0,
            epsrel=1e-12,
        )
        assert ours == pytest.approx(expected, rel=1e-9), power


# --- noise -------------------------------------------------------------------------------------


def constant(point: Tensor) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    return lambda x, sigma, labels: point


def test_ancestral_step_is_the_posterior_of_one_point(generator: torch.Generator) -> None:
    """Mean x0 + s^2/sigma^2 (x - x0), variance s^2 (sigma^2 - s^2) / sigma^2."""
    point, x, z = (
        torch.randn((2, 3, 2, 2), generator=generator, dtype=torch.float64) for _ in range(3)
    )
    sigma, s = 3.0, 1.2
    grid = torch.tensor([sigma, s], dtype=torch.float64)
    ours = euler_ancestral(constant(point), x, grid, noise_sampler=lambda step: z)
    mean = point + s**2 / sigma**2 * (x - point)
    std = math.sqrt(s**2 * (sigma**2 - s**2) / sigma**2)
    torch.testing.assert_close(ours, mean + std * z, rtol=0, atol=1e-13)


def test_no_noise_in_the_last_step_to_zero(ring: GaussianMixture) -> None:
    steps: list[int] = []
    x = torch.ones(1, 2, 1, 1, dtype=torch.float64) * 80

    def noise(step: int) -> Tensor:
        steps.append(step)
        return torch.zeros_like(x)

    euler_ancestral(ring.denoised, x, sampling_sigmas(4), noise_sampler=noise)
    assert steps == [0, 1, 2]
    end = euler_ancestral(ring.denoised, x, sampling_sigmas(1))  # one step needs none
    assert torch.equal(end, ring.denoised(x, torch.full((1,), 80.0, dtype=torch.float64)))


def test_churn_raises_the_noise_level_and_adds_the_difference(generator: torch.Generator) -> None:
    point, x, z = (
        torch.randn((2, 3, 2, 2), generator=generator, dtype=torch.float64) for _ in range(3)
    )
    grid = torch.tensor([2.0, 1.0], dtype=torch.float64)
    ours = stochastic_heun(
        constant(point), x, grid, noise_sampler=lambda step: z, s_churn=0.3, s_noise=1.0
    )
    raised = 2.0 * 1.3
    noisy = x + math.sqrt(raised**2 - 4) * z
    torch.testing.assert_close(ours, point + (noisy - point) / raised, rtol=0, atol=1e-13)


def test_no_churn_is_heun(lopsided: GaussianMixture) -> None:
    x = torch.full((1, 2, 1, 1), 40.0, dtype=torch.float64)
    grid = sampling_sigmas(6)
    ours = stochastic_heun(lopsided.denoised, x, grid, s_churn=0.0)
    assert torch.equal(ours, heun(lopsided.denoised, x, grid))


@pytest.mark.parametrize("solver", [euler_ancestral, stochastic_heun])
def test_stochastic_solver_without_noise_says_so(ring: GaussianMixture, solver: Solver) -> None:
    x = torch.ones(1, 2, 1, 1, dtype=torch.float64)
    grid = torch.tensor([2.0, 1.0, 0.5])
    with pytest.raises(UserError, match=r"no noise_sampler was given, .*pass noise_sampler"):
        solver(ring.denoised, x, grid)


def test_bad_budgets_and_orders_say_what_is_allowed(ring: GaussianMixture) -> None:
    with pytest.raises(UserError, match="heun: NFE 0; allowed: 1 or more"):
        heun_nfe(0)
    with pytest.raises(UserError, match="singlestep_orders: NFE -3"):
        singlestep_orders(-3)
    x = torch.ones(1, 2, 1, 1)
    with pytest.raises(UserError, match=r"orders \[3\] for 2 steps"):
        dpm_solver_singlestep(ring.denoised, x, sampling_log_sigmas(2), [3])
    with pytest.raises(UserError, match="unipc: order 5; allowed: 1 to 4"):
        unipc(ring.denoised, x, sampling_log_sigmas(2), order=5)
    with pytest.raises(UserError, match="deis_tab: degree 4; allowed: 0 to 3"):
        deis_tab(ring.denoised, x, sampling_log_sigmas(2), order=4)


@pytest.mark.cuda
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_solvers_on_the_gpu_take_grids_from_the_cpu(ring: GaussianMixture, name: str) -> None:
    solver, grid = DETERMINISTIC[name], sampling_log_sigmas(5)
    x = 80 * torch.randn(4, 2, 1, 1, generator=torch.Generator().manual_seed(2)).double()
    on_gpu = ring.to("cuda")
    ours = solver(on_gpu.denoised, x.cuda(), grid)
    assert ours.device.type == "cuda"
    torch.testing.assert_close(ours.cpu(), solver(ring.denoised, x, grid), rtol=0, atol=1e-9)
    flowed = on_gpu.flow_map(x.cuda(), torch.full((4,), 80.0, device="cuda"), 0.002)
    exact = ring.flow_map(x, torch.full((4,), 80.0), 0.002)
    torch.testing.assert_close(flowed.cpu(), exact, rtol=0, atol=1e-8)

"""Properties of every grid, curriculum and proposal distribution."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cmbench.diffusion.frames import sigma_to_vp_time
from cmbench.diffusion.grids import (
    choose_bin,
    doubling_curriculum,
    halving_stages,
    karras_sigmas,
    log_sigmas,
    lognormal_bin_probabilities,
    lognormal_sigmas,
    lognormal_times,
    power_sigmas,
    sampling_log_sigmas,
    sampling_sigmas,
    sampling_vp_time_sigmas,
    shrinking_gap_time,
    sigmoid_gap_ratio,
    sqrt_curriculum,
    target_ema_decay,
    vp_time_sigmas,
)
from cmbench.errors import UserError

GRIDS: dict[str, Callable[..., Tensor]] = {
    "karras_sigmas": karras_sigmas,
    "log_sigmas": log_sigmas,
    "vp_time_sigmas": vp_time_sigmas,
}
SAMPLING: dict[str, Callable[..., Tensor]] = {
    "sampling_sigmas": sampling_sigmas,
    "sampling_log_sigmas": sampling_log_sigmas,
    "sampling_vp_time_sigmas": sampling_vp_time_sigmas,
}
ends = st.tuples(st.floats(1e-4, 0.5), st.floats(1.0, 1e3))

# --- grids -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GRIDS)
@given(n=st.integers(2, 1281), ends=ends)
def test_grids_ascend_and_hit_their_ends(name: str, n: int, ends: tuple[float, float]) -> None:
    grid = GRIDS[name](n, *ends)
    assert grid.shape == (n,)
    assert grid.dtype == torch.float64
    assert bool((grid.diff() > 0).all())
    assert (grid[0].item(), grid[-1].item()) == ends


@pytest.mark.parametrize("name", GRIDS)
@given(ends=ends)
def test_one_point_is_the_largest(name: str, ends: tuple[float, float]) -> None:
    assert GRIDS[name](1, *ends).tolist() == [ends[1]]


@given(n=st.integers(2, 300), rho=st.floats(1, 20))
def test_karras_grid_is_uniform_in_the_root(n: int, rho: float) -> None:
    roots = karras_sigmas(n, rho=rho) ** (1 / rho)
    steps = roots.diff()
    torch.testing.assert_close(steps, steps.mean().expand(n - 1), rtol=1e-8, atol=0)


def test_grids_are_uniform_in_their_variable() -> None:
    for variable in (log_sigmas(33).log(), sigma_to_vp_time(vp_time_sigmas(33)).sqrt()):
        steps = variable.diff()
        torch.testing.assert_close(steps, steps.mean().expand(32), rtol=1e-9, atol=0)


def test_karras_grid_reaches_zero_noise() -> None:
    grid = karras_sigmas(5, sigma_min=0.0)
    assert grid[0] == 0
    assert bool((grid.diff() > 0).all())


@pytest.mark.parametrize("name", SAMPLING)
@pytest.mark.parametrize("n", [1, 2, 18])
def test_sampling_grids_descend_in_n_steps(name: str, n: int) -> None:
    grid = SAMPLING[name](n)
    assert grid.shape == (n + 1,)
    assert bool((grid.diff() < 0).all())
    assert grid[0] == 80
    assert grid[-1].item() == (0.0 if name == "sampling_sigmas" else 0.002)


def test_one_step_grids() -> None:
    assert sampling_sigmas(1).tolist() == [80.0, 0.0]
    assert sampling_log_sigmas(1).tolist() == [80.0, 0.002]


def test_published_intermediate_points() -> None:
    """The noise levels behind the released indices of the two-step samplers."""
    for index, steps, sigma in ((11, 18, 0.585), (22, 40, 1.382), (106, 201, 1.913)):
        assert karras_sigmas(steps)[steps - 1 - index].item() == pytest.approx(sigma, abs=5e-4)


@pytest.mark.parametrize("name", GRIDS | SAMPLING)
def test_bad_grids_say_what_is_allowed(name: str) -> None:
    grid = (GRIDS | SAMPLING)[name]
    with pytest.raises(UserError, match="0 points or steps; allowed: 1 or more"):
        grid(0)
    with pytest.raises(UserError, match=r"sigma_min 3, sigma_max 2; allowed: .*sigma_max"):
        grid(4, 3.0, 2.0)
    with pytest.raises(UserError, match="sigma_min nan"):
        grid(4, math.nan, 2.0)
    if name != "karras_sigmas" and name != "sampling_sigmas":
        with pytest.raises(UserError, match="sigma_min 0,"):
            grid(4, 0.0, 2.0)


# --- curricula -------------------------------------------------------------------------------


def test_doubling_curriculum_as_published() -> None:
    stages = [doubling_curriculum(50_000 * i, 400_000, 10, 1280) for i in range(9)]
    assert stages == [11, 21, 41, 81, 161, 321, 641, 1281, 1281]
    assert doubling_curriculum(49_999, 400_000, 10, 1280) == 11
    assert doubling_curriculum(10**9, 400_000, 10, 1280) == 1281


def test_sqrt_curriculum_as_published() -> None:
    values = {0: 2, 1: 3, 1000: 6, 100_000: 54, 400_000: 107, 800_000: 151}
    assert {k: sqrt_curriculum(k, 800_000, 2, 150) for k in values} == values


curricula = st.sampled_from([sqrt_curriculum, doubling_curriculum])


@given(
    curriculum=curricula,
    total=st.integers(1, 10**6),
    s0=st.integers(1, 20),
    more=st.integers(0, 2000),
    steps=st.lists(st.integers(0, 2 * 10**6), min_size=2, max_size=20),
)
def test_curricula_only_rise_within_their_ends(
    curriculum: Callable[[int, int, int, int], int],
    total: int,
    s0: int,
    more: int,
    steps: list[int],
) -> None:
    s1 = s0 + more
    values = [curriculum(k, total, s0, s1) for k in sorted(steps)]
    assert values == sorted(values)
    assert all(2 <= n <= s1 + 1 for n in values)
    assert curriculum(2 * 10**6, total, s0, s1) == s1 + 1


@given(k=st.integers(0, 10**6), s0=st.integers(2, 20), s1=st.integers(21, 2000))
def test_sqrt_curriculum_is_the_formula(k: int, s0: int, s1: int) -> None:
    total = 10**6
    exact = math.sqrt(k / total * ((s1 + 1) ** 2 - s0**2) + s0**2)
    if abs(exact - round(exact)) > 1e-6:  # elsewhere the formula's rounding decides
        assert sqrt_curriculum(k, total, s0, s1) == math.ceil(exact - 1) + 1


@given(n=st.integers(1, 2000), s0=st.integers(1, 20), mu0=st.floats(0, 1))
def test_target_decay_stays_a_decay_and_rises_with_the_grid(n: int, s0: int, mu0: float) -> None:
    for exponent in ("paper", "released-code"):
        decay = target_ema_decay(n, s0, mu0, exponent=exponent)
        assert 0 <= decay <= 1
        assert decay <= target_ema_decay(n + 1, s0, mu0, exponent=exponent) + 1e-15
    assert target_ema_decay(n, s0, mu0) == pytest.approx(
        target_ema_decay(n + 1, s0, mu0, exponent="released-code"), rel=1e-12
    )


def test_halving_stages() -> None:
    assert halving_stages(8) == (4, 2, 1)
    assert halving_stages(1024, 4) == (512, 256, 128, 64, 32, 16, 8, 4)
    assert halving_stages(40, 5) == (20, 10, 5)


@pytest.mark.parametrize(("start", "end"), [(12, 1), (8, 8), (1, 1), (4, 8), (8, 0), (0, 1)])
def test_stages_that_do_not_halve(start: int, end: int) -> None:
    with pytest.raises(UserError, match=f"{start} steps do not halve to {end}"):
        halving_stages(start, end)


def test_bad_curricula_say_what_is_allowed() -> None:
    with pytest.raises(UserError, match="sqrt_curriculum: step -1 of 10"):
        sqrt_curriculum(-1, 10, 2, 150)
    with pytest.raises(UserError, match="doubling_curriculum: step 1 of 0"):
        doubling_curriculum(1, 0, 10, 1280)
    with pytest.raises(UserError, match="s0 20, s1 10; allowed: 1 <= s0 <= s1"):
        doubling_curriculum(1, 10, 20, 10)
    with pytest.raises(UserError, match=r"mu0 1\.5 at 3 points"):
        target_ema_decay(3, 2, 1.5)


# --- proposals -------------------------------------------------------------------------------


@given(n=st.integers(2, 1281), p_mean=st.floats(-30, 30), p_std=st.floats(0.05, 5), ends=ends)
def test_bin_probabilities_sum_to_one(
    n: int, p_mean: float, p_std: float, ends: tuple[float, float]
) -> None:
    probabilities = lognormal_bin_probabilities(karras_sigmas(n, *ends), p_mean, p_std)
    assert probabilities.shape == (n - 1,)
    assert bool((probabilities >= 0).all())
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("n", [11, 161, 1281])
def test_bin_probabilities_are_the_formula(n: int) -> None:
    grid = karras_sigmas(n)
    z = torch.special.erf((grid.log() + 1.1) / (math.sqrt(2) * 2.0)).diff()
    torch.testing.assert_close(
        lognormal_bin_probabilities(grid, -1.1, 2.0), z / z.sum(), rtol=1e-9, atol=1e-16
    )


def test_chosen_bins_follow_their_probabilities(generator: torch.Generator) -> None:
    probabilities = lognormal_bin_probabilities(karras_sigmas(11), -1.1, 2.0)
    draws = 200_000
    uniform = torch.rand(draws, generator=generator, dtype=torch.float64)
    counts = torch.bincount(choose_bin(probabilities, uniform), minlength=10)
    deviation = (counts - draws * probabilities) / (draws * probabilities).sqrt()
    assert float(deviation.abs().max()) < 4.5


@given(st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=20))
def test_chosen_bins_exist_and_have_mass(uniforms: list[float]) -> None:
    probabilities = torch.tensor([0.0, 0.3, 0.0, 0.7, 0.0], dtype=torch.float64)
    chosen = choose_bin(probabilities, torch.tensor(uniforms, dtype=torch.float64))
    assert set(chosen.tolist()) <= {1, 3}


def test_log_normal_proposals() -> None:
    normal = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64)
    sigma = lognormal_sigmas(normal, -1.0, 1.4)
    torch.testing.assert_close(sigma.log(), -1.0 + 1.4 * normal)
    t = lognormal_times(normal, -1.0, 1.4, 0.5)
    torch.testing.assert_close(torch.tan(t) * 0.5, sigma)


@given(st.floats(0, 1))
def test_power_proposal_matches_the_grid(u: float) -> None:
    sigma = power_sigmas(torch.tensor(u, dtype=torch.float64)).item()
    assert 0.002 * (1 - 1e-12) <= sigma <= 80 * (1 + 1e-12)
    if abs(u - 0.25) < 1e-12:
        assert sigma == pytest.approx(karras_sigmas(5)[1].item())


@given(
    t=st.floats(1e-6, 1e3),
    stage=st.integers(0, 12),
    q=st.sampled_from([2.0, 4.0, 256.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_gap_is_open_and_shrinks_with_the_stage(
    t: float, stage: int, q: float, dtype: torch.dtype
) -> None:
    time = torch.tensor([t], dtype=dtype)
    r = shrinking_gap_time(time, stage, q)
    assert 0 <= r.item() < time.item()  # at q = 256 a few stages exhaust the dtype
    assert shrinking_gap_time(time, stage + 1, q).item() >= r.item()


def test_gap_table() -> None:
    """1 - r/t at small and at large t; while q^(s+1) <= 5 the first is diffusion training."""
    small, large = torch.tensor([1e-9, 1e6], dtype=torch.float64)

    def ratio(t: Tensor, stage: int, q: float) -> float:
        return float(1 - shrinking_gap_time(t, stage, q) / t)

    assert ratio(small, 0, 2) == 1
    assert ratio(large, 0, 2) == pytest.approx(0.5)
    for stage, q in ((7, 2.0), (0, 256.0)):
        assert ratio(small, stage, q) == pytest.approx(5 / 256, rel=1e-6)
        assert ratio(large, stage, q) == pytest.approx(1 / 256, rel=1e-6)
    assert ratio(small, 1, 2) == 1  # 5/4, clamped
    assert ratio(small, 2, 2) == pytest.approx(5 / 8, rel=1e-6)
    assert sigmoid_gap_ratio(torch.tensor(0.0)).item() == 5

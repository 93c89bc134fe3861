"""RK45 against scipy's, sample by sample, and its limit of evaluations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from cmbench.diffusion.frames import append_dims
from cmbench.diffusion.runge_kutta import dormand_prince
from cmbench.errors import UserError


def field(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
    """Unlike stiffness for each sample, and values that act on each other."""
    speed = append_dims(1.0 + 6.0 * rows.double(), x)
    return torch.sin(speed * x + append_dims(3 * t, x)) + 0.3 * x.roll(1, -1)


def batch(count: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn((count, 1, 2, 3), generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("start", "end"), [(1e-3, 1.0), (1.0, 1e-3), (0.5, 4.0)])
@pytest.mark.parametrize("tolerance", [1e-3, 1e-5, 1e-8])
def test_every_sample_takes_the_steps_of_scipy(start: float, end: float, tolerance: float) -> None:
    x = batch()
    solved = dormand_prince(field, x, start, end, rtol=tolerance, atol=tolerance)
    for row in range(len(x)):

        def alone(t: float, y: np.ndarray, row: int = row) -> np.ndarray:
            time = torch.tensor([t], dtype=torch.float64)
            state = torch.from_numpy(y).reshape(1, 1, 2, 3)
            return field(state, time, torch.tensor([row])).flatten().numpy()

        expected = solve_ivp(
            alone, (start, end), x[row].flatten().numpy(), rtol=tolerance, atol=tolerance
        )
        np.testing.assert_allclose(solved.x[row].flatten(), expected.y[:, -1], rtol=1e-11)
        assert int(solved.evaluations[row]) == expected.nfev
    assert len(set(solved.evaluations.tolist())) > 1, "all samples cost the same: nothing is shown"
    assert not solved.cut_short.any()


def test_a_sample_does_not_depend_on_its_neighbours() -> None:
    x = batch()
    together = dormand_prince(field, x, 0.0, 1.0)
    for row in range(len(x)):
        alone = dormand_prince(
            lambda y, t, rows, row=row: field(y, t, rows + row),  # type: ignore[misc]
            x[row : row + 1],
            0.0,
            1.0,
        )
        torch.testing.assert_close(alone.x[0], together.x[row], rtol=1e-13, atol=1e-13)
        assert alone.evaluations[0] == together.evaluations[row]


def test_evaluations_are_those_that_are_asked_for() -> None:
    asked = torch.zeros(5, dtype=torch.int64)

    def counted(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        asked[rows] += 1
        return field(x, t, rows)

    solved = dormand_prince(counted, batch(), 0.0, 1.0)
    assert torch.equal(asked, solved.evaluations)


@pytest.mark.parametrize("most", [8, 13, 14, 40, 61])
def test_no_sample_costs_more_than_its_limit(most: int) -> None:
    free = dormand_prince(field, batch(), 0.0, 1.0)
    limited = dormand_prince(field, batch(), 0.0, 1.0, most_evaluations=most)
    assert int(limited.evaluations.max()) <= most
    enough = free.evaluations <= most
    assert torch.equal(limited.x[enough], free.x[enough])
    assert torch.equal(limited.evaluations[enough], free.evaluations[enough])
    assert torch.equal(limited.cut_short, ~enough)
    # What is cut short has spent all steps that it could.
    assert (limited.evaluations[~enough] > most - 6).all()
    with pytest.raises(UserError, match=r"7 evaluations.*8 or more"):
        dormand_prince(field, batch(), 0.0, 1.0, most_evaluations=7)


def test_order_five() -> None:
    """The global error falls with the tolerance as fast as the evaluations say."""

    def decay(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        return append_dims(torch.cos(t), x) * x

    x = torch.ones(1, 1, dtype=torch.float64)
    errors, costs = [], []
    for tolerance in (1e-6, 1e-8, 1e-10, 1e-12):
        solved = dormand_prince(decay, x, 0.0, 3.0, rtol=tolerance, atol=tolerance)
        errors.append(float((solved.x - np.exp(np.sin(3.0))).abs()))
        costs.append(int(solved.evaluations))
    slope = np.polyfit(np.log(costs), np.log(errors), 1)[0]
    assert slope == pytest.approx(-5, abs=0.8)


def test_ends_where_nothing_is_finite_or_nothing_is_to_do() -> None:
    x = batch(2)
    broken = dormand_prince(
        lambda y, t, rows: torch.where(append_dims(rows, y) == 0, torch.nan, -y), x, 0.0, 1.0
    )
    assert broken.x[0].isnan().all()
    torch.testing.assert_close(broken.x[1], x[1] * np.exp(-1.0), rtol=1e-4, atol=1e-4)
    still = dormand_prince(lambda y, t, rows: torch.zeros_like(y), x, 0.0, 1.0)
    assert torch.equal(still.x, x)
    assert torch.equal(dormand_prince(field, x, 1.0, 1.0).x, x)

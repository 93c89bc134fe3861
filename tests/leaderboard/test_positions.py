"""Positions and probabilities of being best: shown from five shared seeds on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from scipy.stats import ttest_rel
from test_best_groups import board, made
from test_compare_and_joins import rows

from cmbench.leaderboard.best_groups import best_groups
from cmbench.leaderboard.ranking import Position, place, positions
from cmbench.leaderboard.rows import Row

NOISE = [0.0, 0.02, -0.01, 0.01, 0.005]


def placed(found: Sequence[Row]) -> Mapping[str, Position]:
    by_id = positions(best_groups(found))
    return {f"{r.method}:{r.sampler}": by_id[r.id] for r in found if r.id in by_id}


def test_positions_as_text() -> None:
    assert (Position(1, 1, 1.0).text, Position(2, 4, 0.1).text) == ("1", "2–4")


def test_clear_differences_have_one_place_and_unclear_ones_an_interval() -> None:
    values = {
        "alpha": [1 + n for n in NOISE],
        "beta": [1.001 + n * (-1) ** i for i, n in enumerate(NOISE)],
        "gamma": [5 + 1.1 * n for n in NOISE],
    }
    found = placed(board(values))
    assert found["alpha:multistep"].text == found["beta:multistep"].text == "1–2"
    assert found["gamma:multistep"] == Position(3, 3, 0.0)
    assert sum(position.p_best for position in found.values()) == pytest.approx(1)
    turned = placed(board(values, higher=True))
    assert turned["gamma:multistep"] == Position(1, 1, 1.0)


def test_fewer_than_five_shared_seeds_have_no_position() -> None:
    four = {"alpha": [1.0, 1.1, 1.2, 1.3], "beta": [2.0, 2.1, 2.2, 2.3]}
    assert placed(board(four)) == {}
    five = {"alpha": [1 + n for n in NOISE], "beta": [2 + n for n in NOISE], "late": [3.0, 3.1]}
    assert placed(board(five)).keys() == {"alpha:multistep", "beta:multistep"}
    assert placed(board({"alpha": five["alpha"]})) == {}, "alone in its group"


def test_duplicates_share_a_position() -> None:
    records = (
        made("edm", [5 + n for n in NOISE], sampling={"sampler": "heun"})
        + made("edm", [5 + n for n in NOISE], sampling={"sampler": "euler"})
        + made("ect", [1 + n for n in NOISE])
    )
    found = placed(rows(records))
    assert found["edm:heun"] == found["edm:euler"] == Position(2, 2, 0.0)


@pytest.mark.parametrize("n", [5, 10])
def test_the_probability_of_two_rows_is_that_of_the_paired_t_test(n: int) -> None:
    generator = np.random.default_rng(n)
    a, b = generator.normal(0, 1, n), generator.normal(0.4, 1, n)
    first, second = place(np.stack([a, b]))
    known = ttest_rel(a, b, alternative="greater").pvalue
    assert first.p_best == pytest.approx(known, abs=0.02)
    assert first.p_best + second.p_best == pytest.approx(1)


def test_rows_whose_seeds_agree_in_order_are_placed_as_they_stand() -> None:
    found = place(np.array([[1.0] * 5, [3.0] * 5, [2.0] * 5]))
    assert found == [Position(1, 1, 1.0), Position(3, 3, 0.0), Position(2, 2, 0.0)]

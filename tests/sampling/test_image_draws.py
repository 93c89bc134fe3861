"""Per-image randomness: image i is the same whatever batch, order or process makes it."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cmbench.sampling import ImageDraws
from cmbench.sampling.draws import Drawing, DrawsAhead


def drawn(seed: int, indices: range | list[int], name: str = "noise") -> torch.Tensor:
    return ImageDraws(seed, indices).normal(name, torch.empty(len(indices), 1, 2, 2))


@given(
    count=st.integers(1, 20),
    cuts=st.lists(st.integers(0, 20), max_size=4),
    order=st.randoms(use_true_random=False),
)
def test_noise_does_not_depend_on_batches_or_order(
    count: int, cuts: list[int], order: object
) -> None:
    whole = drawn(5, range(count))
    edges = sorted({0, count, *(c for c in cuts if c < count)})
    parts = [drawn(5, range(a, b)) for a, b in pairwise(edges)]
    assert torch.equal(torch.cat(parts), whole)
    shuffled = list(range(count))
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    assert torch.equal(drawn(5, shuffled), whole[shuffled])


def test_seeds_names_and_images_differ() -> None:
    rows = [
        tuple(row.flatten().tolist())
        for seed in (1, 2)
        for name in ("noise", "step-1")
        for row in drawn(seed, range(50), name)
    ]
    assert len(set(rows)) == 200


def test_uniform_numbers() -> None:
    draws = ImageDraws(3, range(4000))
    u = draws.uniform("u", torch.empty(4000))
    assert 0 <= float(u.min()) <= float(u.max()) < 1
    assert abs(float(u.mean()) - 0.5) < 6 * 0.2887 / 63.2


def test_noise_has_the_dtype_asked_for_and_the_same_numbers() -> None:
    draws = ImageDraws(3, range(2))
    single = draws.normal("n", torch.empty(2, 3))
    double = draws.normal("n", torch.empty(2, 3, dtype=torch.float64))
    assert double.dtype == torch.float64
    assert torch.equal(double.float(), single)


def test_a_draw_of_another_batch_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="draw 'n' asks for 3 images, the batch has 2"):
        ImageDraws(3, range(2)).normal("n", torch.empty(3, 1))


def test_noise_never_changes() -> None:
    """Published sample grids depend on it."""
    values = drawn(0, range(1)).flatten().tolist()
    assert values == pytest.approx([-1.4979267, -0.2939094, -0.6845914, -1.1402614], abs=1e-6)


def test_what_was_drawn_ahead_is_not_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, list[int]]] = []
    make = Drawing.make

    def watched(self: Drawing, seed: int, indices: list[int], **options: bool) -> torch.Tensor:
        made.append((self.name, list(indices)))
        return make(self, seed, indices, **options)

    monkeypatch.setattr(Drawing, "make", watched)
    like = torch.empty(2, 1, 2, 2)
    with DrawsAhead(5, pinned=False) as ahead:
        first = ahead.draws([0, 1])
        first.normal("noise", like), first.uniform("coin", like)
        ahead.expect([2, 3], first.asked)
        second = ahead.draws([2, 3])
        found = second.normal("noise", like), second.uniform("coin", like)
        assert made == [(n, i) for i in ([0, 1], [2, 3]) for n in ("noise", "coin")]
        unforeseen = second.normal("step-1", like)
        ahead.expect([4, 5], second.asked)
        other = ahead.draws([6, 7]).normal("noise", like)  # not those that were expected
    plain = ImageDraws(5, [2, 3])
    assert torch.equal(found[0], plain.normal("noise", like))
    assert torch.equal(found[1], plain.uniform("coin", like))
    assert torch.equal(unforeseen, plain.normal("step-1", like))
    assert torch.equal(other, ImageDraws(5, [6, 7]).normal("noise", like))

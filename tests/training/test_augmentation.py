"""EDM's augmentations: what each does, what the labels say, and that nothing leaks."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cmbench.errors import UserError
from cmbench.sweep.context import Context
from cmbench.sweep.planning import plan_run
from cmbench.sweep.training_run import obtain_run
from cmbench.training.augment import (
    LABEL_DIM,
    SYM6,
    DatasetFeed,
    _resample,
    augment,
    flip,
    inverse_matrix,
    warp,
)
from cmbench.training.randomness import StepDraws

X_FLIP, Y_FLIP, SCALE, COS, SIN, ALONG, ACROSS, MOVE_X, MOVE_Y = range(LABEL_DIM)


def noise(n: int = 64, side: int = 16) -> Tensor:
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)


def smooth(side: int = 32, where: Tensor | None = None) -> Tensor:
    """One image of long waves, ``[1, 2, side, side]``, at ``where`` (x, y) or at its own pixels.

    Positions ``[side, side, 2]`` are in pixels from the centre.
    """
    pixels = torch.arange(side) - (side - 1) / 2
    if where is None:
        where = torch.stack([pixels.expand(side, -1), pixels[:, None].expand(-1, side)], 2)
    x, y = (where * 2 / (side - 1)).unbind(2)
    wave, mirrored = (torch.sin(s * 2.0 * y) + torch.cos(1.5 * x) for s in (1, -1))
    return torch.stack([wave, mirrored * x])[None] / 2


def zeros() -> Tensor:
    return torch.zeros(1)


def centre(images: Tensor, margin: int = 10) -> Tensor:
    return images[..., margin:-margin, margin:-margin]


def test_the_filter_is_sym6() -> None:
    """An orthogonal wavelet filter with six vanishing moments; there is no other of this shape."""
    h = torch.tensor(SYM6, dtype=torch.float64)
    assert float(h.sum()) == pytest.approx(math.sqrt(2), abs=1e-10)
    for shift in range(6):
        product = float((h[2 * shift :] * h[: len(h) - 2 * shift]).sum())
        assert product == pytest.approx(1.0 if shift == 0 else 0.0, abs=1e-10)
    sign = torch.tensor([(-1.0) ** i for i in range(12)], dtype=torch.float64)
    at = torch.arange(12, dtype=torch.float64)
    for moment in range(6):
        assert float((sign * at**moment * h).sum()) == pytest.approx(0.0, abs=1e-6 * 11**moment)


def test_doubling_and_halving_is_exact() -> None:
    x = noise(4).double()
    assert torch.equal(_resample(x, up=True).isfinite(), torch.ones(4, 3, 42, 42, dtype=torch.bool))
    torch.testing.assert_close(_resample(_resample(x, up=True), up=False), x, rtol=0, atol=1e-9)


def test_probability_zero_is_the_identity() -> None:
    x = noise()
    images, labels = augment(x, StepDraws(1, 0), 0.0)
    assert images is x
    assert labels.shape == (64, LABEL_DIM)
    assert not labels.any()


def test_a_tiny_probability_mirrors_exactly_and_says_so() -> None:
    x = noise()
    images, labels = augment(x, StepDraws(1, 0), 1e-9)
    mirrored = labels[:, X_FLIP].bool()
    assert 16 < int(mirrored.sum()) < 48
    assert torch.equal(images, torch.where(mirrored[:, None, None, None], x.flip(3), x))
    assert not labels[:, 1:].any()


@settings(max_examples=15)
@given(seed=st.integers(0, 2**31), probability=st.sampled_from([0.12, 0.5, 0.99]))
def test_labels_are_zero_exactly_where_nothing_was_done(seed: int, probability: float) -> None:
    x = noise(32)
    draws = StepDraws(seed, 0)
    images, labels = augment(x, draws, probability)
    done = draws.uniform("augment-whether", x.new_empty(32, 5)) < probability
    pairs = [(SCALE,), (COS, SIN), (ALONG, ACROSS), (MOVE_X, MOVE_Y)]
    for gate, columns in enumerate(pairs, start=1):
        assert torch.equal(labels[:, columns].abs().sum(1) > 0, done[:, gate])
    assert not (labels[:, Y_FLIP].bool() & ~done[:, 0]).any()
    turned = draws.uniform("augment-uniform", x.new_empty(32, 5))[:, 4] < 0.5
    assert torch.equal(labels[:, ACROSS] != 0, done[:, 3] & turned)
    exact = ~done[:, 1:].any(1)
    expected = flip(flip(x, labels[:, X_FLIP], 3), labels[:, Y_FLIP], 2)
    assert torch.equal(images[exact], expected[exact])
    assert bool((images[~exact] - expected[~exact]).flatten(1).abs().amax(1).gt(1e-3).all())
    assert images.isfinite().all()


def test_frequencies_and_spreads_are_those_of_the_table() -> None:
    x = torch.zeros(20_000, 1, 2, 2)
    _, labels = augment(x, StepDraws(3, 0), 0.2)
    done = (labels != 0).float().mean(0)
    assert float(done[X_FLIP]) == pytest.approx(0.5, abs=0.015)
    assert float(done[Y_FLIP]) == pytest.approx(0.1, abs=0.01)
    assert float(done[ACROSS]) == pytest.approx(0.1, abs=0.01), "half of the axes are x itself"
    for column in (SCALE, COS, SIN, ALONG, MOVE_X, MOVE_Y):
        assert float(done[column]) == pytest.approx(0.2, abs=0.012)
    for column in (SCALE, MOVE_X, MOVE_Y):
        assert float(labels[labels[:, column] != 0, column].std()) == pytest.approx(1.0, abs=0.05)
    both = labels[(labels[:, SCALE] != 0) & (labels[:, ALONG] != 0)]
    stretch = both[:, [ALONG, ACROSS]].norm(dim=1) * both[:, ALONG].sign()
    together = torch.corrcoef(torch.stack([both[:, SCALE], stretch]))[0, 1]
    assert abs(float(together)) < 0.15, "drawn apart"
    turned = labels[labels[:, SIN] != 0]
    torch.testing.assert_close(
        (turned[:, COS] + 1) ** 2 + turned[:, SIN] ** 2, torch.ones(len(turned)), rtol=0, atol=1e-5
    )


def test_draws_are_named_by_seed_and_position() -> None:
    x = noise()
    first, again, other = (augment(x, StepDraws(1, k), 0.5)[0] for k in (0, 0, 64))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_warp_by_nothing_changes_nothing() -> None:
    x = noise(4)
    eye = inverse_matrix(*(torch.zeros(4) for _ in range(4)))
    torch.testing.assert_close(warp(x, eye, torch.zeros(4, 2)), x, rtol=0, atol=2e-5)


@pytest.mark.parametrize("log2", [-0.4, 0.3])
def test_isotropic_scale_inverts(log2: float) -> None:
    x = smooth()
    there = warp(
        x, inverse_matrix(torch.tensor([log2]), zeros(), zeros(), zeros()), torch.zeros(1, 2)
    )
    back = warp(
        there, inverse_matrix(torch.tensor([-log2]), zeros(), zeros(), zeros()), torch.zeros(1, 2)
    )
    assert float((centre(there) - centre(x)).abs().max()) > 0.02
    torch.testing.assert_close(centre(back), centre(x), rtol=0, atol=3e-3)


@pytest.mark.parametrize("log2", [-0.2, 0.5])
@pytest.mark.parametrize("angle", [0.0, 0.7, math.pi / 2, math.pi])
@pytest.mark.parametrize(("stretch", "axis"), [(0.0, 0.0), (0.3, 0.0), (-0.2, 1.0)])
def test_warps_have_the_official_fixed_point(
    log2: float, angle: float, stretch: float, axis: float
) -> None:
    """What is at p comes from G (p + d) - d, d being the filter's centre of mass less 5 taps.

    The official code takes a pixel's five-tap neighbour for the middle of its trace on the fine
    grid; the trace's centre of mass lies 0.098 fine samples, 0.049 pixels, beyond.
    """
    h = torch.tensor(SYM6, dtype=torch.float64)
    d = (float((torch.arange(12) * h).sum() / h.sum()) - 5) / 2
    assert d == pytest.approx(0.0491, abs=1e-4)
    values = (torch.tensor([v]) for v in (log2, angle, stretch, axis))
    inverse = inverse_matrix(*values)
    pixels = torch.arange(32) - 15.5
    p = torch.stack([pixels.expand(32, -1), pixels[:, None].expand(-1, 32)], 2)
    expected = smooth(32, (p + d) @ inverse[0].T - d)
    found = warp(smooth(), inverse, torch.zeros(1, 2))
    torch.testing.assert_close(centre(found), centre(expected), rtol=0, atol=4e-4)


@given(
    angle=st.floats(-3.1, 3.1),
    stretch=st.floats(-0.5, 0.5),
    axis=st.floats(-3.1, 3.1),
    scale=st.floats(-0.5, 0.5),
)
def test_matrices(angle: float, stretch: float, axis: float, scale: float) -> None:
    a, s, x, k = (torch.tensor([v], dtype=torch.float64) for v in (angle, stretch, axis, scale))
    whole = inverse_matrix(k, a, s, x)[0]
    assert float(torch.linalg.det(whole)) == pytest.approx(4.0**-scale, rel=1e-6)
    stretched = inverse_matrix(0 * k, 0 * a, s, x)[0]
    along = torch.tensor([math.cos(axis), -math.sin(axis)], dtype=torch.float64)
    torch.testing.assert_close(stretched @ along, along * 2.0**-stretch, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("shift", [(3.0, 0.0), (0.0, -2.0)])
def test_whole_pixels_move_exactly(shift: tuple[float, float]) -> None:
    x = noise(1)
    eye = inverse_matrix(zeros(), zeros(), zeros(), zeros())
    moved = warp(x, eye, torch.tensor([shift]))
    expected = torch.roll(x, (int(shift[1]), int(shift[0])), (2, 3))
    torch.testing.assert_close(centre(moved, 7), centre(expected, 7), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("turns", "image", "tolerance"), [(1, smooth(), 3e-4), (2, noise(1), 1e-4)], ids=["1", "2"]
)
def test_outside_is_reflected_about_the_last_pixel(
    turns: int, image: Tensor, tolerance: float
) -> None:
    """As the official code pads: the border's pixel is not repeated."""
    eye = inverse_matrix(zeros(), zeros(), zeros(), zeros())
    last = image.shape[3] - 1
    moved = warp(image, eye, torch.tensor([[float(turns * last), 0.0]]))
    expected = image.flip(3) if turns == 1 else image  # twice is once around the mirrors
    torch.testing.assert_close(centre(moved, 6), centre(expected, 6), rtol=0, atol=tolerance)


def test_one_pixel_survives() -> None:
    x = noise(2, 1)
    assert augment(x, StepDraws(1, 0), 0.9)[0].isfinite().all()


# ---- through the feed ----------------------------------------------------------------------------


def test_the_feed_augments_and_a_run_trains(context: Context) -> None:
    options = (
        "augment=0.3",
        "network.augment_dim=9",
        "duration_kimg=0.032",
        "batch_size=16",
        "network.channels=8",
    )
    plan = plan_run(context, "edm", "digits", "smoke", 0, options)
    dataset = context.dataset("digits")
    batch = DatasetFeed(dataset, plan.config).batch(16, 16, 5)
    plain = dataset.batch(16, 16, 5).images
    assert batch.augment_labels is not None
    assert batch.augment_labels.shape == (16, LABEL_DIM)
    assert not torch.equal(batch.images, plain)
    trained = obtain_run(context, plan)
    weights = trained.weights().tensors
    (name,) = [n for n in weights if n.startswith("raw/") and "embedding.augment.weight" in n]
    assert weights[name].shape[1] == LABEL_DIM


def test_without_the_networks_knowledge_it_would_leak(context: Context) -> None:
    with pytest.raises(
        UserError,
        match=r"augment 0\.3 with a network that does not receive its labels .*"
        r"set network\.augment_dim=9, or augment=0",
    ):
        plan_run(context, "edm", "digits", "smoke", 0, ("augment=0.3",))


@pytest.mark.cuda
def test_on_cuda_without_waiting_and_equal_to_the_cpu() -> None:
    class Given:
        """The CPU's draws, on the GPU."""

        def __init__(self) -> None:
            self.cpu = StepDraws(1, 0)

        def uniform(self, name: str, like: Tensor) -> Tensor:
            return self.cpu.uniform(name, torch.empty(like.shape)).cuda()

        def normal(self, name: str, like: Tensor) -> Tensor:
            return self.cpu.normal(name, torch.empty(like.shape)).cuda()

    x = noise()
    augment(x.cuda(), StepDraws(2, 0), 0.5)
    on_gpu, labels = augment(x.cuda(), Given(), 0.5)
    on_cpu, expected = augment(x, StepDraws(1, 0), 0.5)
    torch.testing.assert_close(labels.cpu(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=0, atol=1e-3)
    images = x.cuda()
    run: Callable[[], object] = lambda: augment(images, StepDraws(3, 0), 0.5)  # noqa: E731
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")

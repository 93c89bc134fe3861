"""Streams of samples: counted, checked, and the same in any batches."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy import Toy, ToyConfig

from cmbench.errors import NonFiniteError, PluginError
from cmbench.networks.config import MLPConfig
from cmbench.networks.counted import CountedNetwork
from cmbench.networks.mlp import MLP
from cmbench.plugin.method import DataInfo, SamplingPlan
from cmbench.sampling import Sampler
from cmbench.sampling.draws import Drawing


class Kit:
    teacher = None

    def __init__(self, classes: int) -> None:
        self.classes = classes

    def network(self, **_: Any) -> nn.Module:
        torch.manual_seed(0)
        network = MLP(MLPConfig(width=8, blocks=1, embedding_dim=8), (1, 2, 2), self.classes)
        nn.init.normal_(network.layer_out.weight)
        return network


def sampler(
    trouble: str = "", nfe: int = 1, classes: int = 0, **options: Any
) -> tuple[Sampler, list[tuple[int, int]]]:
    config = ToyConfig(network={"name": "mlp"}, duration_kimg=0, trouble=trouble)
    method = Toy(config, DataInfo("toys", (1, 2, 2), classes, 0.5))
    asked: list[tuple[int, int]] = []

    def labels(start: int, count: int) -> Tensor:
        asked.append((start, count))
        return torch.arange(start, start + count) % 3

    modules = method.build(Kit(classes))
    plan = SamplingPlan(nfe, "toy", (2.0,) * nfe)
    return Sampler(method, modules, plan, seed=7, labels=labels, **options), asked


@pytest.mark.parametrize("nfe", [1, 2])
@pytest.mark.parametrize("classes", [0, 3])
def test_images_do_not_depend_on_the_batch_size(nfe: int, classes: int) -> None:
    whole = next(sampler(nfe=nfe, classes=classes)[0].stream(10, 10))
    for size in (1, 3, 4, 64):
        stream, asked = sampler(nfe=nfe, classes=classes)
        batches = list(stream.stream(10, size))
        assert [b.first for b in batches] == list(range(0, 10, size))
        assert bool(asked) == bool(classes)
        # the same noise and labels exactly; images up to the rounding of other matrix shapes
        assert torch.equal(torch.cat([b.noise for b in batches]), whole.noise)
        images = torch.cat([b.images for b in batches])
        torch.testing.assert_close(images, whole.images, rtol=1e-5, atol=1e-6)


def test_a_stream_can_start_anywhere() -> None:
    whole = next(sampler()[0].stream(10, 10))
    part = list(sampler()[0].stream(3, 2, first=4))
    assert [b.first for b in part] == [4, 6]
    assert torch.equal(torch.cat([b.noise for b in part]), whole.noise[4:7])


class Shapes(nn.Module):
    """Keeps the batch sizes that a network sees."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.seen = network, []

    def forward(self, x: Tensor, *arguments: Any) -> Tensor:
        self.seen.append(len(x))
        return self.network(x, *arguments)


@pytest.mark.parametrize("classes", [0, 3])
def test_fixed_batches_have_one_size_and_change_no_image(classes: int) -> None:
    plain, _ = sampler(nfe=2, classes=classes)
    expected = list(plain.stream(10, 4, first=3))
    fixed, asked = sampler(nfe=2, classes=classes)
    fixed.fixed_batch = True
    net = fixed.nets["model"]
    shapes = Shapes(net.module)
    net._forward = shapes
    found = list(fixed.stream(10, 4, first=3))
    assert set(shapes.seen) == {4}
    assert [(b.first, len(b.images)) for b in found] == [(3, 4), (7, 4), (11, 2)]
    assert not classes or asked == [(3, 4), (7, 4), (11, 2)], "labels of no image but those"
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.noise, theirs.noise)
        if classes:
            assert torch.equal(ours.labels, theirs.labels)
        torch.testing.assert_close(ours.images, theirs.images, rtol=1e-5, atol=1e-6)
    assert torch.equal(found[0].images, expected[0].images)
    assert (fixed.images, fixed.nfe_measured) == (10, 2)
    fixed.check_nfe()


def test_only_compiled_networks_get_fixed_batches_and_none_beyond_the_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On the CPU the shape of a matrix product decides its last bits: records keep theirs."""
    assert not sampler()[0].fixed_batch
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    compiled, _ = sampler(compiled=True)
    assert compiled.fixed_batch
    shapes = Shapes(compiled.nets["model"].module)
    compiled.nets["model"]._forward = shapes
    (batch,) = compiled.stream(3, 500)
    assert (len(batch.images), shapes.seen) == (3, [3])


def test_what_becomes_of_copies_does_not_matter() -> None:
    stream, _ = sampler("nan-images")  # the batch's last row
    stream.fixed_batch = True
    assert bool(torch.isfinite(stream.make(4, 2, 4).images).all())
    with pytest.raises(NonFiniteError, match=r"1 of 4 images .*\(first: image 7\)"):
        stream.make(4, 4, 4)


@pytest.mark.parametrize("nfe", [1, 2])
def test_drawing_ahead_changes_nothing(nfe: int) -> None:
    plain, _ = sampler(nfe=nfe, classes=3)
    expected = list(plain.stream(10, 4))
    ahead, _ = sampler(nfe=nfe, classes=3)
    ahead.draws_ahead = True
    for ours, theirs in zip(ahead.stream(10, 4), expected, strict=True):
        assert torch.equal(ours.noise, theirs.noise)
        assert torch.equal(ours.images, theirs.images)


def test_the_thread_of_draws_ends_with_its_stream() -> None:
    stream, _ = sampler()
    stream.draws_ahead = True
    before = threading.active_count()
    batches = stream.stream(10, 2)
    next(batches)
    assert threading.active_count() == before + 1
    batches.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


@pytest.mark.parametrize(("precision", "bits"), [("bf16", 8), ("fp16", 11)])
def test_lower_precision_rounds_the_network_and_not_the_noise(precision: str, bits: int) -> None:
    whole = next(sampler()[0].stream(8, 8))
    batch = next(sampler(precision=precision)[0].stream(8, 8))
    assert torch.equal(batch.noise, whole.noise)
    assert batch.images.dtype == torch.float32
    error = float((batch.images - whole.images).norm() / whole.images.norm())
    assert 2.0 ** -(bits + 6) < error < 2.0 ** -(bits - 3)


@pytest.mark.cuda
def test_draws_ahead_on_cuda_are_pinned_and_the_same() -> None:
    drawing = Drawing("noise", "normal", (1, 2, 2))
    pinned = drawing.make(7, range(4), pinned=True)
    assert pinned.is_pinned()
    assert torch.equal(pinned, drawing.make(7, range(4)))


@pytest.mark.parametrize("nfe", [1, 2])
def test_evaluations_are_counted_per_image(nfe: int) -> None:
    stream, _ = sampler(nfe=nfe)
    list(stream.stream(10, 4))
    assert (stream.images, stream.nfe_measured) == (10, nfe)
    stream.check_nfe()


@pytest.mark.parametrize("trouble", ["extra-call", "around-the-wrapper"])
def test_a_lie_about_nfe_is_found(trouble: str) -> None:
    """Around the wrapper too: the network is the method's own, kept from its build."""
    stream, _ = sampler(trouble)
    list(stream.stream(10, 4))
    with pytest.raises(PluginError) as raised:
        stream.check_nfe()
    assert str(raised.value) == (
        "method Toy: declares NFE 1 but 2 network evaluations per image were counted; "
        "correct the method's plan_sampling or sample hook"
    )


@pytest.mark.parametrize(
    ("trouble", "error", "line"),
    [
        (
            "nan-images",
            NonFiniteError,
            r"1 of 4 images have NaN or infinite values \(first: image 3\)",
        ),
        (
            "wrong-shape",
            PluginError,
            r"returned shape \(4, 1, 2, 1\) for noise of shape \(4, 1, 2, 2\)",
        ),
        ("list-images", PluginError, "returned list; allowed: a tensor shaped as the noise"),
    ],
)
def test_what_is_no_batch_of_images_is_refused(
    trouble: str, error: type[Exception], line: str
) -> None:
    stream, _ = sampler(trouble)
    with pytest.raises(error, match=line):
        list(stream.stream(10, 4))


def test_sampling_builds_no_graph_and_drops_nothing_out() -> None:
    stream, _ = sampler()
    batch = next(stream.stream(4, 4))
    assert not batch.images.requires_grad
    assert not any(n.module.training for n in stream.nets.values())


# ---- what counts as an evaluation ---------------------------------------------------------------


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, t: Tensor) -> Tensor:
        return self.weight * t


def test_passes_over_images_count_and_heads_over_times_do_not() -> None:
    net = CountedNetwork(Head())
    net(torch.zeros(5))
    assert (net.evaluations, net.forward_equivalents) == (0, 0)
    net(torch.zeros(5, 1, 2, 2))
    assert (net.evaluations, net.forward_equivalents) == (5, 15)
    with torch.no_grad():
        net(torch.zeros(5, 1, 2, 2))
    assert (net.evaluations, net.forward_equivalents) == (10, 20)


def test_a_tangent_costs_one_more_forward() -> None:
    net = CountedNetwork(Kit(0).network())
    x, c = torch.zeros(3, 1, 2, 2), torch.zeros(3)
    net.forward_with_tangent(x, c, x, c)
    assert (net.evaluations, net.forward_equivalents) == (3, 12)


def test_autocast_is_inside_and_the_result_keeps_the_dtype() -> None:
    class Spy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.seen = super().forward(x)
            return self.seen

    spy = Spy(2, 2)
    assert CountedNetwork(spy, "bf16")(torch.zeros(1, 2)).dtype == torch.float32
    assert spy.seen.dtype == torch.bfloat16

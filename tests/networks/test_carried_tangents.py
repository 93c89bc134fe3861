"""Conformance of every network: derivative, primal, gradients, checkpointing, precision."""

from __future__ import annotations

import pytest
import torch
from network_cases import CASES, FEW, Case, build, central_difference, inputs_for, relative
from torch import Tensor, nn

from cmbench.networks.base import Network

every = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
few = pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)


def gradients(module: nn.Module, output: Tensor) -> list[Tensor]:
    output.square().sum().backward()
    found = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    module.zero_grad()
    return found


@every
def test_derivative_agrees_with_float64_central_differences(case: Case) -> None:
    network = build(case).eval()
    inputs = inputs_for(network)
    expected = central_difference(network, inputs)
    x, c, dx, dc, labels, augment = inputs
    _, dy = network.forward_with_tangent(x, c, dx, dc, labels, augment)
    assert dy.dtype == torch.float32
    assert relative(dy, expected) < 1e-4


@every
def test_derivative_agrees_with_forward_mode_ad_to_rounding(case: Case) -> None:
    network = build(case).eval().double()
    network.set_explicit_attention(True)
    x, c, dx, dc, labels, augment = inputs_for(network).double()
    with torch.no_grad():
        y, expected = torch.func.jvp(lambda u, v: network(u, v, labels, augment), (x, c), (dx, dc))
    joint, dy = network.forward_with_tangent(x, c, dx, dc, labels, augment)
    assert relative(joint, y) < 1e-13
    assert relative(dy, expected) < 1e-12


@every
def test_primal_and_gradients_are_those_of_a_plain_forward(case: Case) -> None:
    network = build(case).train()
    x, c, dx, dc, labels, augment = inputs_for(network, 3)
    torch.manual_seed(5)
    plain = network(x, c, labels, augment)
    after_plain = torch.rand(())
    expected = gradients(network, plain)
    torch.manual_seed(5)
    joint, dy = network.forward_with_tangent(x, c, dx, dc, labels, augment)
    assert torch.rand(()) == after_plain, "the joint pass must draw what a plain one draws"
    assert torch.equal(joint, plain)
    assert not dy.requires_grad
    assert dy.abs().max() > 0
    for ours, theirs in zip(gradients(network, joint), expected, strict=True):
        assert torch.equal(ours, theirs)


@few
def test_tangent_of_a_training_pass_uses_the_same_dropout_mask(case: Case) -> None:
    network = build(case).train().double()
    x, c, dx, dc, labels, augment = inputs_for(network).double()
    sides = []
    for step in (1e-5, -1e-5):
        torch.manual_seed(3)
        with torch.no_grad():
            sides.append(network(x + step * dx, c + step * dc, labels, augment))
    torch.manual_seed(3)
    _, dy = network.forward_with_tangent(x, c, dx, dc, labels, augment)
    assert relative(dy, (sides[0] - sides[1]) / 2e-5) < 1e-7


@every
def test_derivative_is_linear_in_the_tangent_and_local_to_the_image(case: Case) -> None:
    network = build(case).eval().double()
    x, c, dx, dc, labels, augment = inputs_for(network, 2).double()
    dx2 = dx.clone()
    dx2[1] = 0.0
    dc2 = dc.clone()
    dc2[1] = 0.0
    _, dy = network.forward_with_tangent(x, c, dx, dc, labels, augment)
    _, doubled = network.forward_with_tangent(x, c, 2 * dx, 2 * dc, labels, augment)
    _, masked = network.forward_with_tangent(x, c, dx2, dc2, labels, augment)
    assert relative(doubled, 2 * dy) < 1e-12
    assert torch.allclose(masked[0], dy[0], rtol=1e-10, atol=1e-12)
    assert masked[1].abs().max() == 0.0


@every
def test_one_image_equals_the_same_image_in_a_batch(case: Case) -> None:
    network = build(case).eval()
    x, c, dx, dc, labels, augment = inputs_for(network, 3)
    y, dy = network.forward_with_tangent(x, c, dx, dc, labels, augment)
    one = [None if t is None else t[:1] for t in (labels, augment)]
    y1, dy1 = network.forward_with_tangent(x[:1], c[:1], dx[:1], dc[:1], *one)
    assert y1.shape == (*c[:1].shape, *case.data_shape)
    assert relative(y1, y[:1]) < 1e-5
    assert relative(dy1, dy[:1]) < 1e-5


@every
def test_gradient_checkpointing_changes_nothing(case: Case) -> None:
    network = build(case).train()
    x, c, dx, dc, labels, augment = inputs_for(network)

    def run(checkpointing: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
        network.gradient_checkpointing = checkpointing
        torch.manual_seed(7)
        y, dy = network.forward_with_tangent(x, c, dx, dc, labels, augment)
        return y, dy, gradients(network, y)

    y, dy, grads = run(False)
    y2, dy2, grads2 = run(True)
    assert torch.equal(y, y2)
    assert torch.equal(dy, dy2)
    assert all(torch.equal(a, b) for a, b in zip(grads, grads2, strict=True))


def count_convolutions(network: Network, *, joint: bool) -> tuple[int, int]:
    """Return the convolution calls of the forward and of the backward's recomputation."""
    x, c, dx, dc, labels, augment = inputs_for(network)
    activities = [torch.profiler.ProfilerActivity.CPU]

    def convolutions(profile: torch.profiler.profile) -> int:
        return sum(e.count for e in profile.key_averages() if e.key == "aten::convolution")

    with torch.profiler.profile(activities=activities) as forward:
        tangents = (dx, dc) if joint else None
        y = network(x, c, labels, augment, tangents=tangents)
    with torch.profiler.profile(activities=activities) as backward:
        (y[0] if joint else y).sum().backward()
    return convolutions(forward), convolutions(backward)


def test_joint_pass_costs_two_applications_per_convolution_and_recomputes_one() -> None:
    network = build(CASES[0]).train()
    network.gradient_checkpointing = True
    plain_forward, plain_again = count_convolutions(network, joint=False)
    joint_forward, joint_again = count_convolutions(network, joint=True)
    assert plain_forward > 5
    assert joint_forward == 2 * plain_forward
    assert joint_again == plain_again > 0


def kept_bytes(network: Network, *, joint: bool) -> int:
    x, c, dx, dc, labels, augment = inputs_for(network, 4)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        network(x, c, labels, augment, tangents=(dx, dc) if joint else None)
    return sum(kept.values())


@few
def test_joint_pass_keeps_no_more_for_the_backward_pass(case: Case) -> None:
    network = build(case).train()
    plain, joint = kept_bytes(network, joint=False), kept_bytes(network, joint=True)
    # A few embedding intermediates differ (cosine and sine are kept apart).
    assert joint <= 1.02 * plain


@every
def test_explicit_and_fused_attention_agree(case: Case) -> None:
    network = build(case).eval()
    x, c, dx, dc, labels, augment = inputs_for(network)
    y, dy = network.forward_with_tangent(x, c, dx, dc, labels, augment)
    network.set_explicit_attention(True)
    y2, dy2 = network.forward_with_tangent(x, c, dx, dc, labels, augment)
    assert relative(y2, y) < 1e-5
    assert relative(dy2, dy) < 1e-5


half = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 0.08), (torch.float16, 0.01)], ids=["bf16", "fp16"]
)


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


@half
@every
def test_autocast(case: Case, dtype: torch.dtype, tolerance: float) -> None:
    """bfloat16 keeps 8 bits (4e-3 per operation), float16 11 bits (5e-4)."""
    network = build(case).eval()
    inputs = inputs_for(network)
    x, c, dx, dc, labels, augment = inputs
    exact = network(*inputs.point())
    exact_gradients = flat(gradients(network, exact))
    expected = central_difference(network, inputs)
    with torch.autocast("cpu", dtype=dtype):
        plain = network(*inputs.point())
        y, dy = network.forward_with_tangent(x, c, dx, dc, labels, augment)
        y32, dy32 = network.forward_with_tangent(
            x, c, dx, dc, labels, augment, tangent_dtype=torch.float32
        )
    assert plain.dtype == y.dtype == dy.dtype == torch.float32
    assert torch.equal(y, plain)
    assert torch.equal(y32, plain)
    assert 1e-5 < relative(y, exact) < tolerance
    assert relative(dy, expected) < tolerance
    assert relative(dy32, expected) < tolerance
    for output in (plain, y):
        found = flat(gradients(network, output))
        assert found.dtype == torch.float32, "weights and their gradients stay float32"
        assert relative(found, exact_gradients) < tolerance


@half
@every
def test_weights_in_half_precision(case: Case, dtype: torch.dtype, tolerance: float) -> None:
    """A network that is cast as a whole (for sampling) computes in that precision throughout."""
    network = build(case).eval()
    inputs = inputs_for(network)
    exact = network(*inputs.point())
    expected = central_difference(network, inputs)
    network.to(dtype)
    x, c, dx, dc, labels, augment = (
        t.to(dtype) if t is not None and t.is_floating_point() else t for t in inputs
    )
    y, dy = network.forward_with_tangent(x, c, dx, dc, labels, augment)
    assert y.dtype == dy.dtype == dtype
    assert torch.equal(y, network(x, c, labels, augment))
    assert relative(y, exact) < tolerance
    assert relative(dy, expected) < tolerance


@few
def test_backward_under_autocast_reaches_every_weight(case: Case) -> None:
    """Autocast caches weight casts; a cast made for the tangent must not cut the graph."""
    network = build(case).train()
    x, c, dx, dc, labels, augment = inputs_for(network)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = network.forward_with_tangent(
            x, c, dx, dc, labels, augment, tangent_dtype=torch.float32
        )
    y.square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@few
def test_float64_tangent_on_a_float32_primal(case: Case) -> None:
    network = build(case).eval()
    inputs = inputs_for(network)
    x, c, dx, dc, labels, augment = inputs
    y, dy = network.forward_with_tangent(x, c, dx, dc, labels, augment, tangent_dtype=torch.float64)
    assert torch.equal(y, network(*inputs.point()))
    assert relative(dy, central_difference(network, inputs)) < 1e-5

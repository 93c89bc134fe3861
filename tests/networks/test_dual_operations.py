"""Every operation on a dual against PyTorch's forward-mode AD in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from network_cases import relative
from torch import Tensor
from torch.utils import _pytree as pytree

from cmbench.networks import attention, ops
from cmbench.networks.dual import Dual, Value, make_dual, primal_of
from cmbench.networks.layers import Conv2d, GroupNorm, Resample


def randn(*shape: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float64)


X = (2, 8, 4, 4)
UNARY: dict[str, Callable[[Value], Value]] = {
    "silu": ops.silu,
    "cos": ops.cos,
    "cos_sin": ops.cos_sin,
    "scale": lambda x: ops.scale(x, 1.7),
    "add_constant": lambda x: ops.add_constant(x, 0.3),
    "leaky_relu": lambda x: ops.leaky_relu(x, 0.01),
    "clip": lambda x: ops.clip(x, 0.5),
    "group_norm": lambda x: ops.group_norm(x, 2, randn(8, seed=4), randn(8, seed=5)),
    "group_norm_plain": lambda x: ops.group_norm(x, 4),
    "pixel_norm": lambda x: ops.pixel_norm(x, 1e-4),
    "normalize": lambda x: ops.normalize(x, 1, 1e-4),
    "normalize_last": lambda x: ops.normalize(x, -1, 1e-4),
    "linear": lambda x: ops.linear(x, randn(3, 4, seed=6), randn(3, seed=7)),
    "halves": lambda x: ops.cat(list(ops.halves(x))[::-1]),
    "down": Resample("down"),
    "up": Resample("up"),
    "down_fir": Resample("down", (1, 3, 3, 1)).double(),
    "up_fir": Resample("up", (1, 3, 3, 1)).double(),
    "conv_up": Conv2d(8, 4, 3, resample="up").double(),
    "norm_layer": GroupNorm(8).double(),
    "heads": lambda x: attention.merge_heads(
        ops.unbind(attention.split_heads(ops.cat([x, x, x]), 2))[0], x.shape
    ),
}
BINARY: dict[str, Callable[[Value, Value], Value]] = {
    "add": ops.add,
    "mul": ops.mul,
    "cat": lambda a, b: ops.cat([a, b]),
    "residual": lambda a, b: ops.residual(a, b, 0.7),
    "blend": lambda a, b: ops.blend(a, b, 0.7, 0.3),
}


def check(fn: Callable[..., Value], points: list[Tensor], moving: list[bool]) -> None:
    """Compare with torch.func.jvp, the tangents of unmoved arguments being absent."""
    tangents = [randn(*p.shape, seed=20 + i) for i, p in enumerate(points)]
    zeroed = [t if m else torch.zeros_like(t) for t, m in zip(tangents, moving, strict=True)]
    y, expected = torch.func.jvp(lambda *a: primal_of(fn(*a)), tuple(points), tuple(zeroed))
    values = [make_dual(p, t) if m else p for p, t, m in zip(points, tangents, moving, strict=True)]
    got = fn(*values)
    assert isinstance(got, Dual)
    assert torch.equal(got.primal, y)
    assert relative(got.tangent.expand_as(expected), expected) < 1e-12


@pytest.mark.parametrize("name", UNARY)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_unary(name: str, layout: torch.memory_format) -> None:
    check(UNARY[name], [randn(*X).contiguous(memory_format=layout)], [True])


@pytest.mark.parametrize("name", BINARY)
@pytest.mark.parametrize("moving", [(True, True), (True, False), (False, True)])
def test_binary(name: str, moving: tuple[bool, bool]) -> None:
    check(BINARY[name], [randn(*X), randn(*X, seed=1)], list(moving))


@pytest.mark.parametrize(
    "moving", [(True, True, True), (True, False, True), (True, True, False), (True, False, False)]
)
def test_scale_shift(moving: tuple[bool, bool, bool]) -> None:
    points = [randn(*X), randn(2, 8, seed=1), randn(2, 8, seed=2)]
    check(ops.scale_shift, points, list(moving))


@pytest.mark.parametrize(
    ("weights", "chunk"), [(42, (1, 3)), (100, (1, 7)), (5, (1, 1)), (200, (2, 7)), (2**18, (2, 7))]
)
def test_attention_in_chunks_that_fit_the_cache(
    weights: int, chunk: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_CACHED_WEIGHTS", weights)
    points = [randn(2, 2, 7, 4, seed=i) for i in range(3)]
    images, queries = attention._chunk(points[0].shape, 7, torch.device("cpu"))
    assert (min(images, 2), queries) == chunk
    check(lambda q, k, v: attention.attention(q, k, v, explicit=True), points, [True] * 3)


@pytest.mark.parametrize("chunk", [3, 1024])
def test_attention_in_chunks_of_queries(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: whole batches, some of their queries."""
    monkeypatch.setattr(attention, "_chunk", lambda shape, keys, device: (shape[0], chunk))
    points = [randn(2, 2, 7, 4, seed=i) for i in range(3)]
    check(lambda q, k, v: attention.attention(q, k, v, explicit=True), points, [True] * 3)


def test_attention_gradients_of_both_kernels_agree() -> None:
    grads = []
    for explicit in (False, True):
        q, k, v = (randn(1, 2, 9, 4, seed=i).requires_grad_() for i in range(3))
        y = primal_of(attention.attention(q, k, v, explicit=explicit))
        grads.append(torch.autograd.grad(y.square().sum(), (q, k, v)))
    for fused, explicit_ in zip(*grads, strict=True):
        assert relative(fused, explicit_) < 1e-12


def test_plain_values_stay_plain() -> None:
    x = randn(*X)
    for fn in UNARY.values():
        assert isinstance(fn(x), Tensor)
    for pair in BINARY.values():
        assert isinstance(pair(x, x), Tensor)


def test_dropout_shares_its_mask_and_scale() -> None:
    x = make_dual(torch.ones(1000), 2.0 * torch.ones(1000))
    torch.manual_seed(0)
    y = ops.dropout(x, 0.25, True)
    assert isinstance(y, Dual)
    assert torch.allclose(y.tangent, 2.0 * y.primal)
    assert y.primal.unique().tolist() == pytest.approx([0.0, 4.0 / 3.0])
    assert 0.2 < float((y.primal == 0).float().mean()) < 0.3
    assert ops.dropout(x, 0.25, False) is x


def test_normalize_of_zeros_has_a_finite_derivative() -> None:
    x = make_dual(torch.zeros(1, 4), torch.ones(1, 4))
    y = ops.normalize(x, 1, 1e-4)
    assert isinstance(y, Dual)
    assert torch.isfinite(y.tangent).all()


def test_clip_stops_the_tangent_outside_its_range() -> None:
    y = ops.clip(make_dual(torch.tensor([-2.0, 0.5, 2.0]), torch.ones(3)), 1.0)
    assert isinstance(y, Dual)
    assert y.tangent.tolist() == [0.0, 1.0, 0.0]


def test_tangent_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tangent of shape \(2,\) for a tensor of shape \(3,\)"):
        make_dual(torch.zeros(3), torch.zeros(2))


def test_dual_is_a_pytree_so_that_wrappers_find_its_tensors() -> None:
    dual = make_dual(randn(2), randn(2, seed=1), torch.float64)
    leaves, spec = pytree.tree_flatten({"value": dual})
    assert len(leaves) == 2
    again = pytree.tree_unflatten(leaves, spec)["value"]
    assert again.precision is torch.float64
    assert torch.equal(again.tangent, dual.tangent)

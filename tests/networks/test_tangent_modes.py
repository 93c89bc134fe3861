"""The three ways to a directional derivative, on our networks and on foreign ones."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from network_cases import CASES, Case, build, central_difference, inputs_for, relative
from torch import Tensor, nn

from cmbench.errors import UserError
from cmbench.networks.tangent_modes import TANGENT_MODES, TangentMode, default_mode, tangent_of

TINY = next(case for case in CASES if case.name == "unet-tiny-double")


class Foreign(nn.Module):
    """A third party's network: attention, dropout, no forward_with_tangent."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 2, 1)

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        h = self.first(x) * (1.0 + c_noise[:, None, None, None].sin())
        tokens = h.flatten(2).transpose(1, 2)[:, None]
        h = h + F.scaled_dot_product_attention(tokens, tokens, tokens)[:, 0].transpose(
            1, 2
        ).reshape(h.shape)
        out: Tensor = self.last(F.dropout(F.silu(h), 0.3, self.training))
        return out


def foreign_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x, dx = (torch.randn(3, 2, 4, 4, generator=g) for _ in range(2))
    return x, torch.rand(3, generator=g), dx, torch.randn(3, generator=g)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("mode", ["forward-ad", "finite-difference"])
def test_foreign_network(mode: TangentMode, training: bool) -> None:
    network = Foreign().train(training).double()
    x, c, dx, dc = (t.double() for t in foreign_inputs())
    torch.manual_seed(9)
    plain = network(x, c)
    torch.manual_seed(9)
    y, dy = tangent_of(network, x, c, dx, dc, mode=mode, step=1e-5)
    assert torch.equal(y, plain)
    assert y.requires_grad
    assert not dy.requires_grad
    sides = []
    for step in (1e-5, -1e-5):
        torch.manual_seed(9)
        with torch.no_grad():
            sides.append(network(x + step * dx, c + step * dc))
    assert relative(dy, (sides[0] - sides[1]) / 2e-5) < 1e-7


@pytest.mark.filterwarnings("ignore")
def test_all_modes_agree_on_one_network_with_dropout() -> None:
    network = build(TINY).train()
    x, c, dx, dc, labels, augment = inputs_for(network)
    results = {}
    for mode in TANGENT_MODES:
        torch.manual_seed(4)
        results[mode] = tangent_of(network, x, c, dx, dc, labels, augment, mode=mode)
    y, dy = results["carried"]
    for mode, tolerance in (("forward-ad", 1e-4), ("finite-difference", 1e-2)):
        other_y, other_dy = results[cast(TangentMode, mode)]
        assert torch.equal(other_y, y)
        assert relative(other_dy, dy) < tolerance


def test_default_is_the_networks_own() -> None:
    network = build(TINY)
    assert default_mode(network) == "carried"
    assert default_mode(nn.DataParallel(network)) == "carried"
    assert default_mode(Foreign()) == "forward-ad"


def test_tangent_dtype_reaches_the_network() -> None:
    network = build(TINY).eval()
    inputs = inputs_for(network)
    x, c, dx, dc, labels, augment = inputs
    _, dy = tangent_of(network, x, c, dx, dc, labels, augment, tangent_dtype=torch.float64)
    _, single = tangent_of(network, x, c, dx, dc, labels, augment)
    assert relative(dy, central_difference(network, inputs)) < 1e-5
    assert not torch.equal(dy, single)


def test_unknown_mode_and_missing_ability_are_named() -> None:
    x, c, dx, dc = foreign_inputs()
    with pytest.raises(UserError, match="unknown mode 'magic'; allowed: carried, forward-ad"):
        tangent_of(Foreign(), x, c, dx, dc, mode=cast(Any, "magic"))
    with pytest.raises(UserError, match="Foreign has no forward_with_tangent; allowed: forward-ad"):
        tangent_of(Foreign(), x, c, dx, dc, mode="carried")


def test_random_state_after_the_call_is_that_of_one_call() -> None:
    """So that the next draw (the next step's noise) does not depend on the mode."""
    network = build(Case("mlp", "mlp", {"width": 16, "dropout": 0.2}, (2, 1, 1))).train()
    x, c, dx, dc, labels, augment = inputs_for(network)
    after = []
    for mode in TANGENT_MODES:
        torch.manual_seed(2)
        tangent_of(network, x, c, dx, dc, labels, augment, mode=mode)
        after.append(float(torch.rand(())))
    assert len(set(after)) == 1

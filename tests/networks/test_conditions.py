"""Further scalar conditions of every network: at zero no change, each with its own derivative."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from network_cases import CASES, Case, build, inputs_for, label_shape, relative
from torch import Tensor, nn

from cmbench.diffusion.carried import boundary_consistency_tangent
from cmbench.errors import UserError
from cmbench.networks.base import Network, is_addition
from cmbench.networks.catalog import NETWORKS
from cmbench.networks.config import MLPConfig
from cmbench.networks.counted import CountedNetwork
from cmbench.networks.tangent_modes import TANGENT_MODES, tangent_of
from cmbench.plugin.specs import load_object

every = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
NAMES = ("time_end", "guidance")


def conditioned(case: Case, *, stirred: bool = True) -> Network:
    """Return the network with conditions; ``stirred`` moves their layers off zero too."""
    more = Case(case.name, case.network, {**case.options, "conditions": NAMES}, *case[3:])
    if stirred:
        return build(more)
    cls: Any = load_object({entry.name: entry.factory for entry in NETWORKS}[case.network])
    network: Network = cls(cls.Config(**more.options), case.data_shape, case.num_classes)
    return network


def given(network: Network) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    g, shape = torch.Generator().manual_seed(3), label_shape(network, 2)
    time_end, guidance = torch.rand(shape, generator=g), 4 * torch.rand(shape, generator=g)
    moving = {name: torch.randn(shape, generator=g) for name in NAMES}
    return {"time_end": time_end, "guidance": guidance}, moving


@every
def test_a_plain_networks_weights_give_the_same_output_bit_for_bit(case: Case) -> None:
    plain, further = build(case).eval(), conditioned(case, stirred=False).eval()
    missing, unexpected = further.load_state_dict(plain.state_dict(), strict=False)
    assert missing
    assert all(is_addition(key) for key in missing)
    assert not unexpected
    assert all(not is_addition(key) or "temporal." in key for key in plain.state_dict())
    x, c, dx, dc, labels, augment = inputs_for(plain)
    values, moving = given(plain)
    expected = plain(x, c, labels, augment)
    for conditions in (None, {}, values, {"guidance": values["guidance"]}):
        assert torch.equal(further(x, c, labels, augment, conditions=conditions), expected)
    y, dy = plain.forward_with_tangent(x, c, dx, dc, labels, augment)
    other = further.forward_with_tangent(
        x, c, dx, dc, labels, augment, conditions=values, condition_tangents=moving
    )
    assert torch.equal(other[0], y)
    assert torch.equal(other[1], dy)


@every
def test_new_conditions_learn_from_the_first_step(case: Case) -> None:
    further = conditioned(case, stirred=False).train()
    with torch.no_grad():  # outputs of new networks are zero, and so are gradients before them
        for key, parameter in further.named_parameters():
            if not is_addition(key):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator()))
    x, c, _, _, labels, augment = inputs_for(further)
    further(x, c, labels, augment, conditions=given(further)[0]).square().sum().backward()
    for name in NAMES:
        gradients = [
            p.grad
            for k, p in further.named_parameters()
            if f"of_{name}." in k and p.grad is not None
        ]
        assert any(bool((g != 0).any()) for g in gradients), name


@every
def test_each_condition_has_its_own_derivative(case: Case) -> None:
    network = conditioned(case).eval().double()
    network.set_explicit_attention(True)
    x, c, dx, dc, labels, augment = inputs_for(network).double()
    values, moving = ({k: v.double() for k, v in part.items()} for part in given(network))

    def call(*moved: Tensor) -> Tensor:
        conditions = dict(zip(NAMES, moved[2:], strict=True))
        found: Tensor = network(*moved[:2], labels, augment, conditions=conditions)
        return found

    point = (x, c, *values.values())
    for move_time, move_guidance in ((1, 1), (1, 0), (0, 1), (0, 0)):
        tangents = {
            name: moving[name]
            for name, moves in (("time_end", move_time), ("guidance", move_guidance))
            if moves
        }
        direction = (dx, dc, *(tangents.get(n, torch.zeros_like(values[n])) for n in NAMES))
        with torch.no_grad():
            y, expected = torch.func.jvp(call, point, direction)
        joint, dy = network.forward_with_tangent(
            x, c, dx, dc, labels, augment, conditions=values, condition_tangents=tangents
        )
        assert relative(joint, y) < 1e-13
        assert relative(dy, expected) < 1e-12
    still = torch.zeros_like(dx), torch.zeros_like(dc)
    _, along = network.forward_with_tangent(
        x, c, *still, labels, augment, conditions=values, condition_tangents=moving
    )
    assert along.abs().max() > 0, "the derivative along conditions alone"


@every
def test_all_modes_agree_through_the_counted_wrapper(case: Case) -> None:
    network = conditioned(case).eval()
    x, c, dx, dc, labels, augment = inputs_for(network)
    values, moving = given(network)
    counted = CountedNetwork(network)
    options: dict[str, Any] = {"conditions": values, "condition_tangents": moving}
    found = {
        mode: counted.forward_with_tangent(x, c, dx, dc, labels, augment, mode=mode, **options)
        for mode in TANGENT_MODES
    }
    assert counted.evaluations == 3 * len(x)
    for y, dy in found.values():
        assert torch.equal(y, found["carried"][0])
        assert relative(dy, found["carried"][1]) < 2e-2
    assert relative(found["forward-ad"][1], found["carried"][1]) < 1e-4
    assert torch.equal(counted(x, c, labels, augment, conditions=values), found["carried"][0])


@every
def test_output_depends_on_each_image_own_conditions(case: Case) -> None:
    network = conditioned(case).eval()
    x, c, _, _, labels, augment = inputs_for(network)
    values, _ = given(network)
    expected = network(x, c, labels, augment, conditions=values)
    for name in NAMES:
        moved = values[name].clone()
        moved[1] += 0.5
        other = network(x, c, labels, augment, conditions={**values, name: moved})
        torch.testing.assert_close(other[0], expected[0], rtol=1e-5, atol=1e-6)
        assert relative(other[1], expected[1]) > 1e-5


def test_compiled_and_checkpointed_networks_take_them() -> None:
    case = next(c for c in CASES if c.name == "ddpmpp")
    network = conditioned(case).train()
    x, c, dx, dc, labels, augment = inputs_for(network)
    values, moving = given(network)
    found = []
    for checkpointing in (False, True):
        network.gradient_checkpointing = checkpointing
        torch.manual_seed(0)
        y, dy = network.forward_with_tangent(
            x, c, dx, dc, labels, augment, conditions=values, condition_tangents=moving
        )
        y.square().sum().backward()
        found.append((y, dy, [p.grad.clone() for p in network.parameters() if p.grad is not None]))
        network.zero_grad()
    assert torch.equal(found[0][1], found[1][1])
    assert all(torch.equal(a, b) for a, b in zip(found[0][2], found[1][2], strict=True))


def test_the_consistency_derivative_hands_them_on() -> None:
    network = conditioned(next(c for c in CASES if c.name == "mlp")).eval().double()
    x, _, slope, _, _, _ = inputs_for(network).double()
    sigma = torch.tensor([0.5, 3.0], dtype=torch.float64)
    values, moving = ({k: v.double() for k, v in part.items()} for part in given(network))
    options: dict[str, Any] = {"conditions": values, "condition_tangents": moving}
    arguments = (network.forward_with_tangent, x, sigma, slope, 0.5, 0.002)
    moved, plain = (boundary_consistency_tangent(*arguments, **o) for o in (options, {}))
    assert relative(moved[0], plain[0]) > 1e-4
    assert relative(moved[1], plain[1]) > 1e-4


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("conditions", "said"),
    [
        (
            {"time": torch.zeros(2)},
            r"condition 'time' of shape \(2,\); allowed: time_end, guidance;",
        ),
        ({"guidance": torch.zeros(3)}, r"condition 'guidance' of shape \(3,\); allowed: .*\(2,\)"),
        ({"guidance": torch.zeros(2, 1)}, r"condition 'guidance' of shape \(2, 1\)"),
    ],
)
def test_unknown_conditions_and_shapes_are_refused(
    conditions: dict[str, Tensor], said: str
) -> None:
    network = conditioned(CASES[0])
    x, c, dx, dc, labels, augment = inputs_for(network)
    with pytest.raises(UserError, match=f"network: {said}"):
        network(x, c, labels, augment, conditions=conditions)
    with pytest.raises(UserError, match=f"network: {said}"):
        network.forward_with_tangent(x, c, dx, dc, labels, condition_tangents=conditions)


def test_a_network_without_conditions_says_how_to_get_one() -> None:
    network = build(CASES[0])
    x, c, _, _, labels, augment = inputs_for(network)
    with pytest.raises(UserError, match=r"allowed: none; .*kit\.network\(conditions=\('end',\)\)"):
        network(x, c, labels, augment, conditions={"end": torch.zeros(2)})


@pytest.mark.parametrize("names", [("a", "a"), ("A",), ("",), ("a.b",), ("a" * 31,)])
def test_names_of_conditions_are_checked(names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="conditions"):
        MLPConfig(conditions=names)


def test_recipes_without_conditions_keep_their_hash() -> None:
    assert "conditions" not in MLPConfig().model_dump(mode="json")
    assert MLPConfig(conditions=("end",)).model_dump(mode="json")["conditions"] == ["end"]


def test_third_party_networks_take_them_as_they_like() -> None:
    class Own(nn.Module):
        def forward(
            self,
            x: Tensor,
            c_noise: Tensor,
            labels: Any = None,
            augment_labels: Any = None,
            **k: Any,
        ) -> Tensor:
            return x * (c_noise * k.get("conditions", {}).get("end", 1.0))[:, None, None, None]

    x, c = torch.randn(2, 1, 4, 4), torch.rand(2)
    end = torch.tensor([2.0, 3.0])
    options: dict[str, Any] = {"conditions": {"end": end}, "condition_tangents": {"end": end}}
    zero = torch.zeros_like(x), torch.zeros_like(c)
    y, dy = tangent_of(Own(), x, c, *zero, mode="forward-ad", **options)
    torch.testing.assert_close(dy, y)
    assert torch.equal(
        tangent_of(Own(), x, c, *zero, mode="forward-ad")[0], x * c[:, None, None, None]
    )

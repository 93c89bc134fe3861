"""Networks that compute several states of a trajectory at once, and how the states are mixed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from network_cases import CASES, Case, build, inputs_for, relative
from safetensors.torch import load_file
from torch import Tensor

from cmbench.errors import UserError
from cmbench.networks.base import num_parameters
from cmbench.networks.config import DDPMPPConfig, MLPConfig
from cmbench.networks.mlp import MLP
from cmbench.networks.temporal import TemporalMixing

GOLDEN = Path(__file__).parents[1] / "golden" / "distillation" / "dsno.safetensors"
STATES = [case for case in CASES if case.name.endswith("-states")]
several = pytest.mark.parametrize("case", STATES, ids=lambda case: case.name)


def golden_weight(weight: Tensor) -> Tensor:
    """From ``[in, out, modes, re/im]`` to ours."""
    return torch.cat([part.permute(2, 0, 1) for part in weight.unbind(-1)])


def near(ours: Tensor, theirs: Tensor) -> None:
    assert ours.dtype == theirs.dtype == torch.float64
    torch.testing.assert_close(ours.detach(), theirs, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize(
    ("name", "states"), [("spectral", 4), ("spectral.T3", 3), ("spectral.T5", 5)]
)
def test_the_convolution_over_states_is_the_official_one(name: str, states: int) -> None:
    """devzhk/DSNO-pytorch @0ffbfbb, models/layers.py, with complex transforms there."""
    g = load_file(GOLDEN)
    weight = golden_weight(g[f"{name}.weight"]).requires_grad_()
    mixing = TemporalMixing(weight.shape[1], states, 2)
    y = mixing.convolve(g[f"{name}.x"].flatten(0, 1), weight).unflatten(0, (-1, states))
    near(y, g[f"{name}.y"])
    if f"{name}.grad_weight" in g:
        (y * torch.arange(y.numel()).double().cos().view_as(y)).sum().backward()
        assert weight.grad is not None
        near(weight.grad, golden_weight(g[f"{name}.grad_weight"]))


def test_the_block_is_the_official_one() -> None:
    g = load_file(GOLDEN)
    mixing = TemporalMixing(5, 4, 2).double()
    with torch.no_grad():
        mixing.weight.copy_(golden_weight(g["timeconv.weight"]))
    near(mixing(g["spectral.x"].flatten(0, 1)).unflatten(0, (-1, 4)), g["timeconv.y"])


@pytest.mark.parametrize("states", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("modes", [1, 2, 3, 5])
def test_the_convolution_against_complex_transforms(states: int, modes: int) -> None:
    if modes > states // 2 + 1:
        with pytest.raises(UserError, match=f"{modes} temporal modes of {states} states; allowed"):
            TemporalMixing(3, states, modes)
        return
    mixing = TemporalMixing(3, states, modes).double()
    x = torch.randn(2, states, 3, 2, 2, dtype=torch.float64)
    r = torch.complex(*mixing.weight.detach().chunk(2))
    coefficients = torch.fft.rfft(x, dim=1)[:, :modes]
    mixed = torch.einsum("nkchw,kco->nkohw", coefficients, r)
    expected = torch.fft.irfft(mixed, n=states, dim=1)
    near(mixing.convolve(x.flatten(0, 1), mixing.weight).unflatten(0, (-1, states)), expected)


def test_a_new_block_starts_near_the_identity() -> None:
    """Uniform below 1 / (inputs outputs), as the official code starts both parts."""
    weight = TemporalMixing(64, 4, 2).weight
    assert 0 <= float(weight.min()) < float(weight.max()) < 1 / 64**2
    assert float(weight.mean()) == pytest.approx(0.5 / 64**2, rel=0.05)


@several
def test_every_state_depends_on_every_label_and_on_no_other_image(case: Case) -> None:
    network = build(case).eval()
    x, c, _, _, labels, augment = inputs_for(network, 2)
    y = network(x, c, labels, augment)
    assert y.shape == (2, network.config.states, *case.data_shape)
    for state in range(network.config.states):
        moved = c.clone()
        moved[1, state] += 0.3
        other = network(x, moved, labels, augment)
        torch.testing.assert_close(other[0], y[0], rtol=1e-5, atol=1e-6)
        for a, b in zip(other[1], y[1], strict=True):
            assert relative(a, b) > 1e-6


@several
def test_without_mixing_the_states_are_images_of_a_plain_network(case: Case) -> None:
    network = build(case).eval().double()
    plain = build(Case(case.name, case.network, {**case.options, "states": 1}, *case[3:])).double()
    state = {k: v for k, v in network.state_dict().items() if "temporal." not in k}
    plain.eval().load_state_dict(state)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "temporal." in name:
                parameter.zero_()
    x, c, _, _, labels, augment = inputs_for(network, 2).double()
    y = network(x, c, labels, augment)
    for state_number, label in enumerate(c.unbind(1)):
        expected = plain(x, label, labels, augment)
        torch.testing.assert_close(y[:, state_number], expected, rtol=1e-12, atol=1e-13)


def test_a_block_after_every_block() -> None:
    config = DDPMPPConfig(channels=16, channel_mult=(1, 2), blocks=2, states=4)
    network = build(Case("ddpmpp", "ddpmpp", config.model_dump(), (3, 16, 16)))
    mixings = [m for m in network.modules() if isinstance(m, TemporalMixing)]
    assert len(mixings) == len(network.units())
    assert num_parameters(mixings[0]) == 2 * 2 * 16 * 16


@pytest.mark.parametrize(("states", "shape"), [(1, (2, 4)), (4, (2,)), (4, (2, 3)), (4, (1, 4))])
def test_noise_labels_of_another_number_of_states_are_refused(
    states: int, shape: tuple[int, ...]
) -> None:
    network = MLP(MLPConfig(width=8, states=states), (2, 1, 1), 0)
    with pytest.raises(UserError, match=rf"of {states} states; allowed: \(2,.*network\.states"):
        network(torch.zeros(2, 2, 1, 1), torch.zeros(shape))


def test_recipes_of_one_state_keep_their_hash() -> None:
    assert not {"states", "temporal_modes"} & MLPConfig(temporal_modes=3).model_dump().keys()
    assert MLPConfig(states=4).model_dump()["temporal_modes"] == 2

"""Configurations, the catalogue, initial state, conditioning inputs and clear refusals."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from network_cases import CASES, FEW, Case, build, inputs_for, relative
from pydantic import ValidationError

from cmbench.errors import UserError
from cmbench.networks import config as configs
from cmbench.networks.adm_unet import ADM
from cmbench.networks.base import Network, num_parameters
from cmbench.networks.catalog import NETWORKS, SIZES
from cmbench.networks.edm2_unet import EDM2
from cmbench.networks.heads import LogVarianceHead
from cmbench.networks.layers import FourierEmbedding, PositionalEmbedding
from cmbench.networks.magnitude import MPConv, mp_cat, mp_silu, mp_sum
from cmbench.networks.song_unet import DDPMPP
from cmbench.networks.unet_tiny import UNetTiny
from cmbench.plugin.specs import load_object

CONFIGS = [
    obj
    for obj in vars(configs).values()
    if isinstance(obj, type) and issubclass(obj, configs.NetworkConfig)
]


def fresh(case: Case) -> Network:
    torch.manual_seed(0)
    cls: Any = load_object({entry.name: entry.factory for entry in NETWORKS}[case.network])
    network: Network = cls(cls.Config(**case.options), case.data_shape, case.num_classes)
    return network


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.__name__)
def test_every_field_is_described_with_its_unit(config: type[configs.NetworkConfig]) -> None:
    units = ("(", "noise embedding:", "how noise level", "pyramid")
    for name, field in config.model_fields.items():
        assert field.description, name
        assert any(unit in field.description for unit in units), f"{name}: {field.description}"


def test_unknown_and_impossible_settings_are_refused() -> None:
    with pytest.raises(ValidationError, match="widht"):
        configs.MLPConfig(widht=3)  # type: ignore[call-arg]
    with pytest.raises(ValidationError, match="less than 1"):
        configs.MLPConfig(dropout=1.0)
    frozen = configs.MLPConfig()
    with pytest.raises(ValidationError, match="frozen"):
        frozen.width = 3  # type: ignore[misc]


def test_catalogue_and_configs_import_no_torch() -> None:
    code = (
        "import sys, cmbench.networks.catalog, cmbench.networks.config\n"
        "print('torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_catalogue_names_classes_with_a_config_and_sizes_are_valid() -> None:
    classes = {entry.name: load_object(entry.factory) for entry in NETWORKS}
    for cls in classes.values():
        assert issubclass(cls.Config, configs.NetworkConfig)  # type: ignore[attr-defined]
        assert issubclass(cls, Network)  # type: ignore[arg-type]
    for network, options in SIZES.values():
        assert classes[network].Config(**options)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("size", "millions"), [("ncsnpp-cifar10-deep", 97.6), ("adm-imagenet64-deep", 472.8)]
)
def test_deep_variants(size: str, millions: float) -> None:
    network, options = SIZES[size]
    cls: Any = {entry.name: load_object(entry.factory) for entry in NETWORKS}[network]
    shape, classes = ((3, 32, 32), 0) if "cifar" in size else ((3, 64, 64), 1000)
    with torch.device("meta"):
        count = num_parameters(cls(cls.Config(**options), shape, classes))
    assert abs(count / 1e6 - millions) < 0.05


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_fresh_network_answers_almost_zero(case: Case) -> None:
    network = fresh(case).eval()
    inputs = inputs_for(network)
    y = network(*inputs.point())
    assert y.shape == (*inputs.c_noise.shape, *case.data_shape)
    assert float(y.detach().abs().max()) < 1e-3


@pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)
def test_default_rng_decides_the_weights(case: Case) -> None:
    one, two = build(case, seed=3), build(case, seed=3)
    other = build(case, seed=4)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
    assert any(
        not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True)
    )


@pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)
def test_state_dict_alone_restores_a_network(case: Case) -> None:
    network, copy = build(case).eval(), fresh(case).eval()
    copy.load_state_dict(network.state_dict())
    inputs = inputs_for(network)
    assert torch.equal(network(*inputs.point()), copy(*inputs.point()))


LABELLED = [case for case in CASES if case.num_classes]


@pytest.mark.parametrize("case", LABELLED, ids=lambda case: case.name)
def test_labels_matter_and_no_label_equals_a_negative_one(case: Case) -> None:
    network = build(case).eval()
    x, c, _, _, labels, augment = inputs_for(network)
    assert labels is not None
    y = network(x, c, labels, augment)
    other = network(x, c, (labels + 1) % case.num_classes, augment)
    none = network(x, c, None, augment)
    assert relative(other, y) > 1e-4
    assert torch.equal(none, network(x, c, torch.full_like(labels, -1), augment))
    assert relative(none, y) > 1e-4


def test_label_dropout_hides_classes_while_training_only() -> None:
    options = {"width": 16, "blocks": 1, "label_dropout": 0.5}
    network = build(Case("mlp", "mlp", options, (2, 1, 1), 3))
    x, c = torch.zeros(200, 2, 1, 1), torch.zeros(200)
    labels = torch.ones(200, dtype=torch.int64)
    rows = network.train()(x, c, labels).flatten(1)
    shown = network.eval()(x, c, labels).flatten(1)[0]
    hidden = network(x, c).flatten(1)[0]
    is_shown = torch.isclose(rows, shown, atol=1e-6).all(1)
    is_hidden = torch.isclose(rows, hidden, atol=1e-6).all(1)
    assert bool((is_shown ^ is_hidden).all())
    assert 60 < int(is_hidden.sum()) < 140


def test_augmentation_labels_matter_and_their_size_is_checked() -> None:
    network = build(next(case for case in CASES if case.name == "ddpmpp")).eval()
    x, c, _, _, _, augment = inputs_for(network)
    assert augment is not None
    assert relative(network(x, c, None, augment), network(x, c)) > 1e-4
    with pytest.raises(UserError, match=r"shape \(2, 4\); allowed: \[N, 9\]; set the network's"):
        network(x, c, None, augment[:, :4])


@pytest.mark.parametrize("cls", [UNetTiny, DDPMPP])
def test_images_that_cannot_be_halved_are_refused(cls: Any) -> None:
    config = cls.Config(channels=16, channel_mult=(1, 1, 1))
    with pytest.raises(UserError, match=r"images of 6x6 pixels; allowed: square images"):
        cls(config, (1, 6, 6), 0)


@pytest.mark.parametrize("cls", [ADM, EDM2, UNetTiny])
def test_heads_share_the_channels(cls: Any) -> None:
    options = {"channels": 16, "channel_mult": (1,), "blocks": 1, "attention_resolutions": (8,)}
    if cls is UNetTiny:
        options["patch_size"] = 1
    wide = cls(cls.Config(**options, channels_per_head=64), (1, 8, 8), 0)
    heads = {m.heads for m in wide.modules() if hasattr(m, "heads")}
    assert heads == {1}, "a head wider than the block is the block"
    with pytest.raises(UserError, match="channels_per_head 5 in a block of 16 channels; allowed"):
        cls(cls.Config(**options, channels_per_head=5), (1, 8, 8), 0)


def test_edm2_has_no_augmentation_input_and_no_head_unless_asked() -> None:
    with pytest.raises(UserError, match="augment_dim 9"):
        EDM2(EDM2.Config(augment_dim=9), (3, 16, 16), 0)
    network = EDM2(EDM2.Config(channels=16, channel_mult=(1,), blocks=1), (3, 16, 16), 0)
    with pytest.raises(UserError, match="no log-variance head"):
        network.log_variance(torch.zeros(2))


@pytest.mark.parametrize("cls", [EDM2, DDPMPP])
def test_dropout_at_low_resolutions_only(cls: Any) -> None:
    config = cls.Config(
        channels=16, channel_mult=(1, 1), blocks=1, dropout=0.3, dropout_max_resolution=8
    )
    network = cls(config, (3, 16, 16), 0)
    rates = {
        (name.split(".")[1], module.dropout)
        for name, module in network.named_modules()
        if hasattr(module, "conv0")
    }
    assert ("downs", 0.3) in rates  # 8x8
    assert ("ups", 0.0) in rates  # 16x16


def test_forced_weight_normalisation_keeps_the_function_and_is_idempotent() -> None:
    network = build(next(case for case in CASES if case.name == "edm2")).eval()
    inputs = inputs_for(network)
    before = network(*inputs.point())
    network.normalize_weights()
    assert relative(network(*inputs.point()), before) < 1e-3  # eps 1e-4 in the norm
    weight = network.body_net.stem.weight  # type: ignore[union-attr]
    mean_square = weight.square().mean((1, 2, 3))
    assert torch.allclose(mean_square, torch.ones_like(mean_square), atol=1e-3)
    once = {k: v.clone() for k, v in network.state_dict().items()}
    network.normalize_weights()
    assert all(torch.allclose(v, once[k], rtol=1e-3) for k, v in network.state_dict().items())
    assert not torch.equal(fresh(CASES[0]).conv_in.weight, torch.zeros(1))


def test_forward_never_changes_a_weight() -> None:
    network = build(next(case for case in CASES if case.name == "edm2")).train()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    network(*inputs_for(network).point())
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_magnitude_preserving_layers_preserve_magnitude() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(64, 256, 4, 4), torch.randn(64, 128, 4, 4)

    def rms(v: Any) -> float:
        return float(v.square().mean().sqrt())

    assert rms(MPConv(256, 64, 1)(x)) == pytest.approx(1.0, abs=0.05)
    assert rms(mp_silu(x)) == pytest.approx(1.0, abs=0.02)
    assert rms(mp_sum(x, torch.randn_like(x), 0.3)) == pytest.approx(1.0, abs=0.02)
    joined = mp_cat(x, y, 0.5)
    assert isinstance(joined, torch.Tensor)
    assert rms(joined) == pytest.approx(1.0, abs=0.02)
    shares = [float(part.square().sum()) for part in joined.split([256, 128], 1)]
    assert shares[0] == pytest.approx(shares[1], rel=0.05)


def test_log_variance_head_starts_at_zero_and_learns_by_noise_level() -> None:
    torch.manual_seed(0)
    head = LogVarianceHead(32)
    c = torch.tensor([-1.0, 0.0, 1.0])
    assert torch.equal(head(c), torch.zeros(3))
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    target = torch.tensor([1.0, -1.0, 0.5])
    for _ in range(200):
        optimizer.zero_grad()
        (head(c) - target).square().sum().backward()
        optimizer.step()
    assert torch.allclose(head(c), target, atol=0.05)


def test_embedding_derivatives_in_time() -> None:
    """sCM's argument for positional embeddings: Fourier scale 16 moves features far faster."""
    torch.manual_seed(0)

    def speed(module: torch.nn.Module) -> float:
        c = torch.linspace(0.1, 1.5, 50, dtype=torch.float64)
        dy = torch.func.jvp(module.double(), (c,), (torch.ones_like(c),))[1]
        return float(dy.square().mean().sqrt())

    positional, fourier = speed(PositionalEmbedding(128)), speed(FourierEmbedding(128, 16.0))
    assert positional == pytest.approx(0.18, abs=0.02)
    assert 60 < fourier < 90

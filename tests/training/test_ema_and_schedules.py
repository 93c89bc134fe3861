"""Averages of the weights and learning rates, against closed forms."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cmbench.plugin.config import EMAConfig, OptimizerConfig
from cmbench.training.ema import WeightAverage, ema_decay, power_exponent
from cmbench.training.optimizers import (
    learning_rate,
    load_state_tensors,
    make_optimizer,
    state_tensors,
)

BATCH = 100


def averaged(config: EMAConfig, weights: list[float]) -> float:
    """The average after steps whose weights are ``weights`` (it starts at ``weights[0]``)."""
    module = nn.Linear(1, 1, bias=False).double()
    with torch.no_grad():
        module.weight.fill_(weights[0])
    average = WeightAverage(config, module)
    for step, weight in enumerate(weights[1:], start=1):
        with torch.no_grad():
            module.weight.fill_(weight)
        average.update(batch_size=BATCH, nimg=step * BATCH)
    return float(average.average[0])


def test_half_life_halves_the_memory_of_the_start() -> None:
    config = EMAConfig(halflife_kimg=1.0)  # 10 steps of 100 images
    assert averaged(config, [1.0] + [0.0] * 10) == pytest.approx(0.5)
    assert averaged(config, [1.0] + [0.0] * 30) == pytest.approx(0.125)


def test_ramp_up_caps_the_half_life_at_a_share_of_what_was_seen() -> None:
    config = EMAConfig(halflife_kimg=1e6, rampup_ratio=0.05)
    assert ema_decay(config, batch_size=BATCH, nimg=40_100) == pytest.approx(0.5 ** (100 / 2_000))
    assert ema_decay(config, batch_size=BATCH, nimg=BATCH) == 0.0, "the first weights, whole"


def test_half_life_and_warm_up_as_in_edms_loop() -> None:
    """EDM counts the images of a step after it has set the rate and averaged (training_loop.py)."""
    average = EMAConfig(halflife_kimg=50.0, rampup_ratio=0.05)
    cur_nimg, ema, ours = 0, 0.0, 0.0
    for step in range(1, 3001):
        weight = math.sin(step)
        rampup = min(cur_nimg / max(10.0 * 1000, 1e-8), 1)
        halflife_nimg = min(50.0 * 1000, cur_nimg * 0.05)
        beta = 0.5 ** (BATCH / max(halflife_nimg, 1e-8))
        ema = ema * beta + weight * (1 - beta)
        assert rate(cur_nimg, 10**9, warmup_kimg=10) == rampup
        cur_nimg += BATCH
        decay = ema_decay(average, batch_size=BATCH, nimg=cur_nimg)
        ours = ours * decay + weight * (1 - decay)
        assert decay == beta
        assert ours == ema


def test_decay_a_step() -> None:
    assert averaged(EMAConfig(decay=0.9), [1.0, 2.0, 3.0]) == pytest.approx(
        0.9 * (0.9 * 1 + 0.1 * 2) + 0.1 * 3
    )


@given(sigma_rel=st.floats(0.01, 0.25))
def test_power_exponent_solves_the_width_equation(sigma_rel: float) -> None:
    gamma = power_exponent(sigma_rel)
    width = math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))
    assert width == pytest.approx(sigma_rel, rel=1e-9)


def test_power_exponents_of_the_paper() -> None:
    """EDM2, Sec. 3: sigma_rel 0.05 and 0.10 are gamma 16.97 and 6.94."""
    assert power_exponent(0.05) == pytest.approx(16.97, abs=5e-3)
    assert power_exponent(0.10) == pytest.approx(6.94, abs=5e-3)


@pytest.mark.parametrize("sigma_rel", [0.2889, 0.3, 0.5, -0.1])
def test_widths_without_an_average_are_refused(sigma_rel: float) -> None:
    with pytest.raises(ValueError, match=r"allowed: 0 to 0\.28"):
        power_exponent(sigma_rel)


def test_power_average_weighs_steps_by_a_power_of_time() -> None:
    """After t steps, step i weighs (i^(g+1) - (i-1)^(g+1)) / t^(g+1): a telescoping product."""
    config = EMAConfig(sigma_rel=0.1)
    g1, steps = power_exponent(0.1) + 1, 12
    weights = [math.sin(i) for i in range(steps + 1)]
    expected = sum(weights[i] * (i**g1 - (i - 1) ** g1) for i in range(1, steps + 1)) / steps**g1
    assert averaged(config, weights) == pytest.approx(expected)


def test_power_average_forgets_the_start() -> None:
    assert averaged(EMAConfig(sigma_rel=0.1), [5.0, 1.0]) == 1.0


@pytest.mark.parametrize("given", [{}, {"decay": 0.9, "halflife_kimg": 1.0}])
def test_an_average_has_one_width(given: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="exactly one of halflife_kimg, decay, sigma_rel"):
        EMAConfig(**given)


def test_an_average_keeps_buffers_as_they_are_and_loads_what_it_saved() -> None:
    module = nn.BatchNorm1d(2)
    average = WeightAverage(EMAConfig(decay=0.5), module)
    with torch.no_grad():
        module.weight.fill_(3.0)
        module.running_mean.fill_(7.0)
    average.update(batch_size=1, nimg=1)
    state = {k: v.clone() for k, v in average.state_dict().items()}
    assert state.keys() == module.state_dict().keys()
    assert state["weight"].tolist() == [2.0, 2.0]
    assert state["running_mean"].tolist() == [7.0, 7.0]
    average.update(batch_size=1, nimg=1)
    assert average.state_dict()["weight"].tolist() == [2.5, 2.5]
    average.load(state)
    assert average.state_dict()["weight"].tolist() == [2.0, 2.0]


def test_tied_weights_are_averaged_under_both_names() -> None:
    module = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    module[1].weight = module[0].weight
    average = WeightAverage(EMAConfig(decay=0.5), module)
    before = module[0].weight.detach().clone()
    with torch.no_grad():
        module[0].weight.add_(2.0)
    average.update(batch_size=1, nimg=1)
    state = average.state_dict()
    assert torch.allclose(state["0.weight"], before + 1)
    assert torch.equal(state["1.weight"], state["0.weight"])


# ---- learning rates -----------------------------------------------------------------------------


def rate(nimg: int, total: int = 100_000, **options: Any) -> float:
    config = OptimizerConfig(lr=1.0, **options)
    return learning_rate(config, nimg=nimg, total_nimg=total, batch_size=BATCH)


def test_constant_and_ramp_up() -> None:
    assert rate(0) == rate(99_900) == 1.0
    assert rate(0, warmup_kimg=10) == 0.0
    assert rate(5_000, warmup_kimg=10) == pytest.approx(0.5)
    assert rate(10_000, warmup_kimg=10) == rate(50_000, warmup_kimg=10) == 1.0


def test_decays_end_with_the_phase() -> None:
    assert rate(50_000, decay="linear") == pytest.approx(0.5)
    assert rate(25_000, decay="cosine") == pytest.approx(0.5 + 0.25 * math.sqrt(2))
    for decay in ("linear", "cosine"):
        assert rate(0, decay=decay) == 1.0
        assert rate(100_000, decay=decay) == pytest.approx(0.0, abs=1e-12)


def test_inverse_square_root_starts_at_its_reference() -> None:
    options = {"decay": "inverse-sqrt", "decay_ref_steps": 10}
    assert rate(1_000, **options) == 1.0
    assert rate(4_000, **options) == pytest.approx(0.5)


@given(
    decay=st.sampled_from(["constant", "linear", "cosine", "inverse-sqrt"]),
    nimg=st.integers(0, 200_000),
    total=st.integers(0, 100_000),
    warmup=st.floats(0, 50),
)
def test_rates_lie_between_zero_and_the_peak(
    decay: str, nimg: int, total: int, warmup: float
) -> None:
    value = rate(nimg, total, decay=decay, warmup_kimg=warmup, decay_ref_steps=3)
    assert 0 <= value <= 1


@pytest.mark.parametrize("name", ["adam", "adamw", "radam"])
def test_optimizer_state_survives_a_trip_through_tensors(name: str) -> None:
    """Three steps, then three more: with and without the trip the weights are equal bit for bit."""

    def train(trip: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        module = nn.Linear(3, 2)
        config = OptimizerConfig(name=name, lr=0.1, weight_decay=0.01)
        optimizer = make_optimizer(config, module.parameters())
        for step in range(6):
            if step == 3 and trip:
                saved = {k: v.clone() for k, v in state_tensors(optimizer)}
                optimizer = make_optimizer(config, module.parameters())
                load_state_tensors(optimizer, saved)
            optimizer.zero_grad()
            module(torch.arange(12.0).view(4, 3) * (step + 1)).square().sum().backward()
            optimizer.step()
        return [p.detach() for p in module.parameters()]

    for a, b in zip(train(False), train(True), strict=True):
        assert torch.equal(a, b)


def test_a_step_count_stays_on_the_cpu_where_the_parameter_is_a_single_number() -> None:
    parameter = nn.Parameter(torch.zeros((), device="meta"))  # any device but the CPU
    optimizer = make_optimizer(OptimizerConfig(name="radam"), [parameter])
    load_state_tensors(optimizer, {"0.step": torch.tensor(7.0), "0.exp_avg": torch.tensor(0.5)})
    state = optimizer.state[parameter]
    assert state["step"].device.type == "cpu"
    assert float(state["step"]) == 7.0
    assert state["exp_avg"].device.type == "meta"


def test_a_step_count_stays_with_the_parameter_for_fused_kernels() -> None:
    """A stand-in: torch builds fused optimizers for devices that it can compute on only."""
    parameter = nn.Parameter(torch.zeros(2, device="meta"))
    fused: Any = SimpleNamespace(
        defaults={"fused": True}, state=defaultdict(dict), param_groups=[{"params": [parameter]}]
    )
    load_state_tensors(fused, {"0.step": torch.tensor(7.0), "0.exp_avg": torch.ones(2)})
    assert fused.state[parameter]["step"].device.type == "meta"
    assert fused.state[parameter]["exp_avg"].device.type == "meta"


def test_loading_forgets_what_was_there_and_moments_take_their_parameters_layout() -> None:
    parameter = nn.Parameter(torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last))
    optimizer = make_optimizer(OptimizerConfig(), [parameter])
    optimizer.state[parameter]["stale"] = torch.ones(1)
    moment = torch.rand(2, 3, 4, 4)
    load_state_tensors(optimizer, {"0.step": torch.tensor(7.0), "0.exp_avg": moment})
    state = optimizer.state[parameter]
    assert state.keys() == {"step", "exp_avg"}
    assert state["exp_avg"].stride() == parameter.stride() != moment.stride()
    assert torch.equal(state["exp_avg"], moment)


@pytest.mark.parametrize(
    ("name", "kind", "kernel"),
    [
        ("adam", torch.optim.Adam, "fused"),
        ("adamw", torch.optim.AdamW, "fused"),
        ("radam", torch.optim.RAdam, "foreach"),
    ],
)
def test_optimizers_are_what_their_name_says_with_every_option(
    name: Any, kind: type[torch.optim.Optimizer], kernel: str
) -> None:
    config = OptimizerConfig(name=name, lr=0.3, betas=(0.5, 0.7), eps=1e-3, weight_decay=0.2)
    weights = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(()))]
    made = make_optimizer(config, iter(weights))
    assert type(made) is kind
    (group,) = made.param_groups
    assert group["params"] == weights
    options = {k: group[k] for k in ("lr", "betas", "eps", "weight_decay", kernel)}
    assert options == {
        "lr": 0.3,
        "betas": (0.5, 0.7),
        "eps": 1e-3,
        "weight_decay": 0.2,
        kernel: True,
    }

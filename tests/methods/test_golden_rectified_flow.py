"""Rectified flow and RF++ against what the official implementations return, in float64.

tests/golden/distillation: gnobitab/RectifiedFlow @5a1fd4d (noise at time 0) and sangyun884/rfpp
@f7b10a5 (noise at time 1). Everything agrees to 1e-9 relative.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from method_kit import FixedDraws
from test_golden_distillation import PROGRESS, Formula, golden, make, near, student, with_gradient
from torch import Tensor

from cmbench.diffusion.frames import flow_interpolate
from cmbench.diffusion.rectified_flow import float64_velocity, u_shaped_times
from cmbench.diffusion.runge_kutta import dormand_prince
from cmbench.plugin.method import Batch
from cmbench_plugins.rf import RF


def flow_network() -> Formula:
    return Formula(lambda x, label: 0.6 * torch.sin(1.2 * x + 0.003 * label) - 0.3 * x)


def fake_lpips(a: Tensor, b: Tensor) -> Tensor:
    error = (a - b).flatten(1)
    return error.abs().mean(1) + 0.1 * error.square().mean(1)


def rf(**config: Any) -> Any:
    made = make(RF, None, **config)
    made.lpips = fake_lpips
    return made


def pairs(g: dict[str, Tensor]) -> Batch:
    return Batch(g["x"], None, noise=g["z"], target=g["x"])


class Asked(Formula):
    """Keeps what the network is asked."""

    def forward(self, x: Tensor, c_noise: Tensor, labels: Any = None) -> Tensor:
        self.x, self.label = x, c_noise
        return super().forward(x, c_noise, labels)


@pytest.mark.parametrize(
    ("entry", "loss", "config"),
    [
        ("rf1", "loss", {}),
        ("reflow", "loss_of_pairs", {}),
        ("distill.k1.l2", "loss_of_steps", {}),
        ("distill.k1.fake_lpips", "loss_of_steps", {"distil_loss": "lpips"}),
        ("distill.k4", "loss_of_steps", {"distil_steps": 4}),
    ],
)
def test_losses(entry: str, loss: str, config: dict[str, Any]) -> None:
    g = golden("rectified-flow")
    made, network = rf(**config), Asked(flow_network().formula)
    step = (g["k4.index"] + 0.5).double() / 4
    draws = FixedDraws({"noise": g["z"], "time": g["u"], "step": step})

    def value() -> Tensor:
        found: Tensor = getattr(made, loss)({"model": network}, pairs(g), draws, PROGRESS)
        return found

    found, gradient = with_gradient(network, g["x"], value)
    near(network.x, g[f"{entry}.x_t"])
    near(network.label, g[f"{entry}.label"])
    near(found.mean(), g[f"{entry}.loss"])
    near(gradient, g[f"{entry}.grad_v"])


@pytest.mark.parametrize(
    ("entry", "nfe"),
    [("sample.euler1", 1), ("sample.euler2", 2), ("sample.euler5", 5), ("pair.euler20.x1", 20)],
)
def test_euler(entry: str, nfe: int) -> None:
    g, made = golden("rectified-flow"), rf(distil=False)
    plan = made.plan_sampling(nfe)
    near(made.sample({"model": flow_network()}, g["z"], None, plan, FixedDraws({})), g[entry])


def test_rk45_with_one_step_for_the_whole_batch_as_released() -> None:
    """The batch as one sample: the same steps, forwards and back."""
    g, made = golden("rectified-flow"), rf()
    velocity = float64_velocity(made.flow(flow_network()).flow_velocity, torch.float64)

    def field(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        out: Tensor = velocity(x.reshape(g["z"].shape), t.expand(8), None)
        return out.reshape(x.shape)

    there = dormand_prince(field, g["z"].reshape(1, -1), 1e-3, 1.0)
    near(there.x.reshape(g["z"].shape), g["pair.rk45.x1"])
    assert there.evaluations.tolist() == [int(g["pair.rk45.nfe"])]
    back = dormand_prince(field, g["pair.rk45.x1"].reshape(1, -1), 1.0, 1e-3)
    near(back.x.reshape(g["z"].shape), g["pair.rk45.z_back"])
    assert back.evaluations.tolist() == [int(g["pair.rk45.nfe_back"])]


def test_rk45_with_steps_for_each_image_agrees_to_its_tolerance() -> None:
    g, made = golden("rectified-flow"), rf(distil=False)
    plan, nets = made.plan_sampling(200, sampler="rk45"), {"model": flow_network()}
    images = made.sample(nets, g["z"], None, plan, FixedDraws({}))
    torch.testing.assert_close(images, g["pair.rk45.x1"], rtol=0, atol=1e-4)
    torch.testing.assert_close(
        made.generator_images({"generator": flow_network()}, g["z"], None), images
    )


# --- RF++ ----------------------------------------------------------------------------------------


def plus_plus(**config: Any) -> Any:
    table = {"parameterization": "edm", "t_min": 1e-5, "distil": False, "times": "u-shaped"}
    return rf(**table, **config)


def test_velocity_of_an_edm_network() -> None:
    """Theirs is of the clock that runs backwards."""
    g = golden("rectified-flow-pp")
    t = 1 - g["t"]
    x_t = flow_interpolate(g["x"], g["z"], t)
    near(-plus_plus().flow(student()).flow_velocity(x_t, t), g["velocity"])


@pytest.mark.parametrize("form", ["divt", "plain"])
def test_loss_of_rf_plus_plus(form: str) -> None:
    g, network = golden("rectified-flow-pp"), student()
    made = plus_plus(reflow_loss="lpips-huber", lpips_over_time=form == "divt")
    made.times = lambda uniform: 1 - g["t"]
    draws = FixedDraws({"time": g["t"]})

    def value() -> Tensor:
        found: Tensor = made.loss_of_pairs({"model": network}, pairs(g), draws, PROGRESS)
        return found

    found, gradient = with_gradient(network, g["x"], value)
    near(found, g[f"lpips_huber.{form}.loss"])
    near(gradient, g[f"lpips_huber.{form}.grad_F"])


def test_huber_of_rf_plus_plus() -> None:
    g, made = golden("rectified-flow-pp"), plus_plus(reflow_loss="pseudo-huber")
    made.times = lambda uniform: 1 - g["t"]
    draws = FixedDraws({"time": g["t"]})
    near(made.loss_of_pairs({"model": student()}, pairs(g), draws, PROGRESS), g["huber"])


@pytest.mark.parametrize("rule", ["default", "new"])
@pytest.mark.parametrize(
    ("entry", "nfe"), [("euler1", 1), ("euler2", 2), ("euler5", 5), ("heun3", 3)]
)
def test_samplers_of_rf_plus_plus(rule: str, entry: str, nfe: int) -> None:
    g, made = golden("rectified-flow-pp"), plus_plus()
    sampler = entry[:-1] + ("-first-noise" if rule == "new" else "")
    plan = made.plan_sampling(nfe, sampler=sampler)
    images = made.sample({"model": student()}, g["z"], None, plan, FixedDraws({}))
    near(images, g[f"sample.{rule}.{entry}"])


def test_density_of_u_shaped_times() -> None:
    """Times of evenly spread numbers have the released density."""
    g, count = golden("rectified-flow-pp"), 200_001
    u = (torch.arange(2 * count, dtype=torch.float64) + 0.5) / (2 * count)
    t = u_shaped_times(u, 4.0)
    assert 0 <= float(t.min()) <= float(t.max()) <= 1
    # Both halves are monotone: the density is one over the slope of each, and they are halves.
    rising, falling = t[:count], t[count:].flip(0)
    found = sum(
        0.5 / torch.from_numpy(np.interp(g["t_pdf.t"], part, np.gradient(part, 1 / count)))
        for part in (rising, falling)
    )
    torch.testing.assert_close(found, g["t_pdf.a4"], rtol=1e-4, atol=0)

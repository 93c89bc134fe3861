"""Solvers against the trajectories that the official implementations compute.

The denoiser is the golden teacher's formula in EDM's preconditioning; the sources are in the
metadata of the files. All of them are float64 and met to 1e-9 relative.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import teacher_formula
from safetensors.torch import load_file
from torch import Tensor

from cmbench.diffusion.frames import sigma_to_vp_time, vp_time_to_sigma
from cmbench.diffusion.grids import sampling_karras_sigmas, sampling_log_sigmas
from cmbench.diffusion.models import EDMModel
from cmbench.diffusion.solvers import amed, euler, heun
from cmbench.diffusion.solvers_adams import adams_bashforth, deis_tab, ipndm
from cmbench.diffusion.solvers_dpm import (
    dpm_solver_multistep,
    dpm_solver_singlestep,
    singlestep_orders,
)
from cmbench.diffusion.solvers_dpm_v3 import ModelStatistics, dpm_solver_v3
from cmbench.diffusion.solvers_sa import sa_solver
from cmbench.diffusion.solvers_unipc import unipc
from cmbench.diffusion.trajectory_grids import cheapest_path, euler_step_costs

GOLDEN = Path(__file__).parents[1] / "golden" / "distillation"


class CountedTeacher:
    """The golden teacher as a denoiser that counts its calls."""

    def __init__(self) -> None:
        self.calls, self.model = 0, EDMModel(teacher_formula, 0.5)

    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        self.calls += 1
        return self.model.denoise(x, sigma, labels)


@pytest.fixture
def denoise() -> CountedTeacher:
    return CountedTeacher()


def load(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


EDM, OFFICIAL = load("solvers-edm"), load("solvers-official")
V3, SA = load("dpm-solver-v3"), load("sa-solver")


def met(ours: Tensor, theirs: Tensor) -> None:
    assert ours.dtype == theirs.dtype == torch.float64
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def dpm_solver_2(denoise: CountedTeacher, x: Tensor, sigmas: Tensor) -> Tensor:
    return dpm_solver_singlestep(denoise, x, sigmas, [2] * (len(sigmas) - 1))


# The official multistep code of both repositories ends with lower orders at any number of steps.
pp = partial(dpm_solver_multistep, lower_order_final=True)
OF_EDM = {
    "euler": euler,
    "heun": heun,
    "dpm2": dpm_solver_2,
    "dpmpp2": pp,
    "dpmpp3": partial(pp, order=3),
    "ipndm3": partial(ipndm, order=3),
    "ipndm4": ipndm,
    "ipndm4.afs": partial(ipndm, analytic_first_step=True),
    "unipc2.bh2": partial(unipc, order=2, variant="bh2"),
    "unipc3.bh1": unipc,
    "unipc3.bh2": partial(unipc, variant="bh2"),
    "ab_sigma3": partial(adams_bashforth, order=3),
    "ab_sigma4": adams_bashforth,
    "deis_tab3": partial(deis_tab, order=2),
    "deis_tab4": partial(deis_tab, order=3),
}
CASES = sorted(
    name for name in EDM if "." in name and name.split(".", 2)[-1] in OF_EDM and name[0] in "pl"
)


def test_every_trajectory_of_the_file_is_compared() -> None:
    trajectories = {name for name, t in EDM.items() if t.ndim == 4} - {"unit_noise"}
    assert trajectories == {*CASES, "amed.afs0", "amed.afs1"}
    assert len(CASES) == 82


@pytest.mark.parametrize("case", CASES)
def test_solvers_on_both_grids(case: str, denoise: CountedTeacher) -> None:
    grid, points, solver = case.split(".", 2)
    sigmas = EDM[f"{grid}.{points}.sigmas"]
    make = sampling_karras_sigmas if grid == "polynomial" else sampling_log_sigmas
    torch.testing.assert_close(make(int(points) - 1), sigmas, rtol=1e-13, atol=0)
    ours = OF_EDM[solver](denoise, sigmas[0] * EDM["unit_noise"], sigmas)
    met(ours, EDM[case])
    assert denoise.calls == int(EDM.get(f"{case}.nfe", torch.tensor(int(points) - 1)))


@pytest.mark.parametrize("afs", [False, True])
def test_amed_with_given_ratios_and_scales(afs: bool, denoise: CountedTeacher) -> None:
    sigmas = EDM["time_uniform.4.sigmas"]
    ratios, scales = EDM["amed.r"].tolist(), EDM["amed.scale_dir"].tolist()
    start = sigmas[0] * EDM["unit_noise"]
    ours = amed(denoise, start, sigmas, ratios, scales, analytic_first_step=afs)
    met(ours, EDM[f"amed.afs{int(afs)}"])
    assert denoise.calls == EDM[f"amed.afs{int(afs)}.nfe"]


def test_levels_chosen_by_trajectories(denoise: CountedTeacher) -> None:
    sigmas = EDM["gits.sigmas"]
    cost, deviation = euler_step_costs(denoise, sigmas[0] * EDM["unit_noise"], sigmas)
    assert denoise.calls == len(sigmas) - 1
    met(cost, EDM["gits.cost"])
    met(deviation[1:-1], EDM["gits.deviation"])
    for points in (4, 6, 8):
        for coefficient in (1.0, 1.15):
            expected = EDM[f"gits.steps{points}.coeff{coefficient}"].tolist()
            assert cheapest_path(cost, points - 1, coefficient) == expected


@pytest.mark.parametrize("case", sorted(n for n, t in OFFICIAL.items() if t.ndim == 4 and "." in n))
def test_official_dpm_solvers_and_unipc(case: str, denoise: CountedTeacher) -> None:
    family, kind, *rest, steps = case.split(".")
    x, sigmas = 80 * OFFICIAL["unit_noise"], OFFICIAL[f"sigmas.{steps}"]
    order = int(rest[0][1:])
    if family == "unipc":
        prediction = rest[1].removesuffix("_prediction")
        ours = unipc(denoise, x, sigmas, order=order, variant=kind, prediction=prediction)  # type: ignore[arg-type]
    elif kind == "multistep":
        prediction = "data" if family.endswith("++") else "noise"
        ours = pp(denoise, x, sigmas, order=order, prediction=prediction)
    else:
        prediction = "data" if family.endswith("++") else "noise"
        orders = singlestep_orders(int(steps), order)
        grid = sampling_log_sigmas(len(orders))
        ours = dpm_solver_singlestep(denoise, x, grid, orders, prediction=prediction)  # type: ignore[arg-type]
    met(ours, OFFICIAL[case])
    assert denoise.calls == OFFICIAL[f"{case}.nfe"] == int(steps)


@pytest.mark.parametrize("case", sorted(n for n, t in V3.items() if t.ndim == 4 and "." in n))
def test_dpm_solver_v3(case: str, denoise: CountedTeacher) -> None:
    mode, steps, order, *options = case.split(".")
    statistics = (
        ModelStatistics(V3["lambda_grid"], V3["l"], V3["s"], V3["b"])
        if mode == "ems"
        else ModelStatistics.degenerate(0.002, 80.0, intervals=240)
    )
    sigmas = V3[f"{mode}.{steps}.sigmas"]
    assert statistics.nearest(sigmas) == V3[f"{mode}.{steps}.index"].tolist()
    ours = dpm_solver_v3(
        denoise,
        80 * V3["unit_noise"],
        sigmas,
        statistics,
        order=int(order[1]),
        corrector="corr" in options,
        pseudo="pseudo" in options or (order == "o3" and "corr" in options),
        lower_order_final="nolower" not in options,
    )
    met(ours, V3[case])
    assert denoise.calls == int(steps)


@pytest.mark.parametrize("case", sorted(n for n, t in SA.items() if "_steps.tau" in n))
def test_sa_solver(case: str, denoise: CountedTeacher) -> None:
    """The source works in the VP frame: ``x_vp = alpha x``, alpha = 1 / sqrt(1 + sigma^2)."""
    kind, rest = case.split(".", 1)
    tau, orders, steps = float(rest[3:6]), rest.split(".")[2], rest.split(".")[3]
    few = kind == "few_steps"
    ends = vp_time_to_sigma(torch.tensor([1.0, 1e-3], dtype=torch.float64))
    sigmas = sampling_log_sigmas(int(steps), float(ends[1]), float(ends[0]))
    alpha = 1 / torch.sqrt(1 + ends**2)
    noises = SA[f"noises.{kind}.{steps}"]

    def stochasticity(sigma: float) -> float:
        time = float(sigma_to_vp_time(torch.tensor(sigma, dtype=torch.float64)))
        return tau if 0.05 <= time <= 0.95 else 0.0

    ours = sa_solver(
        denoise,
        SA["unit_noise"] / alpha[0],
        sigmas,
        noise_sampler=lambda step: noises[step + 1],
        predictor_order=int(orders[1]),
        corrector_order=int(orders[3]),
        tau=stochasticity,
        few_steps=few,
    )
    met(ours * alpha[1] if few else ours, SA[case])
    assert denoise.calls == int(steps) + (0 if few else 2)

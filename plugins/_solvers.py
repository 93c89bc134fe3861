"""Solvers to sample a diffusion model with, by name, and how each spends an NFE budget.

Grids end at zero for EDM's solvers (the last step returns the denoised images) and at ``sigma_min``
for those that step in ``ln sigma``, for which a step to zero is infinitely long.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cmbench.diffusion.grids import (
    sampling_karras_sigmas,
    sampling_log_sigmas,
    sampling_sigmas,
    sampling_vp_time_sigmas,
)
from cmbench.diffusion.models import DiffusionModel
from cmbench.diffusion.solvers import (
    Denoiser,
    NoiseSampler,
    Prediction,
    euler,
    euler_ancestral,
    float64_denoiser,
    heun,
    heun_nfe,
    stochastic_heun,
)
from cmbench.diffusion.solvers_adams import adams_bashforth, deis_tab, ipndm
from cmbench.diffusion.solvers_dpm import (
    dpm_solver_multistep,
    dpm_solver_singlestep,
    singlestep_orders,
)
from cmbench.diffusion.solvers_dpm_v3 import ModelStatistics, dpm_solver_v3
from cmbench.diffusion.solvers_sa import sa_solver
from cmbench.diffusion.solvers_unipc import unipc
from cmbench.errors import Declined


class Solver(NamedTuple):
    """A solver with its noise levels.

    ``steps(nfe)`` returns the number of steps that cost exactly ``nfe`` evaluations, or declines;
    ``grid(steps, sigma_min, sigma_max)`` the descending levels ``[steps + 1]`` (EDM's takes ``rho``
    as well); ``options(nfe)`` further arguments of ``solve``.
    """

    solve: Callable[..., Tensor]
    steps: Callable[[int], int]
    grid: Callable[..., Tensor] = sampling_sigmas
    options: Callable[[int], dict[str, Any]] = lambda nfe: {}

    @property
    def ends_at_zero(self) -> bool:
        """Whether the last level is zero, not ``sigma_min``."""
        return self.grid is sampling_sigmas

    @property
    def takes_rho(self) -> bool:
        """Whether the grid has an exponent."""
        return self.grid in (sampling_sigmas, sampling_karras_sigmas)


def _one_a_step(nfe: int) -> int:
    return nfe


def _multiples_of(calls: int) -> Callable[[int], int]:
    def steps(nfe: int) -> int:
        if nfe % calls:
            raise Declined(f"NFE {nfe} is not a multiple of {calls}, this solver's calls per step")
        return nfe // calls

    return steps


def _odd(nfe: int) -> int:
    if nfe % 2 == 0:
        raise Declined(
            f"NFE {nfe} is even: this solver takes two evaluations per step, one in the last"
        )
    return (nfe + 1) // 2


def _equal_orders(order: int) -> Callable[[int], dict[str, Any]]:
    return lambda nfe: {"orders": [order] * (nfe // order)}


def _options(**options: Any) -> Callable[[int], dict[str, Any]]:
    return lambda nfe: options


def _multistep(**options: Any) -> Solver:
    return Solver(dpm_solver_multistep, _one_a_step, sampling_log_sigmas, _options(**options))


def _singlestep(order: int, prediction: Prediction) -> Solver:
    return Solver(
        dpm_solver_singlestep,
        lambda nfe: len(singlestep_orders(nfe, order)),
        sampling_log_sigmas,
        lambda nfe: {"orders": singlestep_orders(nfe, order), "prediction": prediction},
    )


def _dpm_solver_v3_degenerate(
    denoise: Denoiser, x: Tensor, sigmas: Tensor, **options: Any
) -> Tensor:
    """DPM-Solver-v3 without statistics of the model, of order 3 with corrector."""
    statistics = ModelStatistics.degenerate(float(sigmas[-1]), float(sigmas[0]))
    return dpm_solver_v3(denoise, x, sigmas, statistics, corrector=True, **options)


_AFS = _options(analytic_first_step=True)


def _one_more(nfe: int) -> int:
    """An analytic first step costs no evaluation."""
    return nfe + 1


SOLVERS: dict[str, Solver] = {
    "heun": Solver(
        heun,
        lambda nfe: heun_nfe(nfe, extra_euler="last").n_steps,
        options=lambda nfe: heun_nfe(nfe, extra_euler="last").options,
    ),
    "euler": Solver(euler, _one_a_step),
    "euler-ancestral": Solver(euler_ancestral, _one_a_step),
    "stochastic-heun": Solver(stochastic_heun, _odd),
    "dpm-solver-2": Solver(
        dpm_solver_singlestep, _multiples_of(2), sampling_log_sigmas, _equal_orders(2)
    ),
    "dpm-solver-3": Solver(
        dpm_solver_singlestep, _multiples_of(3), sampling_log_sigmas, _equal_orders(3)
    ),
    "dpm-solver-fast": _singlestep(3, "noise"),
    "dpm-solver-2m": _multistep(prediction="noise"),
    "dpm-solver-3m": _multistep(prediction="noise", order=3),
    "dpm-solver++2s": _singlestep(2, "data"),
    "dpm-solver++3s": _singlestep(3, "data"),
    "dpm-solver++2m": _multistep(),
    # As printed in the paper: the last step keeps its order, however few steps there are.
    "dpm-solver++2m-second-order-end": _multistep(lower_order_final=False),
    "dpm-solver++3m": _multistep(order=3),
    "dpm-solver-v3-degenerate": Solver(_dpm_solver_v3_degenerate, _one_a_step, sampling_log_sigmas),
    "deis": Solver(deis_tab, _one_a_step, sampling_vp_time_sigmas),
    "deis-afs": Solver(deis_tab, _one_more, sampling_vp_time_sigmas, _AFS),
    "adams-bashforth": Solver(adams_bashforth, _one_a_step, sampling_karras_sigmas),
    "ipndm": Solver(ipndm, _one_a_step, sampling_karras_sigmas),
    "ipndm-afs": Solver(ipndm, _one_more, sampling_karras_sigmas, _AFS),
    "sa-solver": Solver(sa_solver, _one_a_step, sampling_log_sigmas),
    "unipc": Solver(unipc, _one_a_step, sampling_log_sigmas),
    "unipc-2": Solver(unipc, _one_a_step, sampling_log_sigmas, _options(order=2)),
}
#: Solvers that add noise on the way: their images are no function of the first noise.
STOCHASTIC = ("euler-ancestral", "stochastic-heun", "sa-solver")
#: Another name for the same thing.
ALIASES = {"ddim": "euler"}
#: EDM's own sampler is the automatic one from this NFE on: 18 steps cost 35 in the paper.
HEUN_FROM_NFE = 18


def automatic_sampler(nfe: int, sigmas: Sequence[float] | None) -> str:
    """Return the solver where none is asked for, see docs/solvers.md for how it was chosen.

    Noise levels that are given one per evaluation leave no place for an analytic first step.
    """
    if nfe >= HEUN_FROM_NFE:
        return "heun"
    return "deis" if sigmas is not None and len(sigmas) == nfe else "deis-afs"


def evaluated_sigmas(
    name: str, nfe: int, sigma_min: float, sigma_max: float, rho: float
) -> tuple[float, ...]:
    """Return the descending noise levels that a solver steps from, one per step."""
    solver = SOLVERS[name]
    exponent = (rho,) if solver.takes_rho else ()
    grid = solver.grid(solver.steps(nfe), sigma_min, sigma_max, *exponent)
    return tuple(float(sigma) for sigma in grid[:-1])


def solved(
    model: DiffusionModel,
    name: str,
    nfe: int,
    noise: Tensor,
    sigmas: Sequence[float],
    sigma_min: float,
    labels: Tensor | None,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """Return images of unit ``noise`` ``[N, C, H, W]``; the solver's state is float64 as EDM's.

    Args:
        model: the diffusion model.
        name: of the solver.
        nfe: evaluations per image.
        noise: unit noise; images have its dtype.
        sigmas: noise levels as :func:`evaluated_sigmas` returns them.
        sigma_min: last level of solvers that do not reach zero.
        labels: int64 ``[N]`` or None.
        noise_sampler: unit noise of each step, for :data:`STOCHASTIC` solvers.
    """
    solver = SOLVERS[name]
    end = 0.0 if solver.ends_at_zero else sigma_min
    # On the CPU: solvers look at single levels, which would stall a GPU.
    grid = torch.tensor([*sigmas, end], dtype=torch.float64)
    samples = solver.solve(
        float64_denoiser(model, noise.dtype),
        noise.double() * grid[0],
        grid,
        labels=labels,
        **solver.options(nfe),
        noise_sampler=noise_sampler,
    )
    return samples.to(noise.dtype)

"""Solvers to sample a diffusion model with, by name, and how each spends an NFE budget.

Grids end at zero for EDM's solvers (the last step returns the denoised images) and at ``sigma_min``
for those that step in ``ln sigma``, for which a step to zero is infinitely long.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from cmbench.diffusion.grids import sampling_log_sigmas, sampling_sigmas, sampling_vp_time_sigmas
from cmbench.diffusion.solvers import (
    dpm_fast_orders,
    dpm_solver_singlestep,
    euler,
    euler_ancestral,
    heun,
    heun_nfe,
    stochastic_heun,
)
from cmbench.diffusion.solvers_multistep import deis_tab, dpm_solver_pp_2m, dpm_solver_pp_3m, unipc
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
    "dpm-solver-fast": Solver(
        dpm_solver_singlestep,
        lambda nfe: len(dpm_fast_orders(nfe)),
        sampling_log_sigmas,
        lambda nfe: {"orders": dpm_fast_orders(nfe)},
    ),
    "dpm-solver++2m": Solver(dpm_solver_pp_2m, _one_a_step, sampling_log_sigmas),
    # As printed in the paper: the last step keeps its order, however few steps there are.
    "dpm-solver++2m-second-order-end": Solver(
        dpm_solver_pp_2m,
        _one_a_step,
        sampling_log_sigmas,
        options=lambda nfe: {"lower_order_final": False},
    ),
    "dpm-solver++3m": Solver(dpm_solver_pp_3m, _one_a_step, sampling_log_sigmas),
    "deis": Solver(deis_tab, _one_a_step, sampling_vp_time_sigmas),
    "unipc": Solver(unipc, _one_a_step, sampling_log_sigmas),
}
#: Another name for the same thing.
ALIASES = {"ddim": "euler"}

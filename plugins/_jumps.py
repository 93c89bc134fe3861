"""Plans of students that sample in just the steps they were trained for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cmbench.diffusion.models import DiffusionModel
from cmbench.diffusion.solvers import euler
from cmbench.errors import Declined
from cmbench.plugin.method import ConsistencyFunction, SamplingPlan


def jumps_plan(
    who: str,
    students: Sequence[int],
    grid: Callable[[int], Tensor],
    nfe: int,
    sigmas: Sequence[float] | None,
    sampler: str | None,
) -> SamplingPlan:
    """Return the plan of the student of exactly ``nfe`` steps, ``steps-NFE``, or decline.

    Args:
        who: the method, for messages.
        students: step counts that were trained for.
        grid: returns the ascending levels ``[steps + 1]`` of a step count, the end first.
        nfe: evaluations, one per step.
        sigmas: of the user, declined.
        sampler: of the user: DDIM under either name.
    """
    if sampler not in (None, "euler", "ddim"):
        raise Declined(f"sampler {sampler!r}: {who} has DDIM (euler) only")
    if nfe not in students:
        counts = ", ".join(map(str, students))
        raise Declined(f"{who} has students of {counts} steps, none of {nfe}")
    if sigmas is not None:
        raise Declined(f"a student of {who} knows only its own noise levels")
    levels = grid(nfe).flip(0)[:-1]
    return SamplingPlan(nfe, "euler", tuple(levels.tolist()), variant=f"steps-{nfe}")


def consistency_of_jumps(
    who: str, students: Sequence[int], model: DiffusionModel
) -> ConsistencyFunction:
    """Return the last student's consistency function, where it is one, or decline.

    A student of one jump maps every level of its grid to clean images; students of several jumps
    are right to the ends of their segments only. Its network is read as EDM's denoiser, which keeps
    images without noise.
    """
    if students[-1] != 1:
        raise Declined(f"{who} ends with a student of {students[-1]} steps, not of one")
    if model.parameterization != "edm":
        raise Declined(f"{who} does not keep images without noise: parameterization is not 'edm'")
    return model.denoise


def one_step_plan(
    who: str, sigma: float, nfe: int, sigmas: Sequence[float] | None, sampler: str | None
) -> SamplingPlan:
    """Return the plan of a generator that takes one evaluation at ``sigma``, or decline."""
    if sampler not in (None, "one-step"):
        raise Declined(f"sampler {sampler!r}: {who} has one-step only")
    if nfe != 1:
        raise Declined(f"{who} samples in one evaluation, not in {nfe}")
    if sigmas is not None and tuple(sigmas) != (sigma,):
        raise Declined(f"a generator of {who} knows one of the noise levels only: {sigma:g}")
    return SamplingPlan(1, "one-step", (sigma,))


def sample_by_jumps(
    model: DiffusionModel,
    noise: Tensor,
    sigmas: Sequence[float],
    labels: Tensor | None,
    *,
    clip: bool,
) -> Tensor:
    """Return images after DDIM jumps from ``sigmas[0]`` to ``sigmas[-1]``; the state is float64.

    ``clip`` clamps every denoised image to [-1, 1].
    """
    grid = torch.tensor(sigmas, dtype=torch.float64)

    def denoise(x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        denoised = model.denoise(x.to(noise.dtype), sigma.to(noise.dtype), labels).double()
        return denoised.clamp(-1, 1) if clip else denoised

    return euler(denoise, noise.double() * grid[0], grid, labels=labels).to(noise.dtype)

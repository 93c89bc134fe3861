"""What ``cmbench list samplers`` says of the built-in methods' samplers; imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from cmbench.errors import Declined
from cmbench.plugin.specs import SamplerSpec

#: One evaluation per noise level, with fresh noise between them.
MULTISTEP = (
    SamplerSpec(
        "multistep", "Denoise, add fresh noise, denoise again", reference="arXiv:2303.01469"
    ),
)
#: For students of DDIM steps, which know only their own noise levels.
DDIM = (
    SamplerSpec(
        "euler",
        "DDIM with the student of as many steps",
        "the students' steps",
        reference="arXiv:2010.02502",
    ),
)
_FIRST_NOISE = "places each prediction on the line to the first noise"
_FLOW = {
    "euler": SamplerSpec("euler", "Euler along the flow", "any", "1"),
    "heun": SamplerSpec("heun", "Heun along the flow, Euler in the last step", "odd", "2"),
    "rk45": SamplerSpec(
        "rk45", "Dormand-Prince, own steps for each image", "at most, from 8", "5", "adaptive"
    ),
    "euler-first-noise": SamplerSpec("euler-first-noise", f"Euler; {_FIRST_NOISE}", "any", "1"),
    "heun-first-noise": SamplerSpec("heun-first-noise", f"Heun; {_FIRST_NOISE}", "odd", "2"),
}
#: Solvers of a flow.
FLOW_SOLVERS = tuple(_FLOW)
#: For flows of several stages: ``STAGE-SOLVER``, or the solver alone for the last k-RF (at the
#: distilled flow's number of steps, that flow).
FLOWS = (
    *(
        spec._replace(
            name=f"{stage}{name}",
            title=f"{spec.title}{told}",
            grid=spec.grid or "uniform in the flow's time",
            one_step="declined" if name == "rk45" else "one step from noise",
            reference="arXiv:2405.20320" if "first" in name else "arXiv:2209.03003",
        )
        for stage, told in [("", ""), *((f"{k}-rf-", f", {k}-RF") for k in (1, 2, 3))]
        for name, spec in _FLOW.items()
    ),
    SamplerSpec(
        "distilled-euler",
        "Steps of the distilled flow",
        "its steps",
        one_step="generates",
        reference="arXiv:2209.03003",
    ),
)
#: For generators of one evaluation.
ONE_STEP = (SamplerSpec("one-step", "The generator, once", "1", one_step="generates"),)

_DPM, _DPM_PP, _DEIS = "arXiv:2206.00927", "arXiv:2211.01095", "arXiv:2204.13902"
_EDM, _V3, _SA, _UNIPC = (
    "arXiv:2206.00364",
    "arXiv:2310.13268",
    "arXiv:2309.05019",
    "arXiv:2302.04867",
)
_KARRAS, _KARRAS_0, _LOG, _VP = "karras", "karras, then 0", "uniform in ln sigma", "root of VP time"
_AFS_1 = "evaluates at the second level"
_MIN_1 = "DDIM from sigma_max to sigma_min"

DIFFUSION = (
    SamplerSpec(
        "heun",
        "Heun, Euler in the last step; automatic from NFE 18",
        "any",
        "2",
        _KARRAS_0,
        reference=_EDM,
    ),
    SamplerSpec("euler", "Euler, DDIM", "any", "1", _KARRAS_0, reference="arXiv:2010.02502"),
    SamplerSpec(
        "euler-ancestral",
        "DDIM with noise in every step",
        "any",
        "stochastic",
        _KARRAS_0,
        reference="arXiv:2010.02502",
    ),
    SamplerSpec(
        "stochastic-heun", "Heun with churn", "odd", "stochastic", _KARRAS_0, reference=_EDM
    ),
    SamplerSpec("dpm-solver-2", "DPM-Solver-2", "multiples of 2", "2", _LOG, "declined", _DPM),
    SamplerSpec("dpm-solver-3", "DPM-Solver-3", "multiples of 3", "3", _LOG, "declined", _DPM),
    SamplerSpec("dpm-solver-fast", "DPM-Solver of orders 3, 2, 1", "any", "3", _LOG, _MIN_1, _DPM),
    SamplerSpec("dpm-solver-2m", "DPM-Solver, multistep", "any", "2", _LOG, _MIN_1, _DPM),
    SamplerSpec("dpm-solver-3m", "DPM-Solver, multistep", "any", "2", _LOG, _MIN_1, _DPM),
    SamplerSpec("dpm-solver++2s", "DPM-Solver++, single-step", "any", "2", _LOG, _MIN_1, _DPM_PP),
    SamplerSpec("dpm-solver++3s", "DPM-Solver++, single-step", "any", "3", _LOG, _MIN_1, _DPM_PP),
    SamplerSpec("dpm-solver++2m", "DPM-Solver++, multistep", "any", "2", _LOG, _MIN_1, _DPM_PP),
    SamplerSpec(
        "dpm-solver++2m-second-order-end",
        "The same, its last step too of order 2",
        "any",
        "2",
        _LOG,
        _MIN_1,
        _DPM_PP,
    ),
    SamplerSpec("dpm-solver++3m", "DPM-Solver++, multistep", "any", "2", _LOG, _MIN_1, _DPM_PP),
    SamplerSpec(
        "dpm-solver-v3-degenerate",
        "DPM-Solver-v3 without statistics, with corrector",
        "any",
        "3",
        _LOG,
        _MIN_1,
        _V3,
    ),
    SamplerSpec("deis", "tAB-DEIS of degree 3", "any", "4", _VP, _MIN_1, _DEIS),
    SamplerSpec(
        "deis-afs",
        "tAB-DEIS, analytic first step; automatic below NFE 18",
        "any",
        "4",
        _VP,
        _AFS_1,
        _DEIS,
    ),
    SamplerSpec(
        "adams-bashforth",
        "Variable-step Adams-Bashforth in sigma",
        "any",
        "4",
        _KARRAS,
        _MIN_1,
        "Hairer et al. 1993",
    ),
    SamplerSpec("ipndm", "iPNDM of 4 slopes", "any", "2", _KARRAS, _MIN_1, "arXiv:2202.09778"),
    SamplerSpec(
        "ipndm-afs",
        "iPNDM of 4 slopes, analytic first step",
        "any",
        "2",
        _KARRAS,
        _AFS_1,
        "arXiv:2202.09778",
    ),
    SamplerSpec(
        "sa-solver", "SA-Solver, predictor 3, corrector 4", "any", "stochastic", _LOG, _MIN_1, _SA
    ),
    SamplerSpec("unipc", "UniPC-3", "any", "4", _LOG, _MIN_1, _UNIPC),
    SamplerSpec("unipc-2", "UniPC-2", "any", "3", _LOG, _MIN_1, _UNIPC),
)


def staged_solver(name: str, stages: Sequence[str]) -> tuple[str, str]:
    """Read ``[STAGE-]SOLVER`` of a flow; the stage is empty if none is named.

    Raises:
        Declined: it is neither a solver nor a stage's.
    """
    for stage in stages:
        if name.removeprefix(f"{stage}-") in FLOW_SOLVERS and name.startswith(stage):
            return stage, name.removeprefix(f"{stage}-")
    if name not in FLOW_SOLVERS:
        allowed = f"{', '.join(FLOW_SOLVERS)}, alone or after one of {', '.join(stages)} and -"
        raise Declined(f"sampler {name!r} is not one of {allowed}")
    return "", name

"""Checks that the functions which a method offers are one function in each frame."""

from __future__ import annotations

import torch
from torch import Tensor

from cmbench.diffusion.frames import append_dims, sigma_to_t, velocity_to_denoised
from cmbench.errors import Declined
from cmbench.testing.case import Subject
from cmbench.testing.check import CheckFailure
from cmbench.testing.draws import RowDraws

#: The highest noise level of the images that a flow map is tried on.
HIGHEST = 50.0


def diffusion_model(subject: Subject) -> str | None:
    """The diffusion model's ``denoise`` and ``velocity`` are one function in two frames."""
    case = subject.case()
    try:
        model = case.method.diffusion_model(case.nets)
    except Declined:
        return "the method has no diffusion model"
    if not model.parameterization:
        raise CheckFailure("its diffusion model states no parameterization", "name it")
    batch, sd = case.batch(), case.method.sigma_data
    sigma = torch.linspace(0.05, 5.0, case.batch_size)
    t = sigma_to_t(sigma, sd)
    x_t = append_dims(torch.cos(t), batch.images) * batch.images
    with torch.no_grad():
        denoised = model.denoise(batch.images, sigma, batch.labels)
        other = velocity_to_denoised(x_t, t, model.velocity(x_t, t, batch.labels))
    if denoised.shape != batch.images.shape or not torch.allclose(denoised, other, atol=1e-3):
        raise CheckFailure(
            "denoise and velocity of its diffusion model disagree",
            "return D(x, sigma) in EDM's frame and dx_t/dt in TrigFlow's of the same network",
        )
    return None


def flow_map(subject: Subject) -> str | None:
    """A flow map to an image's own level keeps it, and to zero is the consistency function."""
    case = subject.case()
    try:
        function = case.method.flow_map(case.nets)
    except Declined:
        return "the method has no flow map"
    batch, sigma = case.batch(), torch.linspace(0.05, HIGHEST, case.batch_size)
    noise = RowDraws(range(case.batch_size)).normal("noise", batch.images)
    x = batch.images + append_dims(sigma, noise) * noise
    with torch.no_grad():
        kept = function(x, sigma, sigma, batch.labels)
        origin = function(x, sigma, torch.zeros_like(sigma), batch.labels)
        expected = case.method.consistency_function(case.nets)(x, sigma, batch.labels)
    if not torch.allclose(kept, x, rtol=1e-3, atol=1e-3):
        raise CheckFailure(
            f"flow_map from a noise level to itself changes images by {_gap(kept, x):.2g}",
            "return x where sigma_end is sigma, in EDM's frame x = x0 + sigma z",
        )
    if not torch.allclose(origin, expected, rtol=1e-3, atol=1e-3):
        raise CheckFailure(
            f"flow_map to noise level 0 and consistency_function differ by "
            f"{_gap(origin, expected):.2g}",
            "write flow_map alone: consistency_function is its map to zero by default",
        )
    return None


def _gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())

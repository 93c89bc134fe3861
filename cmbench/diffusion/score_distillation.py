"""Losses of generators that are trained through the scores of their samples.

``generated`` are a generator's images, ``fake`` the denoised images of the model of its samples,
``real`` those of the teacher, both at the same noisy copy of ``generated``; images ``[N, C, H, W]``
give losses ``[N]``. Values say nothing about progress: only their gradients are meant. Formulas are
those of the released codes that are named.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from cmbench.diffusion.distances import l2_mean
from cmbench.diffusion.frames import append_dims


def diff_instruct_loss(generated: Tensor, fake: Tensor, real: Tensor) -> Tensor:
    """Return ``sum over values of sg(D_fake - D_real) G`` (arXiv:2305.18455, di_loss.py)."""
    return ((fake - real).detach() * generated).flatten(1).sum(1)


def matching_direction(generated: Tensor, fake: Tensor, real: Tensor, floor: float) -> Tensor:
    """Return ``(D_fake - D_real) / mean |G - D_real|``, without a gradient.

    DMD2 (arXiv:2405.14867, edm_guidance.py) has no ``floor`` on the mean and replaces NaN by 0, as
    infinity here; FastGen adds 1e-6. Images of few values need more: their mean comes near zero.
    """
    with torch.no_grad():
        scale = (generated - real).abs().flatten(1).mean(1) + floor
        quotient = (fake - real) / append_dims(scale, fake)
        return torch.nan_to_num(quotient, nan=0.0, posinf=0.0, neginf=0.0)


def matching_loss(generated: Tensor, direction: Tensor) -> Tensor:
    """Return half the mean of ``(G - sg(G - g))^2``, whose gradient is g / number of values."""
    return l2_mean(generated, (generated - direction).detach()) / 2


def identity_loss(
    generated: Tensor, fake: Tensor, real: Tensor, alpha: float, floor: float = 0.0
) -> Tensor:
    """Return ``sum of (D_real - D_fake) ((D_real - G) - alpha (D_real - D_fake)) / w``.

    ``w`` is the mean of ``|G - D_real|``, at least 1e-5 as released, plus ``floor`` for images of
    few values, without a gradient; all else has one, the two denoised images too (SiD,
    arXiv:2404.04057, as released). With ``alpha`` above 1 its
    expectation is negative near the optimum.
    """
    scale = (generated - real).detach().abs().flatten(1).mean(1).clamp_min(1e-5) + floor
    gap = real - fake
    return (gap * ((real - generated) - alpha * gap)).flatten(1).sum(1) / scale


# --- discriminators ------------------------------------------------------------------------------


def generator_gan_loss(fake_logits: Tensor) -> Tensor:
    """Return ``softplus(-logit)`` per image ``[N]``, a mean over its logits ``[N, K]``."""
    return F.softplus(-fake_logits).mean(1)


def discriminator_loss(fake_logits: Tensor, real_logits: Tensor) -> Tensor:
    """Return ``softplus(fake) + softplus(-real)`` per image ``[N]``, of logits ``[N, K]``."""
    return F.softplus(fake_logits).mean(1) + F.softplus(-real_logits).mean(1)


#: h(r) of f-divergences (arXiv:2502.15681), by name: the weight of an image whose ratio is r.
DIVERGENCE_WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse-kl": torch.ones_like,
    "forward-kl": lambda r: r,
    "jensen-shannon": lambda r: 1 - 1 / (1 + r),
    "softened-reverse-kl": lambda r: 1 / (1 + r),
    "neyman": lambda r: 1 / r,
    "hellinger": torch.sqrt,
    "jeffreys": lambda r: 1 + r,
}


def density_ratio(fake_logits: Tensor) -> Tensor:
    """Return ``r = exp(mean logit)`` ``[N]`` of logits ``[N, K]``: p_real / p_fake.

    Logits are clamped to 10 in size, r to [0.1, 20] (arXiv:2502.15681, as in FastGen).
    """
    return fake_logits.clamp(-10, 10).mean(1).exp().clamp(0.1, 20)


def divergence_weights(divergence: str, ratio: Tensor, group: int) -> Tensor:
    """Return ``h(r)`` ``[N]`` divided by its mean over each ``group`` of consecutive images."""
    h = DIVERGENCE_WEIGHTS[divergence](ratio).reshape(-1, group)
    return (h / (h.mean(1, keepdim=True) + 1e-6)).reshape(-1)

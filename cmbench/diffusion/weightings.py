"""Loss weightings over noise levels: ``[N]`` noise levels or angles to ``[N]`` weights."""

from __future__ import annotations

import torch
from torch import Tensor


def edm_weight(sigma: Tensor, sigma_data: float) -> Tensor:
    """Return ``(sigma^2 + sd^2) / (sigma sd)^2``, ``[N]`` (Karras et al. 2022, Table 1)."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def inverse_gap_weight(sigma_larger: Tensor, sigma_smaller: Tensor) -> Tensor:
    """Return ``1 / (sigma_{i+1} - sigma_i)``, ``[N]`` (arXiv:2310.14189, Sec. 3.1)."""
    return 1 / (sigma_larger - sigma_smaller)


def snr(sigma: Tensor) -> Tensor:
    """Return the signal-to-noise ratio ``sigma^-2``, ``[N]``, of data of unit scale."""
    return sigma**-2


def truncated_snr_weight(sigma: Tensor) -> Tensor:
    """Return ``max(sigma^-2, 1)``, ``[N]`` (Salimans & Ho 2022, arXiv:2202.00512, Sec. 4)."""
    return snr(sigma).clamp_min(1)


def snr_plus_one_weight(sigma: Tensor) -> Tensor:
    """Return ``sigma^-2 + 1``, ``[N]``: the squared v-error (arXiv:2202.00512, Sec. 4)."""
    return snr(sigma) + 1


def adaptive_weighted_loss(squared_error_sum: Tensor, log_weight: Tensor, dims: int) -> Tensor:
    """Return ``exp(w) / D ||.||^2 - w`` per image (arXiv:2410.11081, Eq. 8).

    ``squared_error_sum`` and the learned ``log_weight`` w are ``[N]``; ``dims`` is D, the values in
    an image. Its minimum over w is at ``exp(w) = D / E||.||^2``.
    """
    return torch.exp(log_weight) / dims * squared_error_sum - log_weight

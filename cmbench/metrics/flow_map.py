"""Flow-map error: a generator against the exact solution map of its dataset's PF-ODE."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cmbench.errors import NonFiniteError, UserError
from cmbench.metrics.metric import MetricData
from cmbench.metrics.values import Estimate, normal_interval

#: ``exact(noise, labels)`` returns the exact images for unit noise.
ExactFlowMap = Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class FlowMapError:
    """Errors in units of the data's standard deviation; ``standard_error`` is of the mean."""

    mean: float
    maximum: float
    standard_error: float
    count: int


class FlowMapAccumulator:
    """Collects |g(z) - Φ(z)| / (sd √d) over images, one value per image.

    This is the root-mean-square error of an image's d coordinates in units of the data's standard
    deviation ``data_std`` (the root mean square over coordinates), float64.
    """

    def __init__(self, exact: ExactFlowMap, data_std: float) -> None:
        if not data_std > 0:
            raise UserError("flow-map error", f"data_std {data_std}", allowed="above 0")
        self.exact, self.data_std = exact, data_std
        self._errors: list[Tensor] = []

    def update(self, images: Tensor, noise: Tensor, labels: Tensor | None = None) -> None:
        """Add ``images`` ``[N, C, H, W]`` that the generator made of unit ``noise``."""
        difference = (images.double() - self.exact(noise, labels).double()).flatten(1)
        errors = difference.square().mean(1).sqrt() / self.data_std
        if not torch.isfinite(errors).all():
            raise NonFiniteError(
                "flow-map error", "NaN or infinite images", remedy="the generator diverged"
            )
        self._errors.append(errors.cpu())

    def result(self) -> FlowMapError:
        """Return mean, maximum and standard error over all images so far."""
        if not self._errors:
            raise UserError("flow-map error", "no samples", allowed="at least 1")
        errors = torch.cat(self._errors)
        spread = float(errors.std()) / math.sqrt(len(errors)) if len(errors) > 1 else math.nan
        return FlowMapError(float(errors.mean()), float(errors.max()), spread, len(errors))


def mean_error(data: MetricData) -> Estimate:
    """Return the mean error over images, in standard deviations of the data."""
    found: FlowMapError = data["flow map"]
    error = found.standard_error
    if not math.isfinite(error):  # of one image
        return Estimate(found.mean)
    return Estimate(found.mean, error, normal_interval(found.mean, error))


def largest_error(data: MetricData) -> Estimate:
    """Return the largest error of an image, in standard deviations of the data."""
    found: FlowMapError = data["flow map"]
    return Estimate(found.maximum)

"""Gaussian mixtures with closed-form density, score and denoiser: data without an unknown.

All arithmetic is float64, whatever the dtype of the arguments; results come back in the dtype of
``x``. Images ``[N, *shape]`` (``[2, 1, 1]`` for points in the plane), ``sigma`` ``[N]`` >= 0.
Everything but :meth:`GaussianMixture.flow_map` is differentiable in both modes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from cmbench.diffusion.frames import append_dims, predictions_to_velocity, sigma_to_t
from cmbench.diffusion.ode import integrate
from cmbench.errors import UserError


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """A mixture of ``K`` Gaussians with diagonal covariances.

    Attributes:
        means: ``[K, *shape]``.
        stds: ``[K]`` or ``[K, *shape]``, above zero.
        weights: ``[K]``, above zero; normalised on use.
        labels: int64 ``[K]``, the class of each component (every class of 0 … max has one), or
            None for data without classes.

    """

    means: Tensor
    stds: Tensor
    weights: Tensor
    labels: Tensor | None = None

    def __post_init__(self) -> None:
        """Check the parameters; raises UserError naming the one that is wrong."""
        count = self.means.shape[0]
        if self.weights.shape != (count,) or self.stds.shape not in ((count,), self.means.shape):
            raise UserError(
                "GaussianMixture",
                f"weights {tuple(self.weights.shape)} and stds {tuple(self.stds.shape)} do not fit "
                f"means {tuple(self.means.shape)}",
                allowed="weights [K], stds [K] or [K, *shape]",
                remedy="give every component one weight and its standard deviations",
            )
        if not (bool((self.stds > 0).all()) and bool((self.weights > 0).all())):
            raise UserError(
                "GaussianMixture",
                f"smallest std {self.stds.min():g}, smallest weight {self.weights.min():g}",
                allowed="values above 0",
                remedy="drop empty components; use a small std for points",
            )
        if self.labels is not None:
            used = sorted(set(self.labels.tolist()))
            if used != list(range(len(used))) or self.labels.shape != (count,):
                raise UserError(
                    "GaussianMixture",
                    f"component labels {self.labels.tolist()}",
                    allowed="one label per component, covering 0 … number of classes - 1",
                    remedy="renumber the labels",
                )

    # --- derived constants -----------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return tuple(self.means.shape[1:])

    @property
    def n_classes(self) -> int:
        """Number of classes, 0 for data without classes."""
        return 0 if self.labels is None else int(self.labels.max()) + 1

    @cached_property
    def _flat_means(self) -> Tensor:
        return self.means.double().flatten(1)

    @cached_property
    def _variances(self) -> Tensor:
        wide = append_dims(self.stds, self.means).expand_as(self.means)
        return wide.double().flatten(1).square()

    @cached_property
    def _shares_covariance(self) -> bool:
        return bool((self._variances == self._variances[0]).all())

    @cached_property
    def _log_weights(self) -> Tensor:
        """Log weights ``[n_classes + 1, K]``: one row per class, the last for all of them."""
        log_weights = torch.log_softmax(self.weights.double().log(), 0)
        if self.labels is None:
            return log_weights[None]
        classes = torch.arange(self.n_classes, device=self.labels.device)
        member = self.labels[None] == classes[:, None]
        conditional = torch.log_softmax(log_weights.masked_fill(~member, -math.inf), 1)
        return torch.cat([conditional, log_weights[None]])

    def to(self, device: torch.device | str) -> GaussianMixture:
        """Return the mixture with its parameters on ``device``."""
        labels = None if self.labels is None else self.labels.to(device)
        return GaussianMixture(
            self.means.to(device), self.stds.to(device), self.weights.to(device), labels
        )

    def mean(self) -> Tensor:
        """Return the mean of the data, float64 ``shape``."""
        return (self._log_weights[-1].exp() @ self._flat_means).reshape(self.shape)

    def variance(self) -> Tensor:
        """Return the variance of each value of the data, float64 ``shape``."""
        second = self._log_weights[-1].exp() @ (self._variances + self._flat_means**2)
        return second.reshape(self.shape) - self.mean() ** 2

    def data_std(self) -> float:
        """Return the root mean variance of a value: what ``sigma_data`` should be."""
        return float(self.variance().mean().sqrt())

    # --- closed forms ----------------------------------------------------------------------

    def _class_log_weights(self, labels: Tensor | None) -> Tensor:
        """Return log weights ``[K]``, or ``[N, K]`` with minus infinity outside the class."""
        if labels is None:
            return self._log_weights[-1]
        if self.labels is None:
            raise UserError(
                "GaussianMixture",
                "labels were given, but its components have none",
                allowed="labels=None",
                remedy="build the mixture with labels, or sample unconditionally",
            )
        return self._log_weights[labels]

    def _posterior(self, x: Tensor, sigma: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return ``E[m_k + s_k^2 u_k]`` and ``E[u_k]``, both ``[N, D]``.

        ``u_k = (x - m_k) / (s_k^2 + sigma^2)``; the expectation is over the component given ``x``.
        The first is the denoised data, minus the second the score.
        """
        flat, noise = x.double().flatten(1), sigma.double().reshape(-1, 1) ** 2
        log_weights = self._class_log_weights(labels)
        if self._shares_covariance:
            return self._shared_posterior(flat, noise, log_weights)
        difference = flat[:, None] - self._flat_means
        variance = self._variances + noise[:, :, None]
        shrunk = difference / variance
        mahalanobis = (difference * shrunk + torch.log(2 * math.pi * variance)).sum(2)
        joint = log_weights - mahalanobis / 2
        share = torch.softmax(joint, 1)[:, :, None]
        denoised = (share * (self._flat_means + self._variances * shrunk)).sum(1)
        return denoised, (share * shrunk).sum(1)

    def _shared_posterior(
        self, flat: Tensor, noise: Tensor, log_weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`_posterior` where all components have one covariance: products of matrices.

        Only ``x . m / v - m^2 / 2v`` tells components apart; ``E[u_k]`` is ``(x - E[m_k]) / v``.
        Coordinates are centred on the mean, so that the products do not cancel.
        """
        centre = self._log_weights[-1].exp() @ self._flat_means
        means, centred = self._flat_means - centre, flat - centre
        variance = self._variances[0] + noise
        scaled = centred / variance
        relative = scaled @ means.T - (means.square() @ (1 / variance).T).T / 2
        joint = log_weights + relative
        mean = torch.softmax(joint, 1) @ means
        shrunk = (centred - mean) / variance
        denoised = centre + mean + self._variances[0] * shrunk
        return denoised, shrunk

    def score(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return ``grad log p(x; sigma)``, ``[N, *shape]``."""
        return -self._posterior(x, sigma, labels)[1].reshape(x.shape).to(x.dtype)

    def predictions(
        self, x: Tensor, sigma: Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return ``(E[x0 | x], E[eps | x])`` of ``x = x0 + sigma eps``, exact down to sigma = 0.

        By Tweedie ``E[x0 | x] = x + sigma^2 score`` and ``E[eps | x] = -sigma score``; the first is
        written per component, so that it does not cancel.
        """
        denoised, shrunk = self._posterior(x, sigma, labels)
        epsilon = sigma.double().reshape(-1, 1) * shrunk
        return denoised.reshape(x.shape).to(x.dtype), epsilon.reshape(x.shape).to(x.dtype)

    def denoised(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the exact denoiser ``D(x, sigma) = E[x0 | x]``, shaped as ``x``."""
        return self.predictions(x, sigma, labels)[0]

    # --- samples and trajectories ----------------------------------------------------------

    def sample(
        self, n: int, generator: torch.Generator, *, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor | None]:
        """Return ``n`` samples ``[n, *shape]`` and their labels ``[n]`` (None without classes)."""
        device = self.means.device
        weights = self._log_weights[-1].exp()
        component = torch.multinomial(weights, n, replacement=True, generator=generator)
        noise = torch.randn(
            (n, *self.shape), generator=generator, dtype=torch.float64, device=device
        )
        stds = self._variances[component].sqrt().reshape(noise.shape)
        x = self.means.double()[component] + stds * noise
        return x.to(dtype), None if self.labels is None else self.labels[component]

    def flow_map(
        self,
        x_sigma: Tensor,
        sigma: Tensor,
        sigma_end: Tensor | float = 0.0,
        labels: Tensor | None = None,
        *,
        tolerance: float = 1e-12,
    ) -> Tensor:
        """Return where the PF-ODE ``dx/dsigma = (x - D) / sigma`` takes ``x_sigma``.

        From noise level ``sigma`` ``[N]`` to ``sigma_end`` (``[N]`` or one number, 0 included,
        above or below ``sigma``), to about 1e-10. Solved in TrigFlow time, in which the field
        is finite at both ends (arXiv:2410.11081, Sec. 3). No gradient flows through it.
        """
        scale = 0.5  # the time change's scale: any value gives the same map
        start = sigma.double().expand(x_sigma.shape[0])
        end = torch.as_tensor(sigma_end, dtype=torch.float64, device=x_sigma.device)
        end = end.expand(x_sigma.shape[0])

        def field(x_t: Tensor, t: Tensor, rows: Tensor) -> Tensor:
            chosen = None if labels is None else labels[rows]
            x = x_t / append_dims(torch.cos(t), x_t)
            denoised, epsilon = self.predictions(x, torch.tan(t) * scale, chosen)
            return predictions_to_velocity(t, denoised, epsilon, scale)

        def cosine(level: Tensor) -> Tensor:
            return append_dims(scale / torch.sqrt(level**2 + scale**2), x_sigma)

        x_t = integrate(
            field,
            cosine(start) * x_sigma.double(),
            sigma_to_t(start, scale),
            sigma_to_t(end, scale),
            tolerance=tolerance,
        )
        return (x_t / cosine(end)).to(x_sigma.dtype)


def ring_mixture(
    n_modes: int = 8, std: float = 0.1, data_std: float = 0.5, *, labelled: bool = True
) -> GaussianMixture:
    """Return equal modes on a circle in the plane, ``[2, 1, 1]``, with data std ``data_std``.

    ``std`` is each mode's own; the radius follows. Labels number the modes.
    """
    if not 0 < std < data_std:
        raise UserError(
            "ring_mixture",
            f"std {std:g}",
            allowed=f"0 < std < data_std = {data_std:g}",
            remedy="choose narrower modes or a wider ring",
        )
    radius = math.sqrt(2 * (data_std**2 - std**2))  # cos^2 and sin^2 average to 1/2
    angle = torch.arange(n_modes, dtype=torch.float64) * (2 * math.pi / n_modes)
    means = radius * torch.stack([torch.cos(angle), torch.sin(angle)], 1)
    return GaussianMixture(
        means=means.reshape(n_modes, 2, 1, 1),
        stds=torch.full((n_modes,), std, dtype=torch.float64),
        weights=torch.full((n_modes,), 1 / n_modes, dtype=torch.float64),
        labels=torch.arange(n_modes) if labelled else None,
    )


def image_mixture(
    n_classes: int = 10,
    size: int = 8,
    channels: int = 1,
    data_std: float = 0.5,
    *,
    modes_per_class: int = 2,
    labelled: bool = True,
) -> GaussianMixture:
    """Return images ``[channels, size, size]``: smooth gratings, one direction a class.

    The modes of a class are its grating at different phases. Each pixel's own std varies smoothly
    between a fifth and two fifths of ``data_std``; the gratings are scaled so that the data's std
    is ``data_std``. The mean image is not zero.
    """
    axis = (torch.arange(size, dtype=torch.float64) + 0.5) / size - 0.5
    row, column = torch.meshgrid(axis, axis, indexing="ij")
    templates, labels = [], []
    for label in range(n_classes):
        turn = math.pi * label / n_classes
        along = math.cos(turn) * row + math.sin(turn) * column
        frequency = 2 * math.pi * (0.8 + 0.4 * (label % 3))
        for mode in range(modes_per_class):
            shift = 2.0 * mode / modes_per_class + 0.3 * label
            phases = [shift + 0.5 * channel for channel in range(channels)]
            templates.append(torch.stack([torch.cos(frequency * along + p) for p in phases]))
            labels.append(label)
    means = torch.stack(templates)
    stds = data_std * (0.3 + 0.1 * torch.cos(math.pi * row) * torch.sin(math.pi * column))
    spread = means.var(0, correction=0).mean().sqrt()
    means = means * torch.sqrt(data_std**2 - stds.square().mean()) / spread
    count = len(labels)
    return GaussianMixture(
        means=means,
        stds=stds.expand(count, channels, size, size).clone(),
        weights=torch.full((count,), 1 / count, dtype=torch.float64),
        labels=torch.tensor(labels) if labelled else None,
    )

"""The exact consistency function of a mixture is a stationary point of the loss of methods that say
that they learn one.

The mixture lies on the line, where the flow is known; an image is several of its values. A method's
network is replaced by one whose consistency function is exact, plus ``delta`` times a bump. How the
method reads its network is found by probing its ``consistency_function``, which must be affine in
the network's output.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cmbench.diffusion.frames import append_dims
from cmbench.diffusion.models import MixtureModel
from cmbench.errors import Declined
from cmbench.networks.counted import CountedNetwork
from cmbench.plugin.method import (
    Batch,
    ConsistencyFunction,
    DataInfo,
    Method,
    Objective,
    Progress,
    Teacher,
)
from cmbench.sweep.runs import seeded
from cmbench.testing.case import Subject
from cmbench.testing.check import CheckFailure
from cmbench.testing.draws import RowDraws
from cmbench.testing.exact import SD, line_mixture, quantile_map
from cmbench.training.randomness import StepDraws

#: Images, each of independent values of the mixture, and the size of the bump. What a method does
#: to an image's norm moves its values less, the more there are (docs/unbiasedness.md).
COUNT, SIDE, BUMP = 1500, 4, 0.5
#: The largest mean gradient at the exact function, relative to those at the two bumps: what a
#: coarse grid of noise levels or a normalised tangent leaves (docs/unbiasedness.md).
BIAS = 0.1
#: In standard errors: what sampling leaves, and what a bump must at least show.
NOISE, SIGNAL = 4.0, 6.0
#: By how much images without noise may be changed.
IDENTITY = 0.05
#: A noise level of which an image keeps almost nothing.
HIGH = 50.0
#: The end of training: every curriculum and warm-up is over.
LAST = Progress(10**9 - 1, 10**9, 10**6 - 1, 10**6)
#: Noise levels at which a network's reading is probed.
PROBES = (0.01, 0.1, 1.0, 20.0)
#: What a network receives as noise level -> the noise level.
FRAMES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "ln(sigma) / 4": (lambda sigma: sigma.log() / 4, lambda c: torch.exp(4 * c)),
    "arctan(sigma / sigma_data)": (
        lambda sigma: torch.atan(sigma / SD),
        lambda c: SD * torch.tan(c),
    ),
}


class _Constant(nn.Module):
    """A network that returns one number and remembers what it was given."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value
        self.given: tuple[Tensor, Tensor] | None = None

    def forward(self, x_in: Tensor, c_noise: Tensor, *_: Any, **__: Any) -> Tensor:
        self.given = x_in, c_noise
        return torch.full_like(x_in, self.value)


@dataclass(frozen=True)
class Reading:
    """How a consistency function reads a network: from which input, as which output."""

    function: Callable[[nn.Module], ConsistencyFunction]
    sigma_of: Callable[[Tensor], Tensor]
    sigma_end: float

    def raw(self, x_in: Tensor, c_noise: Tensor) -> Tensor:
        """Return the network output whose consistency function is exact."""
        sigma = self.sigma_of(c_noise)
        x = x_in * append_dims(torch.sqrt(sigma**2 + SD**2), x_in)
        each = sigma.repeat_interleave(x[0].numel())
        exact = quantile_map(x.flatten(), each, self.sigma_end).reshape(x.shape)
        at_zero, at_one = (self.function(_Constant(v))(x, sigma, None) for v in (0.0, 1.0))
        slope = at_one - at_zero
        inside = slope.abs() > 1e-9  # at the boundary the output does not matter
        safe = torch.where(inside, slope, torch.ones_like(slope))
        return torch.where(inside, (exact - at_zero) / safe, torch.zeros_like(exact))


class ExactNetwork(nn.Module):
    """The exact network; with gradients plus ``delta`` per image times a smooth bump.

    So a target without gradient is exact and the student is off.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reading: Reading | None = None
        self.delta = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x_in: Tensor, c_noise: Tensor, *_: Any, **__: Any) -> Tensor:
        """Return the raw output ``[N, 1, H, W]``."""
        assert self.reading is not None
        raw = self.reading.raw(x_in, c_noise)
        if not torch.is_grad_enabled():
            return raw
        return raw + self.delta * torch.sin(1.3 * x_in + append_dims(c_noise, x_in) + 0.4)

    def forward_with_tangent(
        self, x: Tensor, c_noise: Tensor, dx: Tensor, dc_noise: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the output and its detached derivative."""
        with warnings.catch_warnings():  # torch's own, of torch.jit
            warnings.simplefilter("ignore", FutureWarning)
            tangent = torch.func.jvp(self.forward, (x, c_noise), (dx, dc_noise))[1]
        return self.forward(x, c_noise), tangent.detach()


class _EachValue(MixtureModel):
    """The exact teacher of images of independent values."""

    def __init__(self) -> None:
        super().__init__(line_mixture(), SD)

    def denoise(self, x_sigma: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return ``E[x0 | x_sigma]``."""
        return self._each(super().denoise, x_sigma, sigma)

    def velocity(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return ``E[dx_t/dt | x_t]``."""
        return self._each(super().velocity, x_t, t)

    @staticmethod
    def _each(function: Callable[[Tensor, Tensor], Tensor], x: Tensor, level: Tensor) -> Tensor:
        values = x.reshape(-1, 1, 1, 1)
        return function(values, level.repeat_interleave(x[0].numel())).reshape(x.shape)


class ExactKit:
    """Builds exact networks (see :class:`cmbench.plugin.method.Kit`)."""

    def __init__(self, teacher: Teacher | None) -> None:
        self.teacher = teacher
        self.networks: list[ExactNetwork] = []

    def network(self, **_: Any) -> ExactNetwork:
        """Return an exact network."""
        self.networks.append(ExactNetwork())
        return self.networks[-1]

    def student(self, parameterization: str, **_: Any) -> ExactNetwork:
        """Return an exact network."""
        return self.network()


def reading_of(method: Method, nets: dict[str, Any]) -> Reading | str:
    """Return how the method's consistency function reads its network, or why that is not known."""

    def function(network: nn.Module) -> ConsistencyFunction:
        probed = {n: network if isinstance(m, ExactNetwork) else m for n, m in nets.items()}
        return method.consistency_function(probed)

    sigma = torch.tensor(PROBES, dtype=torch.float64)
    x = torch.full((len(PROBES), 1, 1, 1), 0.7, dtype=torch.float64)
    probes = [_Constant(value) for value in (0.0, 1.0, 2.0)]
    out = [function(probe)(x, sigma, None) for probe in probes]
    if probes[0].given is None or not torch.allclose(out[2], 2 * out[1] - out[0]):
        return "its consistency function is not affine in the network's output"
    x_in, c_noise = probes[0].given
    if x_in.shape != x.shape:
        return "its network is given a part of the images"
    if not torch.allclose(x_in, x / append_dims(torch.sqrt(sigma**2 + SD**2), x)):
        return "its network's input is not x / sqrt(sigma^2 + sigma_data^2)"
    for forward, backward in FRAMES.values():
        if torch.allclose(forward(sigma), c_noise):
            return Reading(function, backward, _boundary(function))
    return f"its network's noise input is none of {', '.join(FRAMES)}"


def _boundary(function: Callable[[nn.Module], ConsistencyFunction]) -> float:
    """Return the noise level at which the network's output does not matter."""

    def slope(sigma: float) -> float:
        x, level = torch.zeros(1, 1, 1, 1).double(), torch.tensor([sigma], dtype=torch.float64)
        at_zero, at_one = (function(_Constant(v))(x, level, None) for v in (0.0, 1.0))
        return float(at_one - at_zero)

    low, high = 1e-8, 0.1
    if (slope(low) > 0) == (slope(high) > 0):
        return 0.0
    for _ in range(60):
        middle = (low + high) / 2
        same_side = (slope(middle) > 0) == (slope(high) > 0)
        low, high = (low, middle) if same_side else (middle, high)
    return (low + high) / 2


def gradient_at(
    delta: float, objective: Objective, nets: dict[str, Any], network: ExactNetwork, batch: Batch
) -> Tensor:
    """Return each image's derivative of the loss with respect to the bump, ``[N]``."""
    size = (len(batch.images), 1, 1, 1)
    network.delta = nn.Parameter(torch.full(size, delta, dtype=torch.float64))
    loss = objective.loss(nets, batch, StepDraws(0, 0), LAST)
    (found,) = torch.autograd.grad(loss.sum(), network.delta)
    return found.flatten()


def require_frame(subject: Subject) -> str | None:
    """Raise unless the function keeps clean images and denoises noise; say if there is none."""
    case = subject.case()
    try:
        function = case.method.consistency_function(case.nets)
    except Declined:
        return "the method has no consistency function"
    batch = case.batch()
    with torch.no_grad():
        found = function(batch.images, torch.full((case.batch_size,), 1e-6), batch.labels)
    gap = float((found - batch.images).abs().max())
    if not gap < IDENTITY:
        raise CheckFailure(
            f"consistency_function changes images at the noise level 1e-6 by up to {gap:.2g}",
            "take x = x0 + sigma z and sigma of EDM's frame, and return x where sigma is zero",
        )
    noise = RowDraws(range(case.batch_size)).normal("noise", batch.images)
    with torch.no_grad():
        found = function(HIGH * noise, torch.full((case.batch_size,), HIGH), batch.labels)
    size = float(found.abs().mean())
    if not size < HIGH / 5:
        raise CheckFailure(
            f"consistency_function leaves values of size {size:.2g} at the noise level {HIGH:g}",
            "take sigma of EDM's frame, not the time that the network is trained with",
        )
    return None


def deviations(subject: Subject) -> tuple[list[Tensor], str]:
    """Return the gradients at -BUMP, 0 and BUMP per image; or why there are none."""
    plan = subject.plan(conditional=False)
    data = DataInfo(subject.dataset, (1, SIDE, SIDE), 0, SD, bounded=False)
    method = plan.method_class(plan.config.model_copy(update={"sigma_data": SD}), data)
    kit = ExactKit(Teacher("exact", _EachValue(), None) if plan.teacher is not None else None)
    with seeded(0, "modules"):
        nets: dict[str, Any] = dict(method.modules(kit))
    reading = reading_of(method, nets)
    if isinstance(reading, str):
        return [], reading
    for network in kit.networks:
        network.reading = reading
    objectives = [o for o in method.phases(nets)[-1].objectives if "model" in o.trains]
    generator, shape = torch.Generator().manual_seed(0), (COUNT, *data.data_shape)
    values, _ = line_mixture().sample(math.prod(shape), generator, dtype=torch.float64)
    x0 = values.reshape(shape)
    counted = {name: CountedNetwork(module.double()) for name, module in nets.items()}
    model, batch = nets["model"], Batch(x0, None, indices=torch.arange(COUNT))
    found = [
        sum(gradient_at(delta, o, counted, model, batch) for o in objectives)
        for delta in (-BUMP, 0.0, BUMP)
    ]
    return [torch.as_tensor(values) for values in found], ""


def stationary(subject: Subject) -> str | None:
    """The exact consistency function is a stationary point of the loss, and others are not."""
    if (none := require_frame(subject)) is not None:
        return none
    found, reason = deviations(subject)
    if reason:
        return reason
    means = [float(values.mean()) for values in found]
    errors = [float(values.std() / len(values) ** 0.5) for values in found]
    signal = (abs(means[0]) + abs(means[2])) / 2
    shown = ", ".join(f"{mean:.3g}" for mean in means)
    if max(abs(means[0]) / errors[0], abs(means[2]) / errors[2]) < SIGNAL:
        raise CheckFailure(
            f"the loss has no gradient ({shown}) where its consistency function is wrong",
            "let the loss depend on consistency_function, or raise Declined there",
        )
    if abs(means[1]) > max(NOISE * errors[1], BIAS * signal):
        raise CheckFailure(
            f"the loss moves away from the exact consistency function: its gradient there is "
            f"{means[1]:.3g}, at deviations of -{BUMP:g}, 0, {BUMP:g} it is {shown}",
            "compare the loss with the paper, or raise Declined in consistency_function",
        )
    return None

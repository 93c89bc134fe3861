"""Measure where consistency training and consistency distillation have the same gradient.

Writes ``docs/unbiasedness.md``, its plots and ``measured.json``; every number on the page comes
from here. Expectations are exact: given a noisy point, the clean data of a Gaussian mixture are a
Gaussian mixture, integrated by Gauss-Hermite quadrature. Losses are those of the plugins, through
the interface that training uses.

    python docs/unbiasedness/measure.py            # about a minute on one CPU core
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cmbench.diffusion.frames import append_dims
from cmbench.diffusion.gaussian_mixture import GaussianMixture, ring_mixture
from cmbench.diffusion.grids import karras_sigmas
from cmbench.diffusion.models import MixtureModel
from cmbench.networks.config import MLPConfig
from cmbench.networks.counted import CountedNetwork
from cmbench.networks.mlp import MLP
from cmbench.plugin.method import Batch, DataInfo, Method, Progress, Teacher
from cmbench_plugins.cct import CCT
from cmbench_plugins.cm import CD, CT
from cmbench_plugins.scm import SCD, SCT

SD = 0.5
#: Intervals of the coarsest grid; the others halve them, so that all contain its noise levels.
COARSEST = 16
HERE = Path(__file__).parent


@dataclass(frozen=True)
class FixedDraws:
    """Randomness chosen by name (see :class:`cmbench.plugin.method.Draws`)."""

    values: Mapping[str, Tensor]

    def normal(self, name: str, like: Tensor) -> Tensor:
        """Return the chosen numbers."""
        return self.values[name].to(like).reshape(like.shape)

    uniform = normal


# --- the exact expectation -----------------------------------------------------------------------


@dataclass(frozen=True)
class Points:
    """Noisy points with everything that the clean data behind them can be.

    ``x`` ``[P, D, 1, 1]`` at ``sigma`` ``[P]``; ``clean`` ``[P, Q, D, 1, 1]`` with ``weights``
    ``[P, Q]`` that sum to one: a quadrature rule for ``E[. | x]``. ``index`` numbers the noise
    levels of the coarsest grid.
    """

    x: Tensor
    sigma: Tensor
    index: Tensor
    clean: Tensor
    weights: Tensor

    def all(self, values: Tensor) -> Tensor:
        """Repeat one value a point for every node: ``[P, ...]`` to ``[P Q, ...]``."""
        return values.repeat_interleave(self.weights.shape[1], 0)

    @property
    def images(self) -> Tensor:
        """All nodes ``[P Q, D, 1, 1]``."""
        return self.clean.flatten(0, 1)

    @property
    def noise(self) -> Tensor:
        """The unit noise that leads from each node to its point."""
        return (self.all(self.x) - self.images) / append_dims(self.all(self.sigma), self.images)


def posterior(
    mixture: GaussianMixture, x: Tensor, sigma: Tensor, order: int = 10
) -> tuple[Tensor, Tensor]:
    """Return nodes ``[P, Q, D, 1, 1]`` and weights ``[P, Q]`` of ``p(x0 | x)``, exact for
    polynomials of degree ``2 order - 1`` times each component's Gaussian.
    """
    means, dims = mixture.means.double().flatten(1), mixture.means[0].numel()
    stds = append_dims(mixture.stds.double(), mixture.means).expand_as(mixture.means).flatten(1)
    flat, level = x.flatten(1)[:, None], sigma[:, None, None]
    noisy = stds**2 + level**2
    distance = ((flat - means) ** 2 / noisy + noisy.log()).sum(2)
    share = torch.softmax(mixture.weights.double().log() - distance / 2, 1)
    gain = stds**2 / noisy
    centre, spread = means + gain * (flat - means), torch.sqrt(gain) * level
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(order))
    weights = weights / weights.sum()
    grid = torch.cartesian_prod(*[nodes] * dims).reshape(-1, dims)
    rule = torch.cartesian_prod(*[weights] * dims).reshape(-1, dims).prod(1)
    clean = centre[:, :, None] + spread[:, :, None] * grid
    total = share[:, :, None] * rule
    return clean.flatten(1, 2)[..., None, None], total.flatten(1)


def make_points(mixture: GaussianMixture, order: int, seed: int = 0) -> Points:
    """Return four points at each of six noise levels of the coarsest grid."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.tensor([4, 6, 7, 8, 10, 12]).repeat_interleave(4)
    sigma = karras_sigmas(COARSEST + 1)[index]
    x0, _ = mixture.sample(len(index), generator, dtype=torch.float64)
    unit = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    x = x0 + append_dims(sigma, x0) * unit
    return Points(x, sigma, index, *posterior(mixture, x, sigma, order))


# --- gradients of the plugins' losses ------------------------------------------------------------


def network(seed: int = 0) -> MLP:
    """Return a random smooth network in float64."""
    torch.manual_seed(seed)
    made = MLP(MLPConfig(width=32, blocks=2, embedding_dim=16), (2, 1, 1), 0).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made


def trained(steps: int = 200, mu: float = 0.95) -> tuple[MLP, MLP]:
    """Return a student after some steps of CT and the target that its own rule let lag behind.

    ``mu`` is reached by CT's schedule at N = 17 from ``mu0 = mu^(17 / 2)``.
    """
    model, target = network(), network()
    method = make(CT, s0=2, s1=COARSEST, mu0=mu ** ((COARSEST + 1) / 2))
    nets: dict[str, Any] = {"model": CountedNetwork(model), "target": CountedNetwork(target)}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(3)
    place = Progress(1, 1, 1, 1)
    for _ in range(steps):
        x0, _ = ring_mixture().sample(256, generator, dtype=torch.float64)
        draws = FixedDraws(
            {
                "index": torch.rand(256, generator=generator, dtype=torch.float64),
                "noise": torch.randn(x0.shape, generator=generator, dtype=torch.float64),
            }
        )
        optimizer.zero_grad()
        method.loss(nets, Batch(x0, None), draws, place).mean().backward()
        optimizer.step()
        with torch.no_grad():
            method.after_step(nets, place)
    return model, target


def distance(model: MLP, target: MLP) -> float:
    """Return ``||theta^- - theta|| / ||theta||`` over all weights."""
    vectors = [torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (target, model)]
    return relative(*vectors)


def make(method: type[Method], teacher: Any = None, **config: Any) -> Any:
    """Return a plugin's method on 2-D data."""
    table = {"network": {"name": "mlp"}, "duration_kimg": 1.0, **config}
    made: Any = method(method.Config(**table), DataInfo("ring", (2, 1, 1), 0, SD, bounded=False))
    made.teacher = Teacher("exact", teacher, None) if teacher is not None else None
    return made


def gradient(
    model: MLP, loss: Callable[[dict[str, Any]], Tensor], weights: Tensor, target: MLP | None = None
) -> Tensor:
    """Return the gradient of the weighted sum of a loss, all parameters in one vector."""
    nets: dict[str, Any] = {"model": CountedNetwork(model)}
    if target is not None:
        nets["target"] = CountedNetwork(target)
    found = torch.autograd.grad((weights * loss(nets)).sum(), list(model.parameters()))
    return torch.cat([g.flatten() for g in found])


def relative(ours: Tensor, reference: Tensor) -> float:
    """Return ``||ours - reference|| / ||reference||``."""
    return float((ours - reference).norm() / reference.norm())


class Laboratory:
    """The mixture, the points, a network, and gradients of every kind."""

    def __init__(self, order: int = 10, model: MLP | None = None) -> None:
        self.mixture = ring_mixture()
        self.exact = MixtureModel(self.mixture, SD)
        self.points = make_points(self.mixture, order)
        self.model = network() if model is None else model

    def discrete(
        self, kind: str, halvings: int, *, target: nn.Module | None = None, **config: Any
    ) -> Tensor:
        """Return ``E[grad loss / step]`` of ``"ct"`` or ``"cd"`` on ``16 2^halvings`` intervals.

        Divided by the step in sigma, the limit of a fine grid is a gradient of its own.
        """
        p, fine = self.points, 2**halvings
        intervals = COARSEST * fine
        grid = karras_sigmas(intervals + 1)
        step = p.sigma - grid[p.index * fine - 1]
        u = (p.index * fine - 0.5) / intervals
        if kind == "cd":
            method = make(CD, self.exact, n_points=intervals + 1, **config)
            images, weights = p.clean[:, 0], 1 / step  # any image that leads to x
            noise = (p.x - images) / append_dims(p.sigma, p.x)
            place = Progress(0, 1, 0, 1)
        else:
            method = make(CT, s0=2, s1=intervals, **config)
            images, noise, u = p.images, p.noise, p.all(u)
            weights = (p.weights / step[:, None]).flatten()
            place = Progress(0, 1, 1, 1)  # the end of the curriculum: all levels
        draws = FixedDraws({"index": u, "noise": noise})
        batch = Batch(images, None)
        return gradient(
            self.model,
            lambda nets: method.loss(nets, batch, draws, place),
            weights,
            target,  # type: ignore[arg-type]
        )

    def continuous(self, form: str) -> Tensor:
        """Return ``E[grad]`` of the continuous objective, scaled as the limit of l2's."""
        p = self.points
        method = make(CCT, self.exact, form=form)
        low, high = 0.002 ** (1 / 7), 80.0 ** (1 / 7)
        u = (p.sigma ** (1 / 7) - low) / (high - low)
        scale = 2 / p.x[0].numel()  # of a mean of squares
        if form == "distillation":
            images = p.clean[:, 0]
            noise, weights = (p.x - images) / append_dims(p.sigma, p.x), torch.ones_like(u)
        else:
            images, noise, u, weights = p.images, p.noise, p.all(u), p.weights.flatten()
        draws, batch = FixedDraws({"sigma": u, "noise": noise}), Batch(images, None)
        place = Progress(0, 1, 0, 1)
        return gradient(
            self.model, lambda nets: method.loss(nets, batch, draws, place), scale * weights
        )

    def trigflow(self, kind: str, **config: Any) -> Tensor:
        """Return ``E[grad]`` of ``"sct"`` or ``"scd"`` at the same points."""
        p = self.points
        config = {"adaptive_weighting": False, "warmup_steps": 0, **config}
        method = make(SCD if kind == "scd" else SCT, self.exact, **config)
        normal = (p.sigma.log() - method.config.p_mean) / method.config.p_std
        if kind == "scd":
            images = p.clean[:, 0]
            noise, weights = (p.x - images) / append_dims(p.sigma, p.x), torch.ones_like(normal)
        else:
            images, noise = p.images, p.noise
            normal, weights = p.all(normal), p.weights.flatten()
        draws, batch = FixedDraws({"time": normal, "noise": noise}), Batch(images, None)
        place = Progress(0, 1, 0, 1)
        return gradient(self.model, lambda nets: method.loss(nets, batch, draws, place), weights)

    def check_points(self) -> float:
        """Return the largest error of ``E[x0 | x]`` by quadrature."""
        p = self.points
        mean = (p.weights[..., None, None, None] * p.clean).sum(1)
        return float((mean - self.mixture.denoised(p.x, p.sigma)).abs().max())


# --- what is measured ----------------------------------------------------------------------------


def slope(intervals: list[int], values: list[float]) -> float:
    """Return the slope of a line through the logarithms."""
    return float(np.polyfit(np.log(intervals), np.log(values), 1)[0])


def measure(halvings: int = 7, order: int = 10) -> dict[str, Any]:
    """Measure everything on the page."""
    lab = Laboratory(order)
    intervals = [COARSEST * 2**k for k in range(halvings)]
    consistency = lab.continuous("distillation")
    model, target = trained()
    behind = Laboratory(order, model)
    goal = behind.continuous("distillation")
    series: dict[str, list[float]] = {
        name: [] for name in ("ct-cd", "ct-cd-huber", "mu0-limit", "lag-limit", "lag-ct-cd")
    }
    for k in range(halvings):
        ct, cd = lab.discrete("ct", k), lab.discrete("cd", k)
        series["ct-cd"].append(relative(ct, cd))
        huber = {"metric": "pseudo-huber", "huber_c": 0.03}
        series["ct-cd-huber"].append(
            relative(lab.discrete("ct", k, **huber), lab.discrete("cd", k, **huber))
        )
        series["mu0-limit"].append(relative(ct, consistency))
        lag_ct, lag_cd = (behind.discrete(kind, k, target=target) for kind in ("ct", "cd"))
        series["lag-limit"].append(relative(lag_ct, goal))
        series["lag-ct-cd"].append(relative(lag_ct, lag_cd))
    tangents = {}
    for name in ("raw", "clip", "normalize"):
        sct, scd = lab.trigflow("sct", tangent=name), lab.trigflow("scd", tangent=name)
        cosine = float(torch.cosine_similarity(sct, scd, dim=0))
        tangents[name] = {"relative": relative(sct, scd), "cosine": cosine}
    return {
        "intervals": intervals,
        "series": series,
        "slopes": {name: slope(intervals[2:], values[2:]) for name, values in series.items()},
        "continuous-2023": relative(lab.continuous("training"), consistency),
        "tangents": tangents,
        "lag": distance(model, target),
        "quadrature-error": lab.check_points(),
    }


# --- the page ------------------------------------------------------------------------------------


def plot(measured: dict[str, Any], path: Path, names: dict[str, str], title: str) -> None:
    """Draw series against the number of intervals, both axes logarithmic."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "cmbench"
    figure, axes = plt.subplots(figsize=(5.6, 3.6), layout="constrained")
    for (name, label), marker in zip(names.items(), "osd^", strict=False):
        axes.loglog(measured["intervals"], measured["series"][name], marker=marker, label=label)
    axes.set_xlabel("intervals N - 1")
    axes.set_ylabel("relative difference of gradients")
    axes.set_title(title, fontsize=10)
    axes.grid(True, which="both", alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def page(m: dict[str, Any]) -> str:
    """Return the page with the measured numbers filled in."""
    first, last = m["intervals"][0], m["intervals"][-1]
    rows = {n: (values[0], values[-1], m["slopes"][n]) for n, values in m["series"].items()}

    def row(title: str, name: str) -> str:
        a, b, s = rows[name]
        return f"| {title} | {a:.3g} | {b:.3g} | {s:+.2f} |"

    template = (HERE / "page.md.in").read_text(encoding="utf-8")
    return template.format(
        first=first,
        last=last,
        lag=100 * m["lag"],
        quadrature=f"{m['quadrature-error']:.1g}",
        table="\n".join(
            [
                row("CT against CD, squared l2, mu = 0", "ct-cd"),
                row("CT against CD, pseudo-Huber, mu = 0", "ct-cd-huber"),
                row("CT against the consistency gradient, mu = 0", "mu0-limit"),
                row("CT with a lagging target against the consistency gradient", "lag-limit"),
                row("CT against CD, both with that lagging target", "lag-ct-cd"),
            ]
        ),
        continuous=f"{m['continuous-2023']:.1e}",
        tangents="\n".join(
            f"| {name} | {v['relative']:.2g} | {v['cosine']:.4f} |"
            for name, v in m["tangents"].items()
        ),
        growth=f"{rows['lag-limit'][1]:.0f}",
    )


def main() -> None:
    """Measure, plot, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--halvings", type=int, default=7)
    measured = measure(parser.parse_args().halvings)
    (HERE / "measured.json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    plot(
        measured,
        HERE / "ct-cd.svg",
        {"ct-cd": "squared l2, mu = 0", "ct-cd-huber": "pseudo-Huber, mu = 0"},
        "CT's expected gradient against CD's",
    )
    plot(
        measured,
        HERE / "target.svg",
        {"mu0-limit": "mu = 0", "lag-limit": f"target lagging by {measured['lag']:.1%}"},
        "CT's expected gradient against the consistency gradient",
    )
    (HERE.parent / "unbiasedness.md").write_text(page(measured), encoding="utf-8")
    print(json.dumps({k: v for k, v in measured.items() if k != "series"}, indent=1))


if __name__ == "__main__":
    main()

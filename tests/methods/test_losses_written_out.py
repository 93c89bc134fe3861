"""Each plugin's loss against its paper's formula, written out here in numbers once more.

The exact-solution tests say where a loss is least; these say what it is elsewhere: weights,
proposals, constants, signs. Nothing of cmbench.diffusion is used for the expected values.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from method_kit import FixedDraws, exact_teacher
from pydantic import ValidationError
from torch import Tensor, nn

from cmbench.diffusion.gaussian_mixture import ring_mixture
from cmbench.diffusion.models import MixtureModel
from cmbench.networks.config import MLPConfig
from cmbench.networks.counted import CountedNetwork
from cmbench.networks.mlp import MLP
from cmbench.plugin.method import Batch, DataInfo, Progress
from cmbench.training.loop import project_weights
from cmbench_plugins.cct import CCT
from cmbench_plugins.cm import CD, CT
from cmbench_plugins.ect import ECT
from cmbench_plugins.edm import EDM
from cmbench_plugins.ict import ICT
from cmbench_plugins.pd import PD
from cmbench_plugins.scm import SCD, SCT

SD, LOW, HIGH = 0.5, 0.002, 80.0
COUNT = 64


def make(method: Any, **config: Any) -> Any:
    table = {"network": {"name": "mlp"}, "duration_kimg": 1.0, **config}
    made = method(method.Config(**table), DataInfo("ring", (2, 1, 1), 0, SD, bounded=False))
    made.teacher = made.first_teacher = exact_teacher(MixtureModel(ring_mixture(), SD))
    return made


def network() -> Any:
    """A random smooth network in float64, with the tangent that training uses."""
    torch.manual_seed(0)
    made = MLP(MLPConfig(width=16, blocks=1, embedding_dim=8), (2, 1, 1), 0).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return CountedNetwork(made)


def data(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return images, unit noise, unit normal and uniform numbers."""
    generator = torch.Generator().manual_seed(seed)
    x0, noise = torch.randn((2, COUNT, 2, 1, 1), generator=generator, dtype=torch.float64)
    normal = torch.randn(COUNT, generator=generator, dtype=torch.float64)
    uniform = torch.rand(COUNT, generator=generator, dtype=torch.float64)
    return 0.5 * x0, noise, normal, uniform


def wide(values: Tensor) -> Tensor:
    return values.reshape(-1, 1, 1, 1)


def f(raw: Any, x: Tensor, sigma: Tensor, low: float = LOW) -> Tensor:
    """``c_skip x + c_out F(c_in x, ln(sigma) / 4)`` (Song et al. 2023, App. C)."""
    s = wide(sigma)
    skip = SD**2 / ((s - low) ** 2 + SD**2)
    out = SD * (s - low) / (s**2 + SD**2).sqrt()
    result: Tensor = skip * x + out * raw(x / (s**2 + SD**2).sqrt(), sigma.log() / 4)
    return result


def karras(count: int) -> Tensor:
    i = torch.arange(count, dtype=torch.float64) / (count - 1)
    return (LOW ** (1 / 7) + i * (HIGH ** (1 / 7) - LOW ** (1 / 7))) ** 7


def huber(a: Tensor, b: Tensor, c: float) -> Tensor:
    return ((a - b).square().flatten(1).sum(1) + c * c).sqrt() - c


def near(ours: Tensor, expected: Tensor, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(ours.detach(), expected.detach(), rtol=rtol, atol=1e-14)


# --- diffusion -----------------------------------------------------------------------------------


@pytest.mark.parametrize("parameterization", ["edm", "trigflow"])
def test_edm_with_edm2s_log_variance(parameterization: str) -> None:
    """``sum over values of w e^2 / exp(u) + u`` (EDM2, Eq. 14 to 16); u one layer of unit norm."""
    x0, z, n, _ = data()
    made = make(EDM, logvar_channels=6, parameterization=parameterization, p_mean=-0.8, p_std=1.6)
    plain = make(EDM, parameterization=parameterization, p_mean=-0.8, p_std=1.6)
    raw = network()
    kit: Any = type("Kit", (), {"network": lambda self, **_: nn.Linear(1, 1)})()
    head: Any = made.build(kit)["logvar"].double()
    assert "logvar" not in plain.build(kit)
    nets = {"model": raw, "logvar": CountedNetwork(head)}
    assert made.trained_modules(nets) == ("model", "logvar")

    sigma = (-0.8 + 1.6 * n).exp()
    w = head.linear.weight[0]
    features = math.sqrt(2) * torch.cos(
        (sigma.log() / 4)[:, None] * head.fourier.freqs + head.fourier.phases
    )
    u = features @ (w / (1e-4 * math.sqrt(6) + w.norm()))
    drawn = FixedDraws({"sigma": n, "noise": z})
    batch, progress = Batch(x0, None), Progress(1, 1, 1, 1)
    error = plain.loss({"model": raw}, batch, drawn, progress)
    if parameterization == "edm":
        root = (wide(sigma) ** 2 + SD**2).sqrt()
        inner = raw((x0 + wide(sigma) * z) / root, sigma.log() / 4)
        target = (x0 - SD**2 / root**2 * (x0 + wide(sigma) * z)) / (wide(sigma) * SD / root)
        near(error, (inner - target).square().flatten(1).sum(1), 1e-7)
    loss = made.loss(nets, batch, drawn, progress)
    near(loss, error / u.exp() + 2 * u, 1e-6)
    torch.testing.assert_close(progress.scalars["logvar"], u.mean().detach().float())
    # Both learn, and the head's weights go back to their constraint.
    loss.sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in head.parameters())
    with torch.no_grad():
        head.linear.weight.mul_(3.0)
    project_weights(head)
    assert float(head.linear.weight.detach().square().mean()) == pytest.approx(1.0, abs=1e-3)


# --- pairs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("s1", [4, 16])
def test_ict(s1: int) -> None:
    """Table 1 of iCT: proposal of intervals, weight 1 / gap, c = 0.00054 sqrt(d)."""
    x0, z, _, u = data()
    raw, made = network(), make(ICT, s0=2, s1=s1)
    grid = karras(s1 + 1)
    edge = torch.erf((grid.log() + 1.1) / (math.sqrt(2) * 2.0))
    chance = (edge[1:] - edge[:-1]) / (edge[-1] - edge[0])
    i = torch.tensor([int((chance.cumsum(0) <= value).sum()) for value in u])
    small, large = grid[i], grid[i + 1]
    student, target = (f(raw, x0 + wide(s) * z, s) for s in (large, small))
    expected = huber(student, target, 0.00054 * math.sqrt(2)) / (large - small)
    drawn = FixedDraws({"index": u, "noise": z})
    near(made.loss({"model": raw}, Batch(x0, None), drawn, Progress(1, 1, 99, 100)), expected)
    assert len(set(i.tolist())) > s1 // 3


@pytest.mark.parametrize("metric", ["l2", "l1", "pseudo-huber"])
def test_ct_distances(metric: str) -> None:
    """Uniform intervals, weight 1; a mean over values for l2 and l1."""
    x0, z, _, u = data()
    raw, made = network(), make(CT, s0=2, s1=7, mu0=0.0, metric=metric)
    grid = karras(8)
    i = (u * 7).floor().long()
    a, b = (f(raw, x0 + wide(grid[i + k]) * z, grid[i + k]) for k in (1, 0))
    expected = {
        "l2": (a - b).square().flatten(1).mean(1),
        "l1": (a - b).abs().flatten(1).mean(1),
        "pseudo-huber": huber(a, b, 0.00054 * math.sqrt(2)),
    }[metric]
    drawn = FixedDraws({"index": u, "noise": z})
    near(made.loss({"model": raw}, Batch(x0, None), drawn, Progress(1, 1, 1, 1)), expected)


@pytest.mark.parametrize(("method", "config"), [(CD, {"target_ema": 0.8}), (CT, {"mu0": 0.8})])
def test_target_network_keeps_mu_of_itself(method: Any, config: dict[str, Any]) -> None:
    """``theta^- <- mu theta^- + (1 - mu) theta``; CT: mu = exp(s0 ln mu0 / N), N = 151 at last."""
    made = make(method, **config)
    nets: Any = {"model": nn.Linear(2, 2), "target": nn.Linear(2, 2)}
    with torch.no_grad():
        for name, value in (("model", 1.0), ("target", 0.0)):
            for parameter in nets[name].parameters():
                parameter.fill_(value)
    with torch.no_grad():  # as the engine calls it
        made.after_step(nets, Progress(1, 1, 1, 1))
    mu = 0.8 if method is CD else 0.8 ** (2 / 151)
    for parameter in nets["target"].parameters():
        torch.testing.assert_close(parameter, torch.full_like(parameter, 1 - mu))
    assert all(bool((p == 1).all()) for p in nets["model"].parameters())


@pytest.mark.parametrize("weighting", ["inverse-gap", "edm"])
def test_ect(weighting: str) -> None:
    """``r = t (1 - n(t) / q^(s+1))`` at stage 3 of 8, n(t) = 1 + 8 sigmoid(-t)."""
    x0, z, normal, _ = data()
    raw, made = network(), make(ECT, weighting=weighting, huber_c=0.05)
    t = torch.exp(-1.1 + 2.0 * normal)
    r = (t * (1 - (1 + 8 * torch.sigmoid(-t)) / 2**4)).clamp_min(0)
    student = f(raw, x0 + wide(t) * z, t, 0.0)
    target = torch.where(wide(r) > 0, f(raw, x0 + wide(r) * z, r.clamp_min(1e-9), 0.0), x0)
    weight = 1 / (t - r) if weighting == "inverse-gap" else (t**2 + SD**2) / (t * SD) ** 2
    drawn = FixedDraws({"sigma": normal, "noise": z})
    loss = made.loss({"model": raw}, Batch(x0, None), drawn, Progress(3, 8, 3, 8))
    near(loss, weight * huber(student, target, 0.05))


@pytest.mark.parametrize(
    ("method", "config", "left"),
    [(ECT, {}, 0.0), (CD, {}, LOW), (ICT, {}, LOW)],
    ids=["ect", "cd", "ict"],
)
def test_noise_added_before_the_second_step(method: Any, config: Any, left: float) -> None:
    """``x = f + sqrt(sigma^2 - eps^2) z``; ECT adds the full ``sigma z``."""
    seen: list[Tensor] = []

    class Zero(nn.Module):
        def forward(self, x_in: Tensor, c_noise: Tensor, labels: Any = None) -> Tensor:
            seen.append(x_in)
            return torch.zeros_like(x_in)

    made = make(method, clip_samples=False, **config)
    _, z, _, _ = data()
    plan = made.plan_sampling(2, sigmas=(80.0, 0.4))
    made.sample({"model": Zero()}, z, None, plan, FixedDraws({"step-1": z, "step-0": z}))
    low = made.config.sigma_min
    first = SD**2 / ((80.0 - low) ** 2 + SD**2) * 80.0 * z
    expected = (first + math.sqrt(0.4**2 - left**2) * z) / math.sqrt(0.4**2 + SD**2)
    near(seen[1], expected)


# --- progressive distillation --------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["truncated-snr", "snr+1"])
def test_pd_weights(weighting: str) -> None:
    """A squared error of x under max(SNR, 1) or SNR + 1, SNR = 1 / sigma^2 of unit data."""
    x0, z, _, u = data()
    made = make(PD, start_steps=8, weighting=weighting)

    class Reading:
        def __init__(self, shift: float) -> None:
            self.shift = shift

        def denoise(self, x: Tensor, sigma: Tensor, labels: Any = None) -> Tensor:
            return torch.full_like(x, 0.3 + self.shift)

    made.model = lambda network: Reading(0.2)
    made.teacher_model = lambda steps, nets: Reading(0.0)
    drawn = FixedDraws({"index": u, "noise": z})
    loss = made.stage_loss(4, {"model": None}, Batch(x0, None), drawn)
    snr = karras(9)[2 * (1 + (u * 4).floor().long())] ** -2
    weight = snr.clamp_min(1) if weighting == "truncated-snr" else snr + 1
    near(loss, weight * 0.2**2)


# --- continuous time -----------------------------------------------------------------------------


def trig_f(raw: Any, x_t: Tensor, t: Tensor) -> Tensor:
    """``cos t x - sin t sd F(x / sd, t)`` (Lu & Song 2024, Eq. 6)."""
    result: Tensor = wide(t.cos()) * x_t - wide(t.sin()) * SD * raw(x_t / SD, t)
    return result


def scm_case(method: Any, **config: Any) -> tuple[Any, Any, Tensor, Tensor, Batch, FixedDraws]:
    """Return method, network, ``t``, the exact ``g = cos t df/dt``, a batch and its draws."""
    x0, z, normal, _ = data()
    made, raw = make(method, warmup_steps=0, **config), network()
    sigma = torch.exp(-1.0 + 1.4 * normal.clamp(-2.5, 2.5))
    t = torch.atan(sigma / SD)
    x_t = wide(t.cos()) * x0 + wide(t.sin()) * SD * z
    slope = wide(t.cos()) * SD * z - wide(t.sin()) * x0
    if method is SCD:
        slope = made.teacher.model.velocity(x_t, t, None)
    h = 1e-5
    ahead, behind = (trig_f(raw, x_t + k * slope, t + k) for k in (h, -h))
    g = (wide(t.cos()) * (ahead - behind) / (2 * h)).detach()
    drawn = FixedDraws({"time": normal.clamp(-2.5, 2.5), "noise": z})
    return made, raw, t, g, Batch(x0, None), drawn


@pytest.mark.parametrize("method", [SCT, SCD])
@pytest.mark.parametrize(
    ("tangent", "c", "norm"),
    [("normalize", 0.1, "l2"), ("normalize", 0.7, "rms"), ("clip", 0.1, "l2"), ("raw", 0.1, "l2")],
)
def test_scm_loss_and_the_way_it_pulls(method: Any, tangent: str, c: float, norm: str) -> None:
    """``e^w / D ||g||^2 - w``, and descent moves F along +g: f against its own derivative."""
    made, raw, t, g, batch, drawn = scm_case(
        method, tangent=tangent, tangent_c=c, tangent_norm=norm
    )
    if tangent == "normalize":
        size = g.flatten(1).norm(dim=1) / (math.sqrt(2) if norm == "rms" else 1)
        g = g / (wide(size) + c)
    elif tangent == "clip":
        g = g.clamp(-1, 1)
    push = torch.zeros_like(g, requires_grad=True)

    class Pushed:
        """The network with a graded constant added to its output."""

        def forward_with_tangent(self, *inputs: Any, **options: Any) -> tuple[Tensor, Tensor]:
            F, dF = raw.forward_with_tangent(*inputs, **options)
            return F + push, dF

    w = torch.full_like(t, 0.4)
    nets: Any = {"model": Pushed(), "weight": lambda t: w}
    loss = made.loss(nets, batch, drawn, Progress(1, 1, 1, 1))
    near(loss, math.exp(0.4) / 2 * g.square().flatten(1).sum(1) - 0.4, 1e-5)
    (found,) = torch.autograd.grad(loss.sum(), push)
    torch.testing.assert_close(found, -math.exp(0.4) * g, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", [SCT, SCD])
def test_scm_logs_the_tangents_size_by_thirds_of_time(method: Any) -> None:
    """The tangent's root mean square before it is bounded, over all images and by thirds of t."""
    made, raw, t, g, batch, drawn = scm_case(method, tangent="normalize", tangent_c=0.1)
    nets: Any = {"model": raw, "weight": torch.zeros_like}
    progress = Progress(1, 1, 1, 1)
    made.loss(nets, batch, drawn, progress)
    size = g.square().flatten(1).mean(1).sqrt()
    near(progress.scalars["tangent_norm"], size.mean().float(), 1e-4)
    edges = (0.0, math.pi / 6, math.pi / 3, math.pi / 2)
    found = [progress.scalars[f"tangent_norm_{n}_t"] for n in ("small", "middle", "large")]
    for low, high, logged in zip(edges, edges[1:], found, strict=False):
        here = (t >= low) & (t < high)
        assert 8 < int(here.sum()) < COUNT / 2 + 8
        near(logged, size[here].mean().float(), 1e-4)
    assert len({round(float(value), 2) for value in found}) == 3


def test_thirds_of_time_have_their_borders_and_an_empty_one_is_zero() -> None:
    made, progress, step = make(SCT), Progress(1, 1, 1, 1), 1e-6
    t = torch.tensor([math.pi / 6 - step, math.pi / 6 + step, math.pi / 2], dtype=torch.float64)
    g = wide(torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)).expand(-1, 2, 1, 1)
    made.log_tangent(progress, g, t)
    names = [f"tangent_norm_{n}_t" for n in ("small", "middle", "large")]
    assert [float(progress.scalars[name]) for name in names] == [1.0, 2.0, 4.0]
    made.log_tangent(progress, g[:1], t[2:])
    assert [float(progress.scalars[name]) for name in names] == [0.0, 0.0, 1.0]


@pytest.mark.parametrize("form", ["training", "distillation"])
def test_cct_pulls_along_its_derivative(form: str) -> None:
    """The gradient with respect to f is df/dsigma along the trajectory (Theorems 5 and 6)."""
    x0, z, _, u = data()
    made, raw = make(CCT, form=form), network()
    sigma = (LOW ** (1 / 7) + u * (HIGH ** (1 / 7) - LOW ** (1 / 7))) ** 7
    x = x0 + wide(sigma) * z
    origin = x0 if form == "training" else made.teacher.model.denoise(x, sigma, None)
    slope = (x - origin) / wide(sigma)
    h = sigma * 1e-5
    ahead, behind = (f(raw, x + wide(k) * slope, sigma + k) for k in (h, -h))
    derivative = ((ahead - behind) / (2 * wide(h))).detach()
    push = torch.zeros_like(x, requires_grad=True)

    class Pushed:
        def forward_with_tangent(self, *inputs: Any, **options: Any) -> tuple[Tensor, Tensor]:
            F, dF = raw.forward_with_tangent(*inputs, **options)
            return F + push, dF

    drawn = FixedDraws({"sigma": u, "noise": z})
    loss = made.loss({"model": Pushed()}, Batch(x0, None), drawn, Progress(1, 1, 1, 1))
    (found,) = torch.autograd.grad(loss.sum(), push)
    out = wide(SD * (sigma - LOW) / (sigma**2 + SD**2).sqrt())
    torch.testing.assert_close(found, out * derivative, rtol=1e-4, atol=1e-7)


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "allowed"), [(CT, "s0 <= s1 [+] 1"), (ICT, "s0 <= s1")])
def test_curricula_that_fall_are_refused_before_training(method: Any, allowed: str) -> None:
    with pytest.raises(ValidationError, match=rf"s0 20, s1 5.*{allowed}"):
        make(method, s0=20, s1=5)

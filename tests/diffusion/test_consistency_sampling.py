"""Multistep sampling of consistency functions in both frames."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cmbench.diffusion.consistency_sampling import multistep_consistency, multistep_trigflow
from cmbench.diffusion.frames import sigma_to_t
from cmbench.diffusion.gaussian_mixture import GaussianMixture
from cmbench.diffusion.models import TrigFlowConsistency, TrigFlowModel
from cmbench.errors import UserError

Network = Callable[..., Tensor]


class Recorder:
    """A consistency function that remembers its inputs."""

    def __init__(self) -> None:
        self.inputs: list[tuple[Tensor, Tensor]] = []

    def __call__(self, x: Tensor, time: Tensor, labels: Tensor | None) -> Tensor:
        assert time.shape == (x.shape[0],)
        assert time.dtype == x.dtype
        self.inputs.append((x, time))
        return x / 2


def noises(shape: tuple[int, ...]) -> Callable[[int], Tensor]:
    return lambda step: torch.randn(
        shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64
    )


@pytest.mark.parametrize("n", [1, 2, 3])
def test_evaluations_and_added_noise(n: int) -> None:
    sigmas = torch.tensor([80.0, 0.821, 0.1], dtype=torch.float64)[:n]
    shape = (2, 1, 2, 2)
    noise, recorder = torch.ones(shape, dtype=torch.float64), Recorder()
    end = multistep_consistency(
        recorder, noise, sigmas, sigma_min=0.002, noise_sampler=noises(shape)
    )
    assert len(recorder.inputs) == n
    expected = noise * 80
    for i, (x, time) in enumerate(recorder.inputs):
        if i > 0:
            added = math.sqrt(sigmas[i].item() ** 2 - 0.002**2)
            expected = expected / 2 + added * noises(shape)(i)
        torch.testing.assert_close(x, expected)
        assert bool((time == sigmas[i]).all())
    torch.testing.assert_close(end, expected / 2)


def test_the_boundary_level_adds_no_noise() -> None:
    """The official code ends its list of times there: an evaluation that changes nothing."""
    recorder = Recorder()
    noise = torch.ones((1, 1, 1, 1), dtype=torch.float64)
    sigmas = torch.tensor([80.0, 0.002], dtype=torch.float64)
    multistep_consistency(
        recorder, noise, sigmas, sigma_min=0.002, noise_sampler=lambda step: noise * 1e6
    )
    assert torch.equal(recorder.inputs[1][0], noise * 40)


def test_one_step_needs_no_noise_sampler_and_keeps_float32() -> None:
    noise = torch.ones((2, 1, 1, 1))
    times = torch.tensor([1.5], dtype=torch.float64)
    end = multistep_consistency(Recorder(), noise, times, sigma_min=0.002)
    assert end.dtype == torch.float32
    assert multistep_trigflow(Recorder(), noise, times, 0.5).dtype == torch.float32
    with pytest.raises(UserError, match="pass noise_sampler"):
        multistep_consistency(Recorder(), noise, times.repeat(2), sigma_min=0.002)


def test_clipping_is_asked_for() -> None:
    noise = torch.ones((1, 1, 1, 1))
    sigmas = torch.tensor([80.0])
    assert multistep_consistency(Recorder(), noise, sigmas, sigma_min=0.0).item() == 40
    assert multistep_consistency(Recorder(), noise, sigmas, sigma_min=0.0, clip=True).item() == 1
    times = torch.tensor([1.5])
    assert multistep_trigflow(Recorder(), 9 * noise, times, 0.5, clip=True).item() == 1


def test_both_frames_draw_the_same_images(student: Network, generator: torch.Generator) -> None:
    sd, sigmas = 0.7, torch.tensor([80.0, 1.2, 0.3], dtype=torch.float64)
    times = sigma_to_t(sigmas, sd)
    noise = torch.randn((3, 2, 2, 2), generator=generator, dtype=torch.float64)
    sampler = noises((3, 2, 2, 2))
    edm = multistep_consistency(
        TrigFlowModel(student, sd).denoise, noise, sigmas, sigma_min=0.0, noise_sampler=sampler
    )
    # TrigFlow starts from sd z instead of sin(t_max) sd z.
    trig = multistep_trigflow(
        TrigFlowConsistency(student, sd),
        noise * torch.sin(times[0]),
        times,
        sd,
        noise_sampler=sampler,
    )
    torch.testing.assert_close(trig, edm, rtol=0, atol=1e-11)


def test_exact_consistency_function_samples_the_data(
    ring: GaussianMixture, generator: torch.Generator
) -> None:
    """One step and two: the moments of the data, within their standard errors."""
    n = 1500
    noise, again = (
        torch.randn((n, 2, 1, 1), generator=generator, dtype=torch.float64) for _ in range(2)
    )

    def exact(x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        return ring.flow_map(x, sigma, 0.0, labels)

    for sigmas in ([80.0], [80.0, 0.821]):
        x = multistep_consistency(
            exact,
            noise,
            torch.tensor(sigmas, dtype=torch.float64),
            sigma_min=0.0,
            noise_sampler=lambda step: again,
        ).flatten(1)
        for power in (1, 2, 4):
            moment = x**power
            truth = ring.sample(400_000, torch.Generator().manual_seed(1), dtype=torch.float64)[0]
            expected = (truth.flatten(1) ** power).mean(0)
            error = moment.std(0) / math.sqrt(n)
            assert bool(((moment.mean(0) - expected).abs() < 4.5 * error).all())

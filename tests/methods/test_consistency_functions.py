"""Consistency functions as public objects: one frame, one evaluation, the method's own sample."""

from __future__ import annotations

import pytest
import torch
from method_kit import build, context

from cmbench.errors import Declined
from cmbench.plugin.method import DataInfo
from cmbench.sampling import ImageDraws

HAVE_ONE = ("cct", "cd", "ct", "ect", "ict", "ict-deep", "mscd", "scd", "sct", "tract")


@pytest.mark.parametrize("name", sorted(context().plugins.methods.specs))
@pytest.mark.parametrize("conditional", [False, True])
def test_one_step_of_sampling_is_the_consistency_function(name: str, conditional: bool) -> None:
    case = build(name, conditional=conditional)
    method, nets = case.method, case.nets
    if name not in HAVE_ONE:
        with pytest.raises(Declined, match="has no consistency function"):
            method.consistency_function(nets)
        return
    method.data = DataInfo("test", method.data.data_shape, method.data.num_classes, 0.5, False)
    plan = method.plan_sampling(1)
    draws = ImageDraws(0, range(3))
    noise = draws.normal("noise", torch.empty(3, *method.data.data_shape))
    labels = torch.arange(3) if conditional else None
    with torch.no_grad():
        expected = method.sample(nets, noise, labels, plan, draws)
        before = nets["model"].evaluations
        level = torch.full((3,), plan.sigmas[0])
        found = method.consistency_function(nets)(plan.sigmas[0] * noise, level, labels)
    assert nets["model"].evaluations - before == 3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "parameterization"),
    [*((name, "edm") for name in HAVE_ONE), ("sct", "trigflow"), ("scd", "trigflow")],
)
def test_it_returns_images_without_noise_as_they_are(name: str, parameterization: str) -> None:
    options = {}
    if name in ("sct", "scd"):
        teacher = "edm:smoke" if parameterization == "edm" else "edm:trigflow-smoke"
        options = {"parameterization": parameterization, "teacher": teacher}
    case = build(name, **options)
    images = case.batch(3).images
    with torch.no_grad():
        found = case.method.consistency_function(case.nets)(images, torch.full((3,), 1e-6), None)
    torch.testing.assert_close(found, images, rtol=0, atol=0.02)


def test_a_flow_map_is_declined_by_methods_without_one() -> None:
    case = build("sct")
    with pytest.raises(Declined, match="SCT has no flow map"):
        case.method.flow_map(case.nets)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("tract", {"steps": (40, 2)}, "TRACT from 40 steps ends with a student of 2 steps"),
        ("mscd", {"segments": (4, 2)}, "ends with a student of 2 steps, not of one"),
        ("tract", {"parameterization": "x"}, "does not keep images without noise"),
    ],
)
def test_students_of_jumps_without_a_consistency_function(
    name: str, options: dict[str, object], reason: str
) -> None:
    case = build(name, "gmm", teacher="analytic", **options)
    with pytest.raises(Declined, match=reason):
        case.method.consistency_function(case.nets)

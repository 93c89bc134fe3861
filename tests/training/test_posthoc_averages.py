"""Averages reconstructed after training, against profiles, and against averages that were kept."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import weakref
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_outcome import Outcome
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from scipy.integrate import quad
from test_trainer import BATCH, Feed, Given, Net, phase
from torch import nn

from cmbench.errors import InterruptedRunError, UserError
from cmbench.plugin.config import EMAConfig
from cmbench.plugin.method import Phase
from cmbench.sweep.context import Context
from cmbench.sweep.planning import plan_run
from cmbench.sweep.plans import RunPlan
from cmbench.sweep.runs import TrainedRun, build_modules, load_weights
from cmbench.sweep.training_run import obtain_run
from cmbench.training import posthoc
from cmbench.training.checkpoint import Checkpoint, load_checkpoint
from cmbench.training.ema import WeightAverage, power_exponent
from cmbench.training.loop import Trainer
from cmbench.training.posthoc import (
    Profile,
    asked_width,
    coefficients,
    combine,
    inner_products,
    reconstruct,
)
from cmbench.training.settings import Settings, Watchers
from cmbench.training.state import TrainingState

WIDTHS = st.floats(0.03, 0.25)


def value(profile: Profile, at: float) -> float:
    gamma = power_exponent(profile.sigma_rel)
    if at > profile.nimg:
        return 0.0
    return (gamma + 1) * at**gamma / profile.nimg ** (gamma + 1)


@given(a=WIDTHS, b=WIDTHS, s=st.floats(0.3, 1.0), t=st.floats(0.3, 1.0))
def test_inner_products_are_integrals(a: float, b: float, s: float, t: float) -> None:
    one, other = Profile(a, s), Profile(b, t)
    expected = quad(lambda at: value(one, at) * value(other, at), 0, min(s, t))[0]
    assert inner_products([one], [other])[0, 0] == pytest.approx(expected, rel=1e-6, abs=1e-9)


def stored(count: int) -> list[Profile]:
    return [Profile(w, 1000.0 * (i + 1)) for i in range(count) for w in (0.05, 0.10)]


@pytest.mark.parametrize("which", [0, 7, 15])
def test_a_stored_profile_is_itself(which: int) -> None:
    profiles = stored(8)
    factors, error = coefficients(profiles, profiles[which])
    assert error < 1e-6
    np.testing.assert_allclose(factors, np.eye(16)[which], atol=1e-5)


@given(width=st.floats(0.045, 0.15))
def test_the_stated_error_is_the_distance_of_the_profiles(width: float) -> None:
    profiles, wanted = stored(6), Profile(width, 6000.0)
    factors, error = coefficients(profiles, wanted)

    def missed(at: float) -> float:
        made = sum(f * value(p, at) for f, p in zip(factors, profiles, strict=True))
        return abs(made - value(wanted, at))

    breaks = [1000.0 * i for i in range(7)]
    total = sum(quad(missed, a, b, limit=200)[0] for a, b in pairwise(breaks))
    assert error == pytest.approx(total, rel=1e-3, abs=1e-7)
    assert sum(factors) == pytest.approx(1.0, abs=1e-12)


def test_more_snapshots_miss_less() -> None:
    errors = [
        coefficients([Profile(p.sigma_rel, p.nimg / n) for p in stored(n)], Profile(0.15, 1000.0))[
            1
        ]
        for n in (2, 4, 8, 16)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.02


@pytest.mark.parametrize(
    ("count", "width", "most", "without_sum"),
    [(8, 0.075, 3e-4, 1e-3), (3, 0.12, 4e-3, 2e-2), (16, 0.06, 3e-5, 6e-5), (8, 0.12, 3e-4, 1e-3)],
)
def test_against_an_average_that_was_tracked(
    count: int, width: float, most: float, without_sum: float
) -> None:
    """Weights that walk away from a start that is far from zero, as those of networks do."""
    module = nn.Linear(64, 1, bias=False).double()
    random = torch.Generator().manual_seed(0)
    steps = 4096 // count * count
    with torch.no_grad():
        module.weight.copy_(torch.randn(1, 64, generator=random, dtype=torch.float64))
    kept = {w: WeightAverage(EMAConfig(sigma_rel=w), module) for w in (0.05, 0.10)}
    direct = WeightAverage(EMAConfig(sigma_rel=width), module)
    profiles: list[Profile] = []
    averages: list[dict[str, torch.Tensor]] = []
    path: list[torch.Tensor] = []
    for step in range(1, steps + 1):
        with torch.no_grad():
            move = torch.randn(1, 64, generator=random, dtype=torch.float64)
            module.weight += move * 0.1 / math.sqrt(steps)
        path.append(module.weight.detach().clone())
        for average in (*kept.values(), direct):
            average.update(batch_size=1, nimg=step)
        if step % (steps // count) == 0:
            for w, average in kept.items():
                profiles.append(Profile(w, step))
                averages.append({k: v.clone() for k, v in average.parameters().items()})
    factors, error = coefficients(profiles, Profile(width, steps))
    (found,) = combine(averages, factors.tolist()).values()
    expected = direct.average[0]
    missed = float((found - expected).norm())
    assert missed < most * float(expected.norm())
    # From any fixed point: the end of the path is one, zero is another.
    for fixed in (path[-1], torch.zeros(1, 64, dtype=torch.float64)):
        farthest = max(float((weights - fixed).norm()) for weights in path)
        assert missed <= error * farthest
    # Coefficients that miss the sum of one would scale all that the averages share.
    raw = np.linalg.lstsq(
        inner_products(profiles, profiles),
        inner_products(profiles, [Profile(width, steps)])[:, 0],
        rcond=None,
    )[0]
    (scaled,) = combine(averages, raw.tolist()).values()
    assert float((scaled - expected).norm()) > max(missed, without_sum * float(expected.norm()))


@pytest.mark.parametrize(
    ("label", "width"),
    [
        ("power-0.08", 0.08),
        ("power-.1", 0.1),
        ("power-0.28", None),
        ("power-0.3", None),
        ("power-0", None),
        ("raw", None),
        ("power-0.1x", None),
        ("halflife-500kimg", None),
    ],
)
def test_labels(label: str, width: float | None) -> None:
    assert asked_width(label) == width


def test_sums_are_in_float64_and_come_back_in_their_own_dtype() -> None:
    """In float32, 1e9 - 999999999 is 0 or 64."""
    averages = [{"w": torch.tensor([1.0]), "half": torch.tensor([1.0]).half()} for _ in range(2)]
    found = combine(averages, [1e9, -999_999_999.0])
    assert found["w"].item() == 1.0
    assert (found["w"].dtype, found["half"].dtype) == (torch.float32, torch.float16)
    with pytest.raises(ValueError, match="longer"):
        combine(averages, [1.0])


def snapshots_of(folder: Path, *phases: Phase, at: int = 2 * BATCH) -> list[str]:
    """The names of the snapshots of a training that writes one at ``at`` images, and one before."""
    state = TrainingState(Given(*phases), {"model": Net()})
    state.enter(0)
    posthoc.save_snapshot(folder, state)
    watchers = Watchers(
        should_stop=lambda: "told" if state.seen_nimg >= at else None,
        checkpoint=lambda state: posthoc.save_snapshot(folder, state),
    )
    Trainer(state, Feed(), Settings(3, BATCH), watchers).train()
    return sorted(path.name for path in folder.glob("*.safetensors"))


POWER = {"ema": (EMAConfig(sigma_rel=0.1), EMAConfig(decay=0.9))}


def test_a_snapshot_holds_power_averages_of_the_last_phase_once_it_has_begun(
    tmp_path: Path,
) -> None:
    whole = phase(images=4 * BATCH, **POWER)
    assert snapshots_of(tmp_path / "one", whole) == [f"{2 * BATCH:014d}.safetensors"]
    found = load_checkpoint(tmp_path / "one" / f"{2 * BATCH:014d}.safetensors")
    assert found.tensors.keys() == {"power-0.1/model.weight"}
    assert found.meta == {
        "run": "",
        "nimg": 2 * BATCH,
        "seen_nimg": 2 * BATCH,
        "sigma_rel": {"power-0.1": 0.1},
    }
    assert snapshots_of(tmp_path / "none", phase(images=4 * BATCH)) == []
    first = phase(images=4 * BATCH, name="first", **POWER)
    assert snapshots_of(tmp_path / "first", first, whole) == []
    later = snapshots_of(tmp_path / "last", first, whole, at=5 * BATCH)
    assert later == [f"{BATCH:014d}.safetensors"]


# ---- through runs --------------------------------------------------------------------------------


def planned(context: Context, widths: Sequence[float], **more: Any) -> RunPlan:
    table = {
        "ema": [{"sigma_rel": w} for w in widths],
        "duration_kimg": 4.096,
        "checkpoint_kimg": 0.512,
        "optimizer": {"lr": 0.02},
        **more,
    }
    return plan_run(context, "toy", "toys", "demo", 0, table)


def loaded(context: Context, trained: TrainedRun, label: str) -> dict[str, torch.Tensor]:
    _, modules = build_modules(context, trained.plan, None)
    load_weights(trained.weights(), nn.ModuleDict(modules), label)
    return {k: v.clone() for k, v in modules["model"].state_dict().items()}


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float((one[k] - other[k]).square().sum()) for k in one))


def test_a_run_gives_widths_that_it_did_not_keep(toys: Context) -> None:
    trained = obtain_run(toys, planned(toys, [0.05, 0.10]))
    reference = obtain_run(toys, planned(toys, [0.05, 0.08, 0.10]))
    assert len(list((trained.folder / "snapshots").glob("*.safetensors"))) == 8
    expected = loaded(toys, reference, "power-0.08")
    found = loaded(toys, trained, "power-0.08")
    nearest = min(distance(loaded(toys, trained, w), expected) for w in ("power-0.05", "power-0.1"))
    assert 0 < distance(found, expected) < 0.1 * nearest
    again, _ = reconstruct(trained.folder / "snapshots", 0.05)
    kept = loaded(toys, trained, "power-0.05")
    assert all(torch.allclose(again[f"model.{k}"], kept[k], rtol=0, atol=1e-5) for k in kept)


def test_snapshots_of_another_run_are_refused(toys: Context) -> None:
    trained = obtain_run(toys, planned(toys, [0.05, 0.10]))
    other = obtain_run(toys, planned(toys, [0.05, 0.10], batch_size=16))
    assert other.folder != trained.folder
    for file in (other.folder / "snapshots").iterdir():
        shutil.copy(file, trained.folder / "snapshots" / file.name)
    words = rf"snapshots of another run: {other.plan.run_id}; allowed: {trained.plan.run_id}; "
    with pytest.raises(UserError, match=words):
        loaded(toys, trained, "power-0.08")


def test_snapshots_are_in_memory_one_at_a_time(
    toys: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = obtain_run(toys, planned(toys, [0.05, 0.10], duration_kimg=2.048)).folder / "snapshots"
    more = len(list(folder.glob("*.safetensors")))
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0
    load = posthoc.load_checkpoint

    def counting(path: Path, remedy: str) -> Checkpoint:
        nonlocal most
        found = load(path, remedy)
        alive.append(weakref.ref(next(iter(found.tensors.values()))))
        most = max(most, sum(ref() is not None for ref in alive))
        return found

    monkeypatch.setattr(posthoc, "load_checkpoint", counting)
    reconstruct(folder, 0.08)
    assert len(alive) == more > 1
    assert most <= 2, "the next one is read before the last one is let go"


def test_a_stop_leaves_no_other_snapshots(toys: Context) -> None:
    plan = planned(toys, [0.05, 0.10], duration_kimg=0.64, checkpoint_kimg=0.128)
    whole = obtain_run(toys, plan).folder / "snapshots"
    there = {p.name: load_file(p) for p in whole.glob("*.safetensors")}
    elsewhere = Context(
        toys.plugins,
        type(toys.workspace)(toys.workspace.root / "other"),
        threads=1,
        device=toys.device,
    )
    asked = iter([None] * 6)
    elsewhere.should_stop = lambda: next(asked, "stopped")
    with pytest.raises(InterruptedRunError):
        obtain_run(elsewhere, plan)
    elsewhere.should_stop = lambda: None
    folder = obtain_run(elsewhere, plan).folder / "snapshots"
    assert {p.name for p in folder.glob("*.safetensors")} == set(there)
    for name, tensors in there.items():
        assert all(torch.equal(v, load_file(folder / name)[k]) for k, v in tensors.items())


def test_a_width_that_snapshots_do_not_determine_is_refused(toys: Context) -> None:
    trained = obtain_run(toys, planned(toys, [0.10], checkpoint_kimg=2.048))
    with pytest.raises(
        UserError, match=r"power-0\.02 of .*: 2 stored averages determine it to \d+% only"
    ):
        loaded(toys, trained, "power-0.02")


def test_missing_snapshots_are_one_line(toys: Context) -> None:
    trained = obtain_run(toys, planned(toys, [0.05, 0.10], duration_kimg=0.128))
    for file in (trained.folder / "snapshots").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="no snapshots to reconstruct it from"):
        loaded(toys, trained, "power-0.07")


def test_an_average_of_an_earlier_moment_is_refused(toys: Context) -> None:
    trained = obtain_run(toys, planned(toys, [0.05, 0.10], duration_kimg=2.048))
    newest = max((trained.folder / "snapshots").glob("*.safetensors"))
    newest.unlink()
    with pytest.raises(UserError, match="newest snapshot has seen 1536 images, the weights 2048"):
        loaded(toys, trained, "power-0.07")
    loaded(toys, trained, "power-0.05")  # kept: needs no snapshot


def test_on_the_command_line(cmbench_with_toys: Callable[..., Outcome], tmp_path: Path) -> None:
    toy = (
        "run",
        "-m",
        "toy",
        "-d",
        "toys",
        "--nfe",
        "1",
        "--samples",
        "16",
        "--no-report",
        "-q",
        "-w",
        str(tmp_path / "w"),
    )
    keeps = ("-o", "ema=[{sigma_rel=0.05},{sigma_rel=0.1}]")
    for label in ("power-0.05", "power-0.07", "power-.07"):
        done = cmbench_with_toys(*toy, *keeps, "--ema", label)
        assert done.code == 0, done.err
    records = [json.loads(p.read_text()) for p in (tmp_path / "w").glob("records/toys/*.json")]
    assert len(records) == 2
    training = {r["training"]["ema"]: r["training"] for r in records}
    assert training["power-0.05"]["snapshots"] == {}, "this one was kept"
    files = (tmp_path / "w").glob("runs/toys/*/snapshots/*.safetensors")
    hashes = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    assert training["power-0.07"]["snapshots"] == hashes
    assert len(hashes) == 4
    assert len(list((tmp_path / "w").glob("runs/toys/*/result.json"))) == 1
    refused = cmbench_with_toys(*toy, "--ema", "power-0.07")
    assert "--ema: 'power-0.07' is not kept by this run" in refused.err


def test_verify_checks_the_snapshots(
    cmbench_with_toys: Callable[..., Outcome], tmp_path: Path
) -> None:
    place = ("-w", str(tmp_path))
    cmbench_with_toys(
        "run",
        "-m",
        "toy",
        "-d",
        "toys",
        "--nfe",
        "1",
        "--samples",
        "16",
        "-q",
        "--no-report",
        "-o",
        "ema=[{sigma_rel=0.05},{sigma_rel=0.1}]",
        "--ema",
        "power-0.07",
        *place,
    )
    (record,) = tmp_path.glob("records/toys/*.json")

    def verified() -> Outcome:
        return cmbench_with_toys("verify", str(record), "--full", *place)

    sound = verified()
    assert sound.code == 0, sound.out
    assert "ok           snapshots: 4 of the hashes that the record holds" in sound.out
    assert "ok           metric fd-pixels" in sound.out
    snapshots = sorted(tmp_path.glob("runs/toys/*/snapshots/*.safetensors"))
    content = snapshots[0].read_bytes()
    snapshots[0].write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    spoilt = verified()
    assert spoilt.code == 1
    assert f"failed       snapshots: of another hash: {snapshots[0].name}" in spoilt.out
    snapshots[0].unlink()
    lost = verified()
    assert "not checked  snapshots: 1 of 4 are not here" in lost.out
    assert "failed       metric" not in lost.out


def test_averages_of_several_kinds_at_once(toys: Context) -> None:
    kinds = [{"halflife_kimg": 0.1}, {"decay": 0.97}, {"sigma_rel": 0.1}]
    labels = ["halflife-0.1kimg", "decay-0.97", "power-0.1"]
    short = {"duration_kimg": 0.32}
    together = obtain_run(toys, planned(toys, [], ema=kinds, **short))
    for kind, label in zip(kinds, labels, strict=True):
        alone = loaded(toys, obtain_run(toys, planned(toys, [], ema=[kind], **short)), label)
        found = loaded(toys, together, label)
        assert all(torch.equal(alone[k], found[k]) for k in alone)

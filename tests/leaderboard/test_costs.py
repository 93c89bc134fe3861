"""Costs of rows: means, Pareto fronts, and that hardware is never mixed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from record_factory import on_disk, record

from cmbench.leaderboard.costs import (
    COSTS,
    cost_charts,
    hardware_of,
    mean_cost,
    pareto_front,
    training_evaluations,
    training_hours,
)
from cmbench.leaderboard.rows import Row, aggregate
from cmbench.records.cost import DecoderCost, SamplingCost, TeacherCost
from cmbench.records.folders import read_records
from cmbench.records.record import Record, read_record
from cmbench.report.page import build_page
from cmbench.report.payload import page_payload

KINDS = {kind.key: kind for kind in COSTS}
OF_HARDWARE = {"latency_ms", "ms_per_image", "memory_mib", "decoder_ms", "training_h"}


def costing(item: Record, hardware: str = "GPU A", latency_s: float = 0.01, **more: Any) -> Record:
    cost = SamplingCost(
        hardware=hardware,
        latency_s=latency_s,
        latency_range_s=(latency_s / 2, latency_s * 2),
        latency_repetitions=5,
        throughput_images_per_s=500.0,
        throughput_batch_size=64,
        flops_per_image=2e9,
        peak_memory_bytes=3 * 2**20,
        decoder=DecoderCost(parameters=10, flops_per_image=1e9, latency_s=0.002),
    ).model_copy(update=more)
    environment = item.environment.model_copy(update={"gpu": hardware})
    return item.model_copy(update={"cost": cost, "environment": environment})


def rows_of(*items: Record) -> list[Row]:
    return aggregate((Path(f"{i}.json"), item) for i, item in enumerate(items))


def test_costs_of_a_row_are_means_over_its_records() -> None:
    (row,) = rows_of(
        costing(record("alpha", seed=0)), costing(record("alpha", seed=1), latency_s=0.03)
    )
    found = {key: mean_cost(row, kind) for key, kind in KINDS.items()}
    assert found["latency_ms"] == (pytest.approx(20.0), "GPU A")
    assert found["ms_per_image"] == (2.0, "GPU A")
    assert found["memory_mib"] == (3.0, "GPU A")
    assert found["decoder_ms"] == (2.0, "GPU A")
    assert found["flops"] == (3e9, ""), "the decoder's too"
    assert hardware_of(row) == "GPU A"
    assert {key for key, kind in KINDS.items() if kind.hardware} == OF_HARDWARE


def test_seeds_on_several_hardware_have_no_mean_time() -> None:
    (row,) = rows_of(
        costing(record("alpha", seed=0), "GPU A"), costing(record("alpha", seed=1), "GPU B")
    )
    for key in OF_HARDWARE:
        assert mean_cost(row, KINDS[key]) is None
    assert mean_cost(row, KINDS["flops"]) == (3e9, "")
    assert hardware_of(row) == "GPU A, GPU B"
    page = build_page("digits", [(Path("a"), r) for _, r in row.cells], None, {}, "")
    texts = {c.key: page.lines[0].cells[i].text for i, c in enumerate(page.columns)}
    assert {texts[key] for key in OF_HARDWARE} == {"several machines"}


def test_charts_never_mix_hardware() -> None:
    items = [
        costing(record(method, seed=seed), hardware, latency)
        for method, hardware, latency in (
            ("alpha", "GPU A", 0.01),
            ("beta", "GPU A", 0.02),
            ("gamma", "GPU B", 0.001),
            ("delta", "GPU B", 0.002),
        )
        for seed in range(2)
    ]
    charts = cost_charts(rows_of(*items), items[0].rank_metric)
    by_id = {row.id: row for row in rows_of(*items)}
    for chart in charts:
        hardware = {hardware_of(by_id[name]) for name, _, _ in chart.points}
        if chart.kind.hardware:
            assert hardware == {chart.hardware}
        else:
            assert (chart.hardware, len(hardware)) == ("", 2)
    assert sorted(c.hardware for c in charts if c.kind.key == "latency_ms") == ["GPU A", "GPU B"]
    assert [len(c.points) for c in charts if c.kind.key == "flops"] == [4]


def test_the_page_holds_the_charts() -> None:
    items = [costing(record(m, seed=s)) for m in ("alpha", "beta") for s in range(2)]
    page = build_page("digits", [(Path("a"), r) for r in items], None, {}, "")
    found = {c["key"]: c for c in page_payload(page, {"csv": "", "tex": ""})["costs"]}
    assert found.keys() == {*KINDS, "parameters"}
    assert found["latency_ms"]["name"] == "Latency [ms] on GPU A"
    assert found["flops"]["name"] == "FLOPs per image"
    assert found["latency_ms"]["hardware"] == "GPU A"
    assert set(found["latency_ms"]["front"]) <= {name for name, *_ in found["latency_ms"]["points"]}


# ---- the front ----------------------------------------------------------------------------------


def test_the_pareto_front_of_a_worked_example() -> None:
    points = [("a", 1.0, 9.0), ("b", 2.0, 5.0), ("c", 3.0, 6.0), ("d", 4.0, 1.0), ("e", 1.0, 10.0)]
    assert pareto_front(points, higher_is_better=False) == ("a", "b", "d")
    assert pareto_front(points, higher_is_better=True) == ("e",)
    assert pareto_front([("a", 1.0, 2.0), ("b", 1.0, 2.0)], higher_is_better=False) == ("a", "b")
    assert pareto_front([], higher_is_better=True) == ()


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12), st.booleans())
def test_the_front_is_what_nothing_dominates(pairs: list[tuple[int, int]], higher: bool) -> None:
    points = [(str(i), float(cost), float(value)) for i, (cost, value) in enumerate(pairs)]
    sign = -1 if higher else 1

    def dominated(point: tuple[str, float, float]) -> bool:
        return any(
            other[1] <= point[1] and sign * other[2] <= sign * point[2] and other[1:] != point[1:]
            for other in points
        )

    expected = {point[0] for point in points if not dominated(point)}
    assert set(pareto_front(points, higher_is_better=higher)) == expected


# ---- training and records -----------------------------------------------------------------------


def test_training_costs_contain_the_teacher() -> None:
    item = record("alpha")
    own = item.training
    cost = TeacherCost(network_evaluations=1000, device_hours=2.0)
    training = own.model_copy(update={"teacher_cost": cost, "network_evaluations": 500})
    with_teacher = item.model_copy(update={"training": training})
    assert training_evaluations(with_teacher) == 1500
    alone = item.model_copy(update={"training": training.model_copy(update={"teacher_cost": None})})
    assert training_evaluations(alone) == 500
    before, after = training_hours(alone), training_hours(with_teacher)
    assert before is not None
    assert after == pytest.approx(before + 2.0)


def test_a_record_keeps_its_cost_and_older_ones_their_bytes(tmp_path: Path) -> None:
    item = costing(record("alpha"))
    on_disk(tmp_path, [item])
    ((_, found),) = read_records(tmp_path, "digits")
    assert found == item
    older = item.model_copy(update={"schema_version": 3, "cost": None})
    assert {"cost"}.isdisjoint(json.loads(older.to_json()))
    assert "teacher_cost" not in json.loads(older.to_json())["training"]
    path = tmp_path / "older.json"
    path.write_text(older.to_json())
    assert read_record(path).to_json() == older.to_json()

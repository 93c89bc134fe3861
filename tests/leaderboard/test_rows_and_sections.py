"""Rows of several seeds, the sections they stand in, and the flat tables that are exported."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from record_factory import metric, on_disk, record

from cmbench.leaderboard.export import FlatTable, cell_table, row_table, to_csv, to_parquet
from cmbench.leaderboard.rows import Row, aggregate, row_order, setting_id, unfinished
from cmbench.leaderboard.sections import Section, key_difference, sections
from cmbench.records.record import Record


def rows(*records: Record) -> list[Row]:
    return aggregate([(Path(f"{r.cell}.json"), r) for r in records])


def seeds(method: str, values: list[float], **fields: Any) -> list[Record]:
    return [record(method, seed=s, value=v, **fields) for s, v in enumerate(values)]


# ---- rows ---------------------------------------------------------------------------------------


def test_a_row_says_what_its_records_have_in_common() -> None:
    records = seeds("beta", [3.0, 1.0, 2.0], nfe=2, training={"parameters": 1234})
    (row,) = rows(*reversed(records))
    assert {name: getattr(row, name) for name in row.__dataclass_fields__ if name != "cells"} == {
        "id": setting_id(records[0]),
        "dataset": "digits",
        "kind": "measured",
        "method": "beta",
        "title": "Beta models",
        "name": "",
        "family": "consistency training",
        "reference": "Beta et al., 2024",
        "arxiv": "",
        "year": 2024,
        "conditional": True,
        "recipe": "demo",
        "overrides": (),
        "apart": (),
        "sampler": "multistep",
        "own_sampler": False,
        "dtype": "float32",
        "nfe": 2,
        "nfe_text": "2",
        "parameters": 1234,
        "num_samples": 1797,
        "protocol_samples": 1797,
        "rank_metric": "fd-digits",
        "measurements": row.measurements,
        "marks": (),
        "findings": (),
        "note": "",
        "protocol": ("", ""),
        "details": {},
        "tables": (),
    }
    assert [item.training.seed for _, item in row.cells] == [0, 1, 2], "in seed order"
    assert [path.name for path, _ in row.cells] == [f"{r.cell}.json" for r in records]
    found = row.measurements["fd-digits"]
    assert [(u.training_seed, u.sampling_seed, u.value) for u in found.units] == [
        (0, 0, 3.0),
        (1, 1, 1.0),
        (2, 2, 2.0),
    ]
    assert (found.name, found.mean, found.higher_is_better) == ("fd-digits", 2.0, False)
    assert found.key == records[0].metrics["fd-digits"].key
    assert row.measurements["recall"].higher_is_better
    assert (row.seeds, row.rank_measurement, row.label) == (3, found, "beta")


def test_what_is_not_known_is_none_or_said() -> None:
    (row,) = rows(record("alpha", nfe=0, training={"parameters": 0}, title=""))
    assert (row.nfe, row.nfe_text, row.parameters, row.title) == (None, "not stated", None, "alpha")
    unknown = replace(row, kind="reported", title="As printed", cells=())
    assert (unknown.label, unknown.seeds) == ("As printed", 0)
    assert replace(row, rank_metric="kid").rank_measurement is None
    assert replace(row, rank_metric="kid").seeds == 0


def test_sampling_seeds_of_one_training_are_in_order_too() -> None:
    records = [record("alpha", seed=s, sampling_seed=e) for s in (1, 0) for e in (7, 5)]
    (row,) = rows(*records)
    assert [(c.training.seed, c.sampling.seed) for _, c in row.cells] == [
        (0, 5),
        (0, 7),
        (1, 5),
        (1, 7),
    ]


@pytest.mark.parametrize(
    ("samples", "protocol", "full"),
    [
        (100, 100, True),
        (101, 100, True),
        (99, 100, False),
        (None, 100, True),
        (100, None, True),
        (None, None, True),
    ],
)
def test_full_samples(samples: int | None, protocol: int | None, full: bool) -> None:
    (row,) = rows(record())
    made = replace(row, num_samples=samples, protocol_samples=protocol)
    assert made.full_samples == full


def test_the_strictest_of_the_records_protocols_counts() -> None:
    """The protocol of a dataset may have grown between two records of one setting."""
    records = [
        record(seed=s, sampling={"num_samples": 100, "protocol_samples": p})
        for s, p in enumerate((100, 500))
    ]
    (row,) = rows(*records)
    assert (row.num_samples, row.protocol_samples, row.full_samples) == (100, 500, False)


def test_values_that_could_not_be_computed_are_left_out() -> None:
    (row,) = rows(record(seed=0, value=None), record(seed=1, value=2.0))
    assert [u.value for u in row.measurements["fd-digits"].units] == [2.0]
    (none,) = rows(record(value=None))
    assert none.measurements.keys() == {"precision", "recall"}


def test_marks_say_what_is_unusual() -> None:
    tuned = {"tuned": {"nfe": 1}}
    assert rows(record())[0].marks == ()
    assert rows(record(sampling=tuned))[0].marks == ("tuned sigmas",)
    assert rows(record(sampling=tuned | {"dtype": "float16"}))[0].marks == (
        "tuned sigmas",
        "float16",
    )


CHANGES: dict[str, dict[str, Any]] = {
    "kind": {"kind": "imported checkpoint"},
    "method": {"method": "other"},
    "plugin": {"plugin": {"name": "builtins", "distribution": "cmbench", "version": "9"}},
    "conditional": {"conditional": False},
    "recipe": {"recipe": "paper"},
    "config": {"training": {"config_sha256": "0" * 64}},
    "ema": {"training": {"ema": "raw"}},
    "parameters": {"training": {"parameters": 5}},
    "images seen": {"training": {"images_seen": 5}},
    "nfe": {"sampling": {"nfe": 3}},
    "sampler": {"sampling": {"sampler": "heun"}},
    "sigmas": {"sampling": {"sigmas": [1.0]}},
    "tuned": {"sampling": {"tuned": {"nfe": 1}}},
    "samples": {"sampling": {"num_samples": 5}},
    "dtype": {"sampling": {"dtype": "float16"}},
    "quantize": {"sampling": {"quantize": "truncate"}},
    "labels": {"sampling": {"labels": "uniform"}},
    "rank metric": {"rank_metric": "recall"},
    "metric key": {"metrics": {"fd-digits": metric(1.0, key="x")}},
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_decides_a_number_sets_rows_apart(change: str) -> None:
    base, other = (
        record("alpha", seed=0),
        record(**{"method": "alpha", "seed": 1} | CHANGES[change]),
    )
    assert setting_id(base) != setting_id(other)
    assert len(rows(base, other)) == 2


@pytest.mark.parametrize("part", ["name", "revision", "sha256", "extractor", "extractor_sha256"])
def test_another_dataset_or_extractor_sets_rows_apart(part: str) -> None:
    base = record(seed=0)
    changed = base.dataset.model_copy(update={part: "0" * 64})
    assert setting_id(base) != setting_id(base.model_copy(update={"dataset": changed}))


def test_seeds_and_circumstances_do_not_set_rows_apart() -> None:
    base = record("alpha", seed=0)
    other = record(
        "alpha",
        seed=5,
        sampling_seed=9,
        value=7.0,
        created="2030-01-01T00:00:00Z",
        command="other",
        training={"run": "other", "checkpoint_sha256": "1" * 64},
        sampling={"batch_size": 3, "seconds": 99.0, "nfe_measured": 1.0},
    )
    assert setting_id(base) == setting_id(other)


def test_rows_are_in_a_fixed_order() -> None:
    made = rows(
        record("beta"),
        record("alpha", recipe="paper"),
        record("alpha", nfe=4),
        record("alpha", nfe=2),
        record("alpha", conditional=False, nfe=4),
        record("alpha", sampling={"sampler": "heun"}),
    )
    order = [(r.method, r.recipe, r.sampler, r.conditional, r.nfe) for r in made]
    assert order == [
        ("alpha", "demo", "heun", True, 1),
        ("alpha", "demo", "multistep", False, 4),
        ("alpha", "demo", "multistep", True, 2),
        ("alpha", "demo", "multistep", True, 4),
        ("alpha", "paper", "multistep", True, 1),
        ("beta", "demo", "multistep", True, 1),
    ]
    assert made == sorted(made, key=row_order)
    unknown = replace(made[2], nfe=None)
    assert row_order(unknown) < row_order(made[2])


def test_unfinished_cells_are_listed_in_their_order() -> None:
    cells = [
        (Path(f"{i}"), record(seed=i, status=status, metrics={}))
        for i, status in enumerate(("failed", "finished", "skipped"))
    ]
    assert [path.name for path, _ in unfinished(cells)] == ["0", "2"]


# ---- sections -----------------------------------------------------------------------------------


def reported(value: float, key: str = "", protocol: tuple[str, str] = ("", "")) -> Row:
    (row,) = rows(record("printed", value=value))
    found = replace(row.measurements["fd-digits"], key=key)
    return replace(
        row, kind="reported", cells=(), measurements={"fd-digits": found}, protocol=protocol
    )


def by_id(found: list[Section]) -> dict[str, Section]:
    return {section.id: section for section in found}


def test_the_largest_group_of_one_key_comes_first_and_the_others_say_why_not() -> None:
    others = [record(m, metrics={"fd-digits": metric(1.0, key="other")}) for m in ("delta", "eps")]
    found = sections(rows(*(record(m) for m in ("alpha", "beta", "gamma")), *others))
    first, second = found
    assert (first.id, first.title, first.reason, len(first.rows)) == ("ranked-0", "Measured", "", 3)
    assert first.key == record().metrics["fd-digits"].key
    assert (second.id, second.title, len(second.rows), second.key) == (
        "ranked-1",
        "Measured under another protocol (other)",
        2,
        "other",
    )
    assert second.reason.startswith("Another metric key than the first section")
    assert all(s.ranked and s.metric == "fd-digits" for s in found)


def test_another_protocol_is_named_by_all_that_differs_from_the_first_section() -> None:
    """The two lesser sections share a rule of quantisation that the first one does not have."""
    keys = ["fd:cnn:round:ref=1:n=9", "fd:cnn:stored:ref=2:n=9", "fd:cnn:stored:ref=3:n=9"]
    made = [
        record(f"m{i}{j}", metrics={"fd-digits": metric(1.0, key=key)})
        for i, key in enumerate(keys)
        for j in range(3 - i)
    ]
    assert [section.title for section in sections(rows(*made))] == [
        "Measured",
        "Measured under another protocol (stored, ref=2)",
        "Measured under another protocol (stored, ref=3)",
    ]


def test_rows_of_a_section_are_by_cost_then_by_value() -> None:
    made = rows(
        record("alpha", value=2.0, nfe=2),
        record("beta", value=1.0, nfe=2),
        record("gamma", value=9.0),
        record("delta", value=0.5, conditional=False),
    )
    (section,) = sections(made)
    assert [(r.method) for r in section.rows] == ["delta", "gamma", "beta", "alpha"]
    higher = rows(
        *(
            record(m, metrics={"fd-digits": metric(v, higher=True)})
            for m, v in (("alpha", 1.0), ("beta", 2.0))
        )
    )
    assert [r.method for r in sections(higher)[0].rows] == ["beta", "alpha"]


def test_what_cannot_be_ranked_is_apart_with_its_reason() -> None:
    approximate = "fd:inception@0123abcd:tf1-bilinear+bfloat16:round:n-1:float64:ref=0:n=50:v1"
    made = rows(
        record("alpha"),
        record("beta", value=None),
        record("gamma", metrics={"fd-digits": metric(1.0, key=approximate)}),
        record("delta", sampling={"num_samples": 5}),
    )
    found = by_id(sections([*made, reported(3.0)]))
    assert list(found) == ["ranked-0", "short-0", "approximate", "no-rank-metric", "reported-0"]
    methods = {name: [r.method for r in section.rows] for name, section in found.items()}
    assert methods == {
        "ranked-0": ["alpha"],
        "short-0": ["delta"],
        "approximate": ["gamma"],
        "no-rank-metric": ["beta"],
        "reported-0": ["printed"],
    }
    assert [name for name, section in found.items() if section.ranked] == ["ranked-0"]
    metrics = {name: s.metric for name, s in found.items()}
    assert metrics == dict.fromkeys(found, "fd-digits") | {"no-rank-metric": ""}
    starts = {
        "short-0": "Distances are biased upwards",
        "approximate": "The extractor ran in bfloat16",
        "no-rank-metric": "The rank metric could not be computed",
        "reported-0": "Shown as printed, never ranked with measured rows: their metric keys are",
    }
    assert all(found[name].reason.startswith(start) for name, start in starts.items())


def test_reported_rows_stand_by_protocol_or_with_measured_ones_of_equal_key() -> None:
    (row,) = rows(record("alpha"))
    key = row.measurements["fd-digits"].key
    found = sections([row, reported(3.0, key)])
    assert [(s.title, len(s.rows)) for s in found] == [
        ("Measured and reported, equal metric keys", 2)
    ]
    assert sections([reported(3.0, key)])[0].title == "Reported"
    protocols = [("A", "of its own"), ("B", ""), ("A", "of its own")]
    parts = sections([reported(1.0 + i, protocol=p) for i, p in enumerate(protocols)])
    assert [(s.id, s.title, s.reason, len(s.rows)) for s in parts] == [
        (
            "reported-0",
            "Reported by their authors: A",
            "Shown as printed, never ranked with measured rows: of its own.",
            2,
        ),
        (
            "reported-1",
            "Reported by their authors: B",
            "Shown as printed, never ranked with measured rows: their metric keys are not known.",
            1,
        ),
    ]


def test_what_sets_keys_apart() -> None:
    assert key_difference("a:b:c", ["a:b:c", "a:x:c"]) == "b"
    assert key_difference("a:b:c", ["a:b:c", "a:b:x", "y:b:c"]) == "a, c"
    assert key_difference("a:b", ["a:b", "a:b"]) == "a:b", "nothing: the whole key"


# ---- flat tables --------------------------------------------------------------------------------


def folder_of(tmp_path: Path, *records: Record) -> dict[str, Path]:
    on_disk(tmp_path / "digits", list(records))
    return {"digits": tmp_path / "digits"}


def test_rows_are_exported_with_their_numbers_and_positions(tmp_path: Path) -> None:
    values = {"alpha": [1.0, 1.01, 1.02, 1.03, 1.04], "beta": [5.0, 5.02, 5.01, 5.05, 5.04]}
    made = [item for method, found in values.items() for item in seeds(method, found)]
    table = row_table(folder_of(tmp_path, *made, record("gamma", value=9.0)))
    lines = {line["method"]: line for line in table.rows}
    names = ("may_be_best", "position_low", "position_high", "p_best", "seeds")
    assert {m: tuple(line[name] for name in names) for m, line in lines.items()} == {
        "alpha": (True, 1, 1, 1.0, 5),
        "beta": (False, 2, 2, 0.0, 5),
        "gamma": (False, None, None, None, 1),
    }
    alpha = lines["alpha"]
    assert alpha["section"] == "Measured"
    assert alpha["fd-digits_values"] == "1.0 1.01 1.02 1.03 1.04"
    assert alpha["fd-digits_mean"] == pytest.approx(1.02)
    assert alpha["fd-digits_low"] < 1.02 < alpha["fd-digits_high"]
    assert alpha["fd-digits_key"] == made[0].metrics["fd-digits"].key
    assert alpha["cells"] == " ".join(item.cell for item in made[:5])
    assert (alpha["samples"], alpha["parameters"], alpha["nfe"]) == (1797, 100_000, 1)
    assert (alpha["kind"], alpha["recipe"], alpha["sampler"]) == ("measured", "demo", "multistep")
    assert (alpha["dataset"], alpha["title"], alpha["family"], alpha["conditional"]) == (
        "digits",
        "Alpha models",
        "consistency training",
        True,
    )
    assert lines["gamma"]["fd-digits_low"] is None


def test_cells_are_exported_field_by_field(tmp_path: Path) -> None:
    folders = folder_of(tmp_path, record("alpha"))
    (tmp_path / "digits" / "torn.json").write_text("{")
    table = cell_table(folders)
    (line,) = table.rows
    assert line["method"] == "alpha"
    assert line["sampling.nfe"] == 1
    assert json.loads(line["training.config"])["batch_size"] == 128, "recipes stay in one column"
    assert json.loads(line["environment.packages"]) == {"numpy": "2.4.6", "torch": "2.15.0"}
    assert json.loads(line["metrics.fd-digits.detail"]) == {"floor": 0.8}
    assert line["metrics.fd-digits.value"] == 1.0
    assert json.loads(line["sampling.sigmas"]) == [80.0]
    assert "training.config.batch_size" not in line
    (error,) = table.errors
    assert "torn.json" in str(error)


def test_columns_are_those_of_all_lines_in_the_order_they_appear() -> None:
    table = FlatTable([{"b": 1, "a": "=1+1"}, {"c": None, "a": 2}])
    assert table.columns == ["b", "a", "c"]
    assert list(csv.reader(io.StringIO(to_csv(table).decode()))) == [
        ["b", "a", "c"],
        ["1", "'=1+1", ""],
        ["", "2", ""],
    ]


def test_a_name_of_a_column_is_no_formula() -> None:
    """Metrics and options name columns, and a plugin or a record names those."""
    table = FlatTable([{"=cmd|'/c calc'!A0_mean": 1, "@x": 2, "+y": 3, "plain": 4}])
    (header, _) = csv.reader(io.StringIO(to_csv(table).decode()))
    assert header == ["'=cmd|'/c calc'!A0_mean", "'@x", "'+y", "plain"]


def test_a_parquet_column_has_one_type() -> None:
    pytest.importorskip("pyarrow")
    import pandas

    table = FlatTable(
        [
            {"number": 1, "mixed": 1, "texts": "a", "kinds": True, "holes": None, "flags": True},
            {"number": 2.5, "mixed": "one", "texts": "b", "kinds": "x", "holes": 3, "flags": False},
        ]
    )
    frame = pandas.read_parquet(io.BytesIO(to_parquet(table)))
    assert frame["number"].tolist() == [1.0, 2.5]
    assert frame["mixed"].tolist() == ["1", "one"]
    assert frame["kinds"].tolist() == ["True", "x"]
    assert frame["texts"].tolist() == ["a", "b"]
    assert frame["flags"].tolist() == [True, False]
    assert frame["holes"].tolist()[1] == 3

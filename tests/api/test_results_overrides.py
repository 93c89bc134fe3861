"""A table of records tells configurations apart, as pages do."""

from __future__ import annotations

import sys
from pathlib import Path

from cmbench.api.results import Results

sys.path.insert(0, str(Path(__file__).parents[1] / "report"))
from record_factory import record


def test_the_tables_of_a_notebook_say_what_differs_from_the_recipe() -> None:
    plain = record("alpha", training={"overrides": {}})
    changed = record("alpha", seed=1, training={"overrides": {"optimizer.lr": 0.01}})
    named = record("s-1f49620e", seed=2, label="model λ")
    results = Results([plain, changed, named])
    frame = results.dataframe()
    assert list(frame.overrides.unique()) == ["", "optimizer.lr=0.01"]
    assert set(frame.method) == {"alpha", "model λ"}
    assert "alpha +optimizer.lr=0.01" in repr(results)
    assert "model λ" in repr(results)

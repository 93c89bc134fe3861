"""Killed at any moment and started again, a run ends as if it had never been disturbed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

KILLING = Path(__file__).with_name("killing.py")
CASES = 25


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_sigkill_at_any_moment_changes_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(KILLING), str(tmp_path), "20241", str(CASES)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["hits"] >= CASES // 2
    assert found["events"] > 100
    expected = found["expected"]
    assert expected["weights"].keys() == {"weights-part-0.safetensors", "weights-final.safetensors"}
    assert [cell[0] for cell in expected["cells"].values()] == ["finished", "finished"]
    assert (expected["unreadable"], expected["results"]) == (0, 1)
    assert found["different"] == []

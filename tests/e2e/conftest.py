"""Tests of the benchmark scripts use the records that the tests of reports make."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "report"))

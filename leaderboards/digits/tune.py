"""Tune every method of the digits board with the same budget, on a seed that the board never shows.

Four trials a method: its `demo` recipe, half and twice the learning rate, and another value of an
option of its own. All are trained and measured in full at seed 100; the board shows seeds 0, 1, 2.
The trial with the lowest fd-digits wins: at NFE 1, for the diffusion baseline at NFE 35. Killed and
started again it goes on. It writes tuning.csv beside itself; winners enter the recipes by hand.

    python leaderboards/digits/tune.py [WORKSPACE]        default cmbench-out
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

SEED = 100
HERE = Path(__file__).parent
#: Per method: the recipe's learning rate, and the trial of an option of its own.
TRIALS: dict[str, tuple[float, str]] = {
    "ct": (0.003, "s1=50"),
    "cd": (0.003, "metric=pseudo-huber"),
    "sct": (0.003, "p_mean=-0.6"),
    "scd": (0.003, "p_mean=-0.6"),
    "ict": (0.003, "s1=640"),
    "ect": (0.003, "stages=4"),
    "pd": (0.003, "weighting=snr+1"),
    "cct": (0.0001, "rho=4"),
    "edm": (0.005, "p_mean=-0.9"),
    "ict-deep": (0.003, "s1=640"),
}


def trials(method: str) -> list[str]:
    """Return the options of each trial; the first is the recipe as it stands."""
    lr, own = TRIALS[method]
    return ["", f"optimizer.lr={lr / 2:g}", f"optimizer.lr={lr * 2:g}", own]


def measure(method: str, option: str, workspace: Path) -> dict[str, str | int | float]:
    """Run one trial and return its row."""
    nfe = 35 if method == "edm" else 1
    tail = ["--method", method, "--nfe", str(nfe), *(["-o", option] if option else [])]
    command = [
        "cmbench",
        "run",
        "--dataset",
        "digits",
        "--seeds",
        f"{SEED}-{SEED}",
        "--threads",
        "1",
        "--no-report",
        "--quiet",
        "--workspace",
        str(workspace),
        *tail,
    ]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    for path in workspace.glob(f"records/digits/{method}-demo-s{SEED}-nfe{nfe}-*.json"):
        record = json.loads(path.read_text())
        if record["command"].endswith(" ".join(tail)):
            return {
                "method": method,
                "option": option or "(recipe)",
                "seed": SEED,
                "nfe": nfe,
                "fd-digits": round(record["metrics"]["fd-digits"]["value"], 4),
                "network_evaluations": record["training"]["network_evaluations"],
            }
    raise SystemExit(f"{' '.join(command)} left no record:\n{done.stdout}{done.stderr}")


def main() -> None:
    """Run all trials and write the table after each."""
    workspace = Path(sys.argv[1] if len(sys.argv) > 1 else "cmbench-out")
    rows: list[dict[str, str | int | float]] = []
    for method in TRIALS:
        for option in trials(method):
            rows.append(measure(method, option, workspace))
            print(rows[-1], flush=True)
            with (HERE / "tuning.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)


if __name__ == "__main__":
    main()

"""The tuning of the digits recipes: the same number of trials for every method.

Every method gets five trials on a training and sampling seed (100) that no leaderboard uses: three
learning rates and two values of what its paper leaves open. All trials of a method have the budget
of its demo recipe. The winner has the lowest mean rank of fd-digits over NFE 1, 2 and 4; the recipes
were then set from ``benchmarks/results/tune_digits.json`` by hand.

    python benchmarks/tune_digits.py --workspace DIR --workers 2 --out benchmarks/results/tune_digits.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

LR = ("optimizer.lr=3e-4", "optimizer.lr=1e-3", "optimizer.lr=3e-3")
KNOBS: dict[str, tuple[str, str]] = {
    "edm": ("p_mean=-0.6", "ema=[{halflife_kimg=30.0,rampup_ratio=0.1}]"),
    "cd": ("n_points=40", "target_ema=0.9"),
    "ct": ("s1=40", "mu0=0.0"),
    "cct": ("form=distillation", "ema=[{halflife_kimg=30.0,rampup_ratio=0.1}]"),
    "ict": ("s1=40", "huber_c=0.05"),
    "ict-deep": ("s1=40", "huber_c=0.05"),
    "ect": ("q=4.0", "huber_c=0.06"),
    "sct": ("tangent_norm=rms", "warmup_steps=1250"),
    "scd": ("tangent_norm=rms", "warmup_steps=1250"),
    "pd": ("start_steps=16", "weighting=snr+1"),
}
#: The 2023 continuous objective is trained at rates far below the others' in its paper.
SMALL_LR = ("optimizer.lr=1e-5", "optimizer.lr=1e-4", "optimizer.lr=1e-3")
TEACHERS = (("edm", "demo"), ("edm", "trigflow"))


def run(workspace: str, method: str, recipe: str, overrides: tuple[str, ...], seed: int) -> str:
    """Run one trial in its own process with one thread; return its stderr's last lines."""
    command = [sys.executable, "-m", "cmbench", "run", "-q", "--no-report", "--device", "cpu"]
    command += ["-w", workspace, "-m", method, "-r", recipe, "--seeds", f"{seed},"]
    for override in overrides:
        command += ["-o", override]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    print(method, overrides, done.returncode, done.stderr.strip()[-300:], flush=True)
    return done.stderr


def scores(workspace: str) -> list[dict[str, object]]:
    """Return one row a trial: method, what was overridden, distance at each NFE."""
    rows: dict[str, dict[str, object]] = {}
    for path in sorted(Path(workspace, "records", "digits").glob("*.json")):
        record = json.loads(path.read_text())
        if record["training"]["seed"] != 100 or record["status"] != "finished":
            continue
        row = rows.setdefault(record["training"]["run"], {
            "method": record["method"], "command": record["command"], "fd-digits": {},
            "seconds": sum(record["training"]["seconds_by_phase"].values()),
        })
        distances = row["fd-digits"]
        assert isinstance(distances, dict)
        distances[record["sampling"]["nfe"]] = record["metrics"]["fd-digits"]["value"]
    return sorted(rows.values(), key=lambda r: (str(r["method"]), str(r["command"])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workspace", required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--methods", default=",".join(KNOBS))
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    with ThreadPoolExecutor(arguments.workers) as pool:
        list(pool.map(lambda t: run(arguments.workspace, *t, (), 0), TEACHERS))
        trials = []
        for method in arguments.methods.split(","):
            rates = SMALL_LR if method == "cct" else LR
            for choice in (*((rate,) for rate in rates), *((knob,) for knob in KNOBS[method])):
                trials.append((method, "demo", choice))
        # The longest first, so that the last worker does not finish alone.
        trials.sort(key=lambda t: t[0] != "ict-deep")
        list(pool.map(lambda t: run(arguments.workspace, *t, 100), trials))
    Path(arguments.out).parent.mkdir(parents=True, exist_ok=True)
    Path(arguments.out).write_text(json.dumps(scores(arguments.workspace), indent=1) + "\n")


if __name__ == "__main__":
    main()

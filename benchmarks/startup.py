"""Start-up cost: wall time of light commands relative to ``python -c pass``, side by side.

    python benchmarks/startup.py

Target: ``cmbench --help`` and ``cmbench list methods`` at most 8x, and no torch import.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "cmbench --help": [sys.executable, "-m", "cmbench", "--help"],
    "cmbench list methods": [sys.executable, "-m", "cmbench", "list", "methods"],
}
ROUNDS = 15


def wall_s(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


def imports_torch(arguments: list[str]) -> bool:
    code = (
        "import sys; sys.argv = ['cmbench', *sys.argv[1:]]\n"
        "from cmbench.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    return done.stderr.strip().endswith("True")


def main() -> None:
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(ROUNDS):  # interleaved, so that a busy moment hits all alike
        for name, command in COMMANDS.items():
            times[name].append(wall_s(command))
    base = statistics.median(times["python -c pass"])
    print(f"{'command':<24}{'median s':>10}{'ratio':>8}  torch")
    for name, values in times.items():
        arguments = name.split()[1:] if name.startswith("cmbench") else []
        torch = imports_torch(arguments) if name.startswith("cmbench") else False
        median = statistics.median(values)
        print(f"{name:<24}{median:>10.4f}{median / base:>8.2f}  {torch}")


if __name__ == "__main__":
    main()

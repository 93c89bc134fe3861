"""Precision, recall, density and coverage of 50,000 against 50,000 features: time and memory.

    python benchmarks/manifold_50k.py --out benchmarks/results/manifold-50k-cpu.json

Features are random of an intrinsic dimension below their width. CPU seconds, one thread; memory is
the peak of the process less what it held before (features included in the peak of the whole).
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import torch
from extraction import versions
from torch import Tensor

from cmbench.metrics.precision_recall import precision_recall, reference_radii


def features(count: int, dim: int, seed: int) -> Tensor:
    """Return rows of 64 intrinsic dimensions in ``dim``, with some noise."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(64, dim, generator=torch.Generator().manual_seed(0)) / 8
    rows = torch.randn(count, 64, generator=generator) @ basis
    return rows.add_(torch.randn(count, dim, generator=generator), alpha=0.1)


def peak_gib() -> float:
    """Return the peak memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=50_000)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    real, fake = (features(arguments.count, arguments.dim, seed) for seed in (1, 2))
    before = peak_gib()
    began = time.process_time()
    radii = reference_radii(real)
    first = time.process_time()
    found = precision_recall(fake, real, reference_radii=radii)
    ended = time.process_time()
    result = {
        "versions": versions(),
        "samples": arguments.count,
        "reference": arguments.count,
        "dimensions": arguments.dim,
        "reference_cpu_s": first - began,
        "samples_cpu_s": ended - first,
        "total_cpu_s": ended - began,
        "peak_gib_before": before,
        "peak_gib": peak_gib(),
        "precision": found.precision,
        "recall": found.recall,
        "density": found.density,
        "coverage": found.coverage,
    }
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()

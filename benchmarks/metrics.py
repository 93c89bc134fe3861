"""Metric figures side by side in one run: ours against the libraries, as ratios of CPU seconds.

    python benchmarks/metrics.py --out benchmarks/results/metrics-cpu.json

The Fréchet step, precision and recall, and a second evaluation's reference work. Extraction has its
own benchmark, `extraction.py`; 50,000 samples have theirs, `manifold_50k.py`.

CPU seconds of this process, least of the repetitions: other processes disturb them less than wall
time. Truth of the Fréchet step is known by construction, so both times and errors are measured.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
from extraction import versions

from cmbench.metrics.frechet import frechet_distance
from cmbench.metrics.precision_recall import precision_recall
from cmbench.metrics.reference_cache import cached_reference
from cmbench.metrics.shipped_cnn import DigitsExtractor
from cmbench.metrics.statistics import Moments


def cpu_seconds(work: Callable[[], object], repeat: int = 2) -> float:
    """Return the least CPU time of ``repeat`` calls."""
    times = []
    for _ in range(repeat):
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return min(times)


def frechet(dim: int, rank: int) -> dict[str, float]:
    """Compare with scipy's sqrtm at a known distance; ``rank`` < ``dim`` is rank-deficient."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))[0]
    values = torch.zeros(2, dim, dtype=torch.float64)
    values[:, :rank] = torch.rand(2, rank, generator=generator, dtype=torch.float64) + 0.1
    covs = [(basis * v) @ basis.T for v in values]
    count = rank + 1
    first, second = (
        Moments(torch.zeros(dim, dtype=torch.float64), (c + c.T) / 2, count) for c in covs
    )
    truth = float((values[0].sqrt() - values[1].sqrt()).square().sum())
    second.factor  # noqa: B018 (computed once per reference, and not timed)
    a, b = first.cov.numpy(), second.cov.numpy()

    def by_scipy() -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            root = scipy.linalg.sqrtm(a @ b)
        return float(np.trace(a) + np.trace(b) - 2 * np.trace(root).real)

    ours = cpu_seconds(lambda: frechet_distance(first, second))
    theirs = cpu_seconds(by_scipy, 1)
    return {
        "dimensions": dim,
        "rank": rank,
        "ours_s": ours,
        "scipy_s": theirs,
        "times_faster": theirs / ours,
        "our_error": abs(frechet_distance(first, second) - truth),
        "scipy_error": abs(by_scipy() - truth),
    }


def manifold(count: int, dim: int) -> dict[str, float]:
    """Compare precision and recall with torch-fidelity's on the same features."""
    from torch_fidelity.metric_prc import prc_features_to_metric

    generator = torch.Generator().manual_seed(0)
    fake = torch.randn(count, dim, generator=generator) * 1.1
    real = torch.randn(count, dim, generator=generator)

    def library() -> object:
        return prc_features_to_metric(
            fake, real, prc_neighborhood=3, prc_batch_size=10000, save_cpu_ram=True, verbose=False
        )

    ours, theirs = cpu_seconds(lambda: precision_recall(fake, real), 1), cpu_seconds(library, 1)
    return {"samples": count, "ours_s": ours, "library_s": theirs, "times_faster": theirs / ours}


def cached() -> dict[str, float]:
    """Compare a first evaluation's reference work with a second one's."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (1800, 1, 8, 8), generator=generator, dtype=torch.uint8)
    extractor = DigitsExtractor()
    with tempfile.TemporaryDirectory() as folder:

        def build() -> object:
            return cached_reference(
                lambda: images.split(500),
                extractor,
                source="b",
                source_sha256="b",
                quantization="round",
                folder=Path(folder),
            )

        first, second = cpu_seconds(build, 1), cpu_seconds(build)
    return {"first_s": first, "second_s": second, "times_faster": first / second}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = {
        "versions": versions(),
        "frechet_full_rank": frechet(arguments.dim, arguments.dim),
        "frechet_rank_deficient": frechet(arguments.dim, arguments.dim * 1000 // 2048),
        "precision_recall": manifold(2000, 2048),
        "reference_cache": cached(),
    }
    text = json.dumps(found, indent=2)
    print(text)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()

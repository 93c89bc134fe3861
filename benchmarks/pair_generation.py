"""Pairs as the harness makes and stores them, against bare sampling with the same network.

    python benchmarks/pair_generation.py --out benchmarks/results/pair-generation-cpu.json

Bare sampling draws a whole batch of noise at once, calls the solver and drops the images; the
harness draws each pair's noise from its own seed, checks, converts, hashes and writes. Both run on
one thread, in the same process and in turn; CPU seconds, so other processes disturb little.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from cmbench.diffusion.grids import sampling_sigmas
from cmbench.diffusion.models import EDMModel
from cmbench.diffusion.solvers import float64_denoiser, heun
from cmbench.networks.catalog import NETWORKS
from cmbench.networks.counted import CountedNetwork
from cmbench.plugin.method import GeneratedData
from cmbench.plugin.specs import load_object
from cmbench.training.distributed import World
from cmbench.training.generating import PairMaker, make_missing
from cmbench.training.pairs import PairRoot

NFE, CLASSES = 17, 10
#: Name -> image shape, network and its options, pairs, batch.
CASES: dict[str, tuple[tuple[int, int, int], str, dict[str, Any], int, int]] = {
    "digits": ((1, 8, 8), "unet-tiny", {"channels": 64, "blocks": 1}, 1024, 128),
    "cifar10": ((3, 32, 32), "ddpmpp", {"channels": 32, "blocks": 1}, 64, 16),
}


def network_of(shape: tuple[int, int, int], name: str, options: dict[str, Any]) -> CountedNetwork:
    """Return a network with random weights, for labelled images."""
    cls: Any = load_object({entry.name: entry.factory for entry in NETWORKS}[name])
    torch.manual_seed(0)
    made: nn.Module = cls(cls.Config(**options), shape, CLASSES)
    return CountedNetwork(made.eval().requires_grad_(False))


def measured(name: str, repeats: int) -> dict[str, float]:
    """Return pairs per CPU second both ways, their ratio, and bytes on disk by those of images."""
    shape, kind, options, count, batch = CASES[name]
    network = network_of(shape, kind, options)
    denoise = float64_denoiser(EDMModel(network, 0.5), torch.float32)

    def make(nets: Any, noise: Tensor, labels: Tensor | None) -> Tensor:
        steps = sampling_sigmas((NFE + 1) // 2)
        return heun(denoise, noise.double() * steps[0], steps, labels=labels).float()

    def bare() -> None:
        with torch.no_grad():
            for start in range(0, count, batch):
                noise = torch.randn(batch, *shape)
                make({}, noise, torch.arange(start, start + batch) % CLASSES)

    sizes: list[float] = []

    def stored() -> None:
        wanted = GeneratedData(count, make, "heun", NFE)
        with TemporaryDirectory() as folder:
            root = PairRoot(Path(folder), {}, lambda: "", lambda _: "", shape, labels_of)
            pairs = root.open(wanted)
            maker = PairMaker({}, [network], torch.device("cpu"), batch)
            make_missing(pairs, maker, World(), lambda: None, lambda done, total: None)
            written = sum(p.stat().st_size for p in pairs.folder.iterdir())
            sizes.append(written / (count * pairs.pair_bytes))

    make({}, torch.randn(batch, *shape), torch.zeros(batch, dtype=torch.int64))  # warms up
    times = [(seconds(bare), seconds(stored)) for _ in range(repeats)]
    return {
        "pairs": count,
        "bare_pairs_per_cpu_s": count / median(t for t, _ in times),
        "stored_pairs_per_cpu_s": count / median(t for _, t in times),
        "speed_ratio_median": median(without / with_all for without, with_all in times),
        "bytes_ratio": max(sizes),
    }


def labels_of(first: int, count: int) -> Tensor:
    """Return the classes of pairs from number ``first`` on."""
    return torch.arange(first, first + count) % CLASSES


def seconds(work: Callable[[], None]) -> float:
    """Return the CPU seconds of a call."""
    began = time.process_time()
    work()
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "threads": 1,
        "nfe": NFE,
        **{name: measured(name, arguments.repeats) for name in CASES},
    }
    print(json.dumps(found, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""What a further condition costs: a step of a network with one, over a step of the same without.

    python benchmarks/conditions.py [--rounds 60] [--json FILE]

A step is a forward and a backward pass and an optimizer's step, and for the carried derivative
``forward_with_tangent`` in the forward's place. The two networks take turns, and processor seconds
are compared in pairs, so that other load on the machine hits both alike. One thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch

from cmbench.networks.base import Network
from cmbench.networks.catalog import NETWORKS
from cmbench.plugin.specs import load_object

#: name of a setting: network, options, data shape, classes
SETTINGS: dict[str, tuple[str, dict[str, Any], tuple[int, int, int], int]] = {
    "unet-tiny": ("unet-tiny", {"channels": 64, "blocks": 1}, (1, 8, 8), 10),
    "unet-tiny-24": ("unet-tiny", {"channels": 24}, (1, 8, 8), 0),
    "mlp": ("mlp", {}, (2, 1, 1), 0),
    "ddpmpp-narrow": ("ddpmpp", {"channels": 32, "blocks": 1}, (3, 16, 16), 0),
}
CONDITION = "time_end"


class Steps:
    """A network that makes training steps, with or without a condition."""

    def __init__(self, setting: str, batch_size: int, *, condition: bool, tangent: bool) -> None:
        name, options, shape, classes = SETTINGS[setting]
        factory: Any = load_object({n: f for n, f, *_ in NETWORKS}[name])
        names = (CONDITION,) if condition else ()
        torch.manual_seed(0)
        self.network: Network = factory(factory.Config(**options, conditions=names), shape, classes)
        self.optimizer = torch.optim.Adam(self.network.parameters(), foreach=True)
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(batch_size, *shape, generator=generator)
        self.c_noise = torch.randn(batch_size, generator=generator)
        self.labels = torch.arange(batch_size) % classes if classes else None
        self.told: dict[str, Any] = {}
        if condition:
            self.told["conditions"] = {CONDITION: self.c_noise.flip(0)}
        if condition and tangent:
            self.told["condition_tangents"] = {CONDITION: torch.ones(batch_size)}
        self.tangent = tangent

    def seconds(self) -> float:
        """Make one step and return its processor seconds."""
        began = time.process_time()
        if self.tangent:
            ones = torch.ones_like(self.c_noise)
            y, _ = self.network.forward_with_tangent(
                self.x, self.c_noise, self.x, ones, self.labels, **self.told
            )
        else:
            y = self.network(self.x, self.c_noise, self.labels, **self.told)
        self.optimizer.zero_grad()
        y.square().mean().backward()
        self.optimizer.step()
        return time.process_time() - began


def ratio(setting: str, batch_size: int, rounds: int, *, tangent: bool) -> float:
    """Return the median of a conditioned step over a plain one."""
    both = [Steps(setting, batch_size, condition=c, tangent=tangent) for c in (False, True)]
    for steps in both:
        steps.seconds()
    found = []
    for number in range(rounds):
        times = [steps.seconds() for steps in (both if number % 2 else both[::-1])]
        found.append(times[1] / times[0] if number % 2 else times[0] / times[1])
    return statistics.median(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for setting, batch_size in product(SETTINGS, (64, 128)):
        plain, tangent = (
            ratio(setting, batch_size, arguments.rounds, tangent=t) for t in (False, True)
        )
        rows.append(
            {"setting": setting, "batch_size": batch_size, "step": plain, "with tangent": tangent}
        )
        print(f"{setting:<14}{batch_size:>5}{plain:>8.3f}{tangent:>8.3f}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

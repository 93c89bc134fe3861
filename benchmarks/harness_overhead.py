"""What the harness adds to training: ``train_step`` against a bare loop, side by side.

    python benchmarks/harness_overhead.py [--rounds 30]

Both make the same step on the digits network: the same loss on the same images, the same fused
Adam, the same exponential moving average. Blocks of steps alternate; the ratio is of the medians.
Target: at most 1.03.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from step_cost import Stepper

from cmbench.diffusion.frames import append_dims
from cmbench.diffusion.grids import lognormal_sigmas
from cmbench.diffusion.models import EDMModel
from cmbench.diffusion.weightings import edm_weight
from cmbench.plugin.manager import load_plugins
from cmbench.records.workspace import Workspace
from cmbench.sweep.context import Context

BATCH = 128
BLOCK = 10


def bare_step(stepper: Stepper) -> Callable[[], None]:
    """Return a plain PyTorch training step on a copy of the stepper's network."""
    config = stepper.state.method.config
    network = copy.deepcopy(stepper.state.modules["model"]).train()
    parameters = list(network.parameters())
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.Adam(parameters, lr=config.optimizer.lr, fused=True)
    dataset = stepper.feed.dataset
    images = torch.cat(list(dataset.reference_images())).float() / 127.5 - 1
    labels = torch.arange(len(images)) % dataset.num_classes
    sigma_data = stepper.state.method.sigma_data
    model = EDMModel(network, sigma_data)

    def step() -> None:
        index = torch.randint(len(images), (BATCH,))
        x, y = images[index], labels[index]
        sigma = lognormal_sigmas(torch.randn(BATCH), config.p_mean, config.p_std)
        optimizer.zero_grad(set_to_none=True)
        denoised = model.denoise(x + append_dims(sigma, x) * torch.randn_like(x), sigma, y)
        error = (denoised - x).square().flatten(1).sum(1)
        (edm_weight(sigma, sigma_data) * error).mean().backward()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 0.01)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    folder = tempfile.mkdtemp(prefix="cmbench-overhead-")
    cpu = torch.device("cpu")
    context = Context(load_plugins(), Workspace(Path(folder)), device=cpu, threads=1)
    stepper = Stepper(context, "edm", BATCH)
    steps = {"bare loop": bare_step(stepper), "train_step": stepper.step}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(rounds + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            for _ in range(BLOCK):
                step()
            if round_:  # the first warms up
                times[name].append((time.perf_counter() - began) / BLOCK)
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, value in medians.items():
        print(f"{name:<12}{value * 1e3:>8.2f} ms a step{value / medians['bare loop']:>8.3f}x")


if __name__ == "__main__":
    main()

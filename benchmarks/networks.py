"""Cost of the networks, as ratios measured side by side.

    python benchmarks/networks.py --json benchmarks/results/networks.json
    python benchmarks/networks.py [--network NAME ...] [--threads N] [--repeats N] [--cpu-time]

For each small network: forward without a graph, forward and backward, the joint pass
(``forward_with_tangent``), PyTorch's ``func.jvp``, and a whole sCM-like step, each relative to the
forward or to the diffusion step. For the published sizes: forward, joint pass and their ratio.
Last, DDPM++ beside diffusers' UNet2DModel of the same size (needs ``pip install diffusers``; left
out with a note where it is missing). One JSON file takes it all. Calls are interleaved and medians
taken, so that other load on the machine hits all of them alike.

A joint pass costs 2 forwards but for what is not linear: attention takes 5 products where the
forward takes 2, which narrow networks at 1024 tokens feel (``adm-narrow``), the published ones
hardly.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cmbench.networks.base import Network, num_parameters
from cmbench.networks.catalog import NETWORKS, SIZES
from cmbench.plugin.specs import load_object

#: name: network, settings, data shape, classes, batch
SETTINGS: dict[str, tuple[str, dict[str, Any], tuple[int, int, int], int, int]] = {
    "unet-tiny": ("unet-tiny", {}, (1, 8, 8), 10, 128),
    "mlp": ("mlp", {}, (2, 1, 1), 0, 1024),
    "ddpmpp-narrow": ("ddpmpp", {"channels": 32, "blocks": 2}, (3, 32, 32), 0, 16),
    "ddpmpp-cifar10": (*SIZES["ddpmpp-cifar10"], (3, 32, 32), 0, 16),
    "ncsnpp-narrow": ("ncsnpp", {"channels": 32, "blocks": 2}, (3, 32, 32), 0, 16),
    "adm-narrow": ("adm", {"channels": 32, "blocks": 1}, (3, 64, 64), 10, 4),
    "edm2-narrow": ("edm2", {"channels": 64, "blocks": 1}, (3, 64, 64), 10, 4),
}
#: Published sizes too large for ``func.jvp`` and steps: forward and joint pass only.
PUBLISHED = {
    "adm-imagenet64": (*SIZES["adm-imagenet64"], (3, 64, 64), 1000, 1),
    "edm2-s": (*SIZES["edm2-s"], (3, 64, 64), 1000, 1),
}
#: The row that sets DDPM++ at its CIFAR-10 settings beside diffusers'.
DIFFUSERS = "diffusers"
DEFAULT = (
    "unet-tiny",
    "mlp",
    "ddpmpp-narrow",
    "ncsnpp-narrow",
    "adm-narrow",
    "edm2-narrow",
    *PUBLISHED,
    DIFFUSERS,
)


def build(name: str) -> tuple[Network, dict[str, Tensor]]:
    network, options, shape, classes, batch = {**SETTINGS, **PUBLISHED}[name]
    cls: Any = load_object({entry.name: entry.factory for entry in NETWORKS}[network])
    torch.manual_seed(0)
    module: Network = cls(cls.Config(**options), shape, classes)
    inputs = {
        "x": torch.randn(batch, *shape),
        "c_noise": torch.rand(batch) * 1.5,
        "dx": torch.randn(batch, *shape),
        "dc_noise": torch.rand(batch),
    }
    if classes:
        inputs["labels"] = torch.randint(classes, (batch,))
    return module.train(), inputs


def interleaved(
    calls: dict[str, Callable[[], object]], repeats: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Return each call's median seconds; one round warms up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(repeats + 1):
        for name, call in calls.items():
            start = clock()
            call()
            if round_:
                times[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def backward_of(module: nn.Module, output: Tensor) -> None:
    output.square().mean().backward()
    module.zero_grad()


def calls_of(network: Network, inputs: dict[str, Tensor]) -> dict[str, Callable[[], object]]:
    labels = inputs.get("labels")
    x, c, dx, dc = (inputs[name] for name in ("x", "c_noise", "dx", "dc_noise"))

    def forward() -> None:
        with torch.no_grad():
            network(x, c, labels)

    def joint() -> None:
        with torch.no_grad():
            network.forward_with_tangent(x, c, dx, dc, labels)

    def func_jvp() -> None:
        network.set_explicit_attention(True)
        with torch.no_grad():
            torch.func.jvp(lambda u, v: network(u, v, labels), (x, c), (dx, dc))
        network.set_explicit_attention(False)

    return {
        "forward": forward,
        "joint": joint,
        "func.jvp": func_jvp,
        "step": lambda: backward_of(network, network(x, c, labels)),
        "joint step": lambda: backward_of(
            network, network.forward_with_tangent(x, c, dx, dc, labels)[0]
        ),
    }


def measure(name: str, repeats: int, clock: Callable[[], float]) -> dict[str, Any]:
    network, inputs = build(name)
    calls = calls_of(network, inputs)
    if name in PUBLISHED:
        calls = {key: calls[key] for key in ("forward", "joint")}
    seconds = interleaved(calls, repeats, clock)
    row: dict[str, Any] = {
        "network": name,
        "parameters": num_parameters(network),
        "batch": inputs["x"].shape[0],
        "forward_ms": 1e3 * seconds["forward"],
        "joint/forward": seconds["joint"] / seconds["forward"],
    }
    if "step" in seconds:
        row |= {
            "step_ms": 1e3 * seconds["step"],
            "step/forward": seconds["step"] / seconds["forward"],
            "func.jvp/forward": seconds["func.jvp"] / seconds["forward"],
            "joint step/step": seconds["joint step"] / seconds["step"],
        }
    return row


def diffusers_unet() -> nn.Module:
    """Return diffusers' UNet2DModel with DDPM++'s widths and depth on CIFAR-10.

    Its decoder has attention in five blocks of a resolution or in none; DDPM++ in one. None is
    chosen, in their favour. Its time embedding is twice as wide (4M parameters, no work).
    """
    from diffusers import UNet2DModel

    model: nn.Module = UNet2DModel(
        sample_size=32,
        block_out_channels=(256, 256, 256),
        layers_per_block=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "UpBlock2D"),
        attention_head_dim=256,
        downsample_type="resnet",
        upsample_type="resnet",
        norm_eps=1e-6,
    )
    return model


def measure_against_diffusers(repeats: int, clock: Callable[[], float]) -> dict[str, Any]:
    ours, inputs = build("ddpmpp-cifar10")
    theirs = diffusers_unet().train()
    x, c = inputs["x"], inputs["c_noise"]
    calls = calls_of(ours, inputs)

    def forward() -> None:
        with torch.no_grad():
            theirs(x, c)

    del calls["func.jvp"], calls["joint step"]
    calls["their forward"] = forward
    calls["their step"] = lambda: backward_of(theirs, theirs(x, c).sample)
    seconds = interleaved(calls, repeats, clock)
    return {
        "network": "ddpmpp-cifar10 / diffusers",
        "parameters": num_parameters(ours),
        "their parameters": num_parameters(theirs),
        "batch": x.shape[0],
        "forward / theirs": seconds["forward"] / seconds["their forward"],
        "step / theirs": seconds["step"] / seconds["their step"],
        "joint/forward": seconds["joint"] / seconds["forward"],
        "forward_ms": 1e3 * seconds["forward"],
        "step_ms": 1e3 * seconds["step"],
    }


def machine(threads: int, clock: str) -> dict[str, Any]:
    """Return what the numbers belong to."""
    facts: dict[str, Any] = {"cpu": cpu_name(), "threads": threads, "torch": torch.__version__}
    if find_spec(DIFFUSERS):
        facts[DIFFUSERS] = version(DIFFUSERS)
    return facts | {"clock": clock}


def cpu_name() -> str:
    """Return the processor's name (``platform.processor`` is empty on most Linux systems)."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--network", action="append", choices=sorted({*SETTINGS, *PUBLISHED, DIFFUSERS})
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument(
        "--cpu-time", action="store_true", help="count CPU seconds: steadier on a busy machine"
    )
    parser.add_argument("--json", type=Path, help="also write the rows and the machine here")
    return parser.parse_args()


def main() -> None:
    args = options()
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.cpu_time else time.perf_counter
    rows = []
    for name in args.network or DEFAULT:
        if name == DIFFUSERS and find_spec(DIFFUSERS) is None:
            print("not compared with diffusers: it is not installed (pip install diffusers)")
            continue
        if name == DIFFUSERS:
            row = measure_against_diffusers(args.repeats, clock)
        else:
            row = measure(name, args.repeats, clock)
        rows.append(row)
        cells = (f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
        print("  ".join(cells), flush=True)
    if args.json:
        facts = machine(args.threads, "CPU seconds" if args.cpu_time else "seconds")
        args.json.write_text(json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Measure the engine on a GPU: training and sampling speed, utilisation, what each step buys.

    python benchmarks/gpu.py --out benchmarks/results/h200.json
    python benchmarks/gpu.py --parts train --methods edm,sct --case imagenet64-edm2-s
    python benchmarks/gpu.py --parts profile --case cifar10-ddpmpp,imagenet64-edm2-s
    python benchmarks/gpu.py --cpu-smoke                 # the same code on a tiny problem

Images are random bytes, teachers have random weights: only speed is measured. Steps go through the
engine's own ``train_step``; a batch that does not fit is accumulated from shards that do. FLOPs
are those of matrix products and convolutions in one eager step (``torch.utils.flop_counter``), the
ceiling is the best bf16 matrix product measured here. Results are written after every measurement,
so a run that is cut short keeps what it has.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cmbench.data.stored import ArrayDataset
from cmbench.errors import BrokenRunError, UserError
from cmbench.files import write_atomically
from cmbench.networks.counted import CountedNetwork, to_device
from cmbench.plugin.manager import load_plugins
from cmbench.plugin.method import Teacher
from cmbench.records.provenance import environment
from cmbench.records.workspace import Workspace
from cmbench.sampling import Sampler
from cmbench.sweep.context import Context
from cmbench.sweep.plans import RunPlan
from cmbench.sweep.recipes import merge
from cmbench.sweep.runs import build_modules
from cmbench.training.augment import DatasetFeed
from cmbench.training.loop import Trainer
from cmbench.training.settings import Settings
from cmbench.training.state import TrainingState

PARTS = ("train", "table", "sampling", "profile")
METHODS = ("edm", "ict", "ect", "cd", "sct", "scd")
FLOP_BATCH = 4


@dataclass(frozen=True)
class Case:
    """A problem of the literature: where it comes from, the network, the batch on one GPU."""

    dataset: str
    network: dict[str, Any]
    batch: int
    conditional: bool = False


CASES = {
    "cifar10-ddpmpp": Case("cifar10", {"name": "ddpmpp", "dropout": 0.13, "augment_dim": 9}, 512),
    "imagenet64-edm2-s": Case("imagenet64", {"name": "edm2"}, 256, conditional=True),
    "cifar10-demo": Case(
        "cifar10", {"name": "ddpmpp", "channels": 64, "channel_mult": [1, 2, 2], "blocks": 2}, 512
    ),
    "smoke": Case("cifar10", {"name": "unet-tiny", "channels": 8}, 8),
}


@dataclass(frozen=True)
class Variant:
    """How a step is carried out."""

    label: str
    precision: str = "bf16"
    tf32: bool = False
    channels_last: bool = True
    compiled: bool = True
    fused: bool = True


FULL = Variant("compiled, fused")
TABLE = (
    Variant("eager fp32", "fp32", False, False, False, False),
    Variant("eager TF32", "fp32", True, False, False, False),
    Variant("+ bf16", "bf16", False, False, False, False),
    Variant("+ channels_last", "bf16", False, True, False, False),
    Variant("+ compile", "bf16", False, True, True, False),
    Variant("+ fused optimizer, foreach EMA", "bf16", False, True, True, True),
)


class Bench:
    """The session: options, device, results so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        smoke = options.cpu_smoke
        self.device = torch.device("cpu" if smoke else "cuda")
        if not smoke and not torch.cuda.is_available():
            raise UserError(
                "benchmarks/gpu.py",
                "torch sees no CUDA device",
                remedy="run it on a machine with a GPU, or give --cpu-smoke",
            )
        self.began = time.perf_counter()
        self.out = Path(options.out) if options.out else None
        folder = tempfile.mkdtemp(prefix="cmbench-gpu-")
        self.context = Context(load_plugins(), Workspace(Path(folder)), device=self.device)
        told = {k: v for k, v in vars(options).items() if k != "out"}  # a path of this machine
        self.results: dict[str, Any] = {"script": Path(__file__).name, "options": told}
        self._datasets: dict[str, ArrayDataset] = {}

    # ---- results -------------------------------------------------------------------------------

    def left(self) -> float:
        """Seconds that remain."""
        return float(self.options.seconds) - (time.perf_counter() - self.began)

    def put(self, value: Any, *path: str) -> None:
        """Store a result, print it, write the file."""
        table = self.results
        for key in path[:-1]:
            table = table.setdefault(key, {})
        table[path[-1]] = value
        self.results["elapsed_s"] = round(time.perf_counter() - self.began, 1)
        print(
            f"[{self.results['elapsed_s']:7.1f}s] {' / '.join(path)}: {json.dumps(value)}",
            flush=True,
        )
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.out, (json.dumps(self.results, indent=1) + "\n").encode())

    def attempt(self, work: Callable[[], None], *path: str, needs_s: float = 20.0) -> None:
        """Do one measurement; what goes wrong is its result, and the next one follows."""
        if self.left() < needs_s:
            self.put({"skipped": f"{self.left():.0f} s left"}, *path)
            return
        try:
            work()
        except Exception as error:
            line = " ".join(f"{type(error).__name__}: {error}".split())[:600]
            self.put({"error": line}, *path)
            if not isinstance(error, torch.OutOfMemoryError | UserError):
                traceback.print_exc()
        finally:
            self.free()

    def free(self) -> None:
        """Give memory back between measurements."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def sync(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    # ---- parts of a training -------------------------------------------------------------------

    def dataset(self, case: Case) -> ArrayDataset:
        """Return random bytes of the dataset's shape, resident on the device."""
        if case.dataset not in self._datasets:
            spec = self.context.plugins.datasets.get(case.dataset)
            count = 256 if self.options.cpu_smoke else 20_000
            rng = np.random.default_rng(0)
            pixels = rng.integers(0, 256, (count, *spec.data_shape), dtype=np.uint8)
            labels = rng.integers(0, max(spec.num_classes, 1), count)
            stub = ArrayDataset(spec, pixels, labels, sha256="0" * 64, revision="random bytes")
            self._datasets[case.dataset] = stub.to(self.device)
        return self._datasets[case.dataset]

    def plan(self, method: str, case: Case, batch: int, **config: Any) -> RunPlan:
        """Resolve a method with its published optimizer where it has a recipe, else defaults."""
        plugins = self.context.plugins
        spec = plugins.methods.get(method)
        method_class: Any = plugins.methods.load(method)
        table = merge(
            {
                "network": case.network,
                "conditional": case.conditional,
                "batch_size": batch,
                "duration_kimg": 200_000,
                "precision": "bf16",
                "optimizer": {"name": "radam" if method != "edm" else "adam", "lr": 1e-4},
            },
            config,
        )
        resolved = method_class.Config.model_validate(table)
        return RunPlan(spec, case.dataset, "benchmark", 0, resolved, None, method_class)

    def teacher(self, case: Case, variant: Variant, parameterization: str) -> Teacher:
        """Return a diffusion model with random weights."""
        plan = self.plan("edm", case, 1, parameterization=parameterization)
        method, modules = build_modules(self.context, plan, None)
        for name, module in modules.items():
            module.eval().requires_grad_(False)
            modules[name] = to_device(module, self.device, channels_last=variant.channels_last)
        nets = {
            n: CountedNetwork(m, variant.precision, variant.compiled) for n, m in modules.items()
        }
        return Teacher("random", method.diffusion_model(nets), modules["model"])

    def training(
        self, method: str, case: Case, batch: int, variant: Variant, shard: int | None = None
    ) -> Training:
        """Set up a training as ``cmbench run`` does; ``shard`` images go through at a time."""
        plan = self.plan(method, case, batch, precision=variant.precision)
        needs = "trigflow" if method in ("sct", "scd", "pd") else "edm"
        teacher = None if method == "edm" or method == "ict" else self.teacher(case, variant, needs)
        built, modules = build_modules(self.context, plan, teacher)
        modules = {
            n: to_device(m, self.device, channels_last=variant.channels_last)
            for n, m in modules.items()
        }
        state = TrainingState(built, modules)
        settings = Settings(
            seed=0,
            batch_size=batch,
            microbatch_size=shard,
            precision=variant.precision,
            compile=variant.compiled,
            log_seconds=1e9,
        )
        trainer = Trainer(state, DatasetFeed(self.dataset(case), plan.config), settings)
        state.enter(0)
        if not variant.fused:
            unfuse(state)
        return Training(trainer)


@dataclass
class Training:
    """A training that can be stepped."""

    trainer: Trainer

    @property
    def state(self) -> TrainingState:
        """What is trained."""
        return self.trainer.state

    def step(self) -> None:
        """One step of the engine."""
        self.trainer.train_step()

    @property
    def parameters(self) -> int:
        """Parameters of the model."""
        return sum(p.numel() for p in self.state.modules["model"].parameters())


def unfuse(state: TrainingState) -> None:
    """Put a loop over parameters in place of the fused optimizer and the multi-tensor average."""
    state.optimizers = [
        type(optimizer)(optimizer.param_groups[0]["params"], lr=1e-4, foreach=False)
        for optimizer in state.optimizers
    ]

    def loop(average: Any) -> Callable[..., None]:
        @torch.no_grad()
        def update(*, batch_size: int, nimg: int) -> None:
            for kept, weight in zip(average.average, average._source, strict=True):
                kept.lerp_(weight, 0.001)

        return update

    for average in state.averages:
        average.update = loop(average)  # type: ignore[method-assign]


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Allow or forbid TF32 in matrix products and convolutions."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


# ---- measurements ----------------------------------------------------------------------------


def measure_ceiling(bench: Bench) -> None:
    """Time bf16 matrix products on random data; the best size is the ceiling."""
    found: dict[str, float] = {}
    for side in (128,) if bench.options.cpu_smoke else (4096, 8192, 12288):
        a = torch.randn(side, side, device=bench.device, dtype=torch.bfloat16)
        b = torch.randn(side, side, device=bench.device, dtype=torch.bfloat16)
        for _ in range(3):
            a @ b
        bench.sync()
        began = time.perf_counter()
        for _ in range(10):
            a @ b
        bench.sync()
        found[str(side)] = round(20 * side**3 / (time.perf_counter() - began) / 1e12, 2)
    bench.put({"bf16_tflops_by_side": found, "bf16_tflops": max(found.values())}, "ceiling")


def count_flops(bench: Bench, method: str, case: Case) -> float:
    """Return the FLOPs of one eager training step, an image."""
    variant = Variant("count", compiled=False)
    training = bench.training(method, case, FLOP_BATCH, variant)
    with FlopCounterMode(display=False) as counter:
        training.step()
    return counter.get_total_flops() / FLOP_BATCH


def time_steps(bench: Bench, training: Training, steps: int) -> dict[str, Any]:
    """Warm up (which compiles), then time ``steps`` steps between two synchronisations."""
    warm: list[float] = []
    for _ in range(3):
        bench.sync()
        began = time.perf_counter()
        training.step()
        bench.sync()
        warm.append(time.perf_counter() - began)
    began = time.perf_counter()
    for _ in range(steps):
        training.step()
    issued = time.perf_counter() - began
    bench.sync()
    seconds = (time.perf_counter() - began) / steps
    found = {
        "step_ms": round(seconds * 1e3, 3),
        "images_per_s": round(training.trainer.settings.batch_size / seconds, 1),
        "host_ms": round(issued / steps * 1e3, 3),
        "warm_up_s": [round(w, 2) for w in warm],
        "batch": training.trainer.settings.batch_size,
        "shard": training.trainer.settings.microbatch_size or training.trainer.settings.batch_size,
        "parameters": training.parameters,
    }
    if bench.device.type == "cuda":
        found["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        found["synchronisations"] = synchronisations(training)
    return found


def synchronisations(training: Training) -> list[str]:
    """Return where one step made the host wait for the GPU (must be nowhere)."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            training.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = [w for w in caught if "synchroniz" in str(w.message)]
    return sorted({f"{Path(w.filename).name}:{w.lineno}" for w in found})


def with_fitting_shard(bench: Bench, batch: int, work: Callable[[int], Any]) -> Any:
    """Call ``work`` with the shard of a batch, halved until it fits."""
    shard = batch
    while True:
        try:
            return work(shard)
        except (torch.OutOfMemoryError, BrokenRunError) as error:
            if not out_of_memory(error) or shard < 32 or shard % 2:
                raise
            print(f"{shard} images at a time do not fit", flush=True)
            shard //= 2
        bench.free()


def out_of_memory(error: BaseException) -> bool:
    """Say whether an error is torch's for want of memory, or the engine's explanation of one."""
    return isinstance(error, torch.OutOfMemoryError) or isinstance(
        error.__cause__, torch.OutOfMemoryError
    )


def measure_training(bench: Bench, name: str, case: Case, method: str) -> None:
    """Images a second, utilisation, memory of one method."""
    flops = count_flops(bench, method, case)
    bench.free()

    batch = bench.options.batch or case.batch

    def work(shard: int) -> dict[str, Any]:
        training = bench.training(method, case, batch, bench_variant(bench), shard)
        return time_steps(bench, training, bench.options.steps)

    with tf32(FULL.tf32):
        found = with_fitting_shard(bench, batch, work)
    rate = flops * found["images_per_s"] / 1e12
    found |= {"gflops_per_image": round(flops / 1e9, 3), "tflops": round(rate, 2)}
    ceiling = bench.results.get("ceiling", {}).get("bf16_tflops")
    if ceiling:
        found["utilisation"] = round(rate / ceiling, 4)
    base = bench.results.get("train", {}).get(name, {}).get("edm", {})
    if method == "edm" or "step_ms" in base:
        found["step_over_edm"] = round(found["step_ms"] / base.get("step_ms", found["step_ms"]), 3)
    bench.put(found, "train", name, method)


def bench_variant(bench: Bench) -> Variant:
    """Return the engine's defaults on this device."""
    return replace(FULL, compiled=not bench.options.no_compile)


def measure_table(bench: Bench, name: str, case: Case) -> None:
    """The same step of ``edm``, one improvement after another."""
    batch = bench.options.batch or case.batch

    def row(variant: Variant) -> None:
        def work(shard: int) -> dict[str, Any]:
            training = bench.training("edm", case, batch, variant, shard)
            return time_steps(bench, training, max(bench.options.steps // 2, 2))

        with tf32(variant.tf32):
            found = with_fitting_shard(bench, batch, work)
        table = bench.results.get("table", {}).get(name, {})
        first = next(iter(table.values()), {}).get("images_per_s", found["images_per_s"])
        found["speed_up"] = round(found["images_per_s"] / first, 2)
        bench.put(found, "table", name, variant.label)

    for variant in TABLE:
        if variant.compiled and bench.options.no_compile:
            continue
        bench.attempt(lambda v=variant: row(v), "table", name, variant.label)  # type: ignore[misc]


def measure_sampling(bench: Bench, name: str, case: Case) -> None:
    """Images a second at few NFE, and what share of the wall time is not the network."""
    plan = bench.plan("ict", case, 1)
    method, modules = build_modules(bench.context, plan, None)
    modules = {n: to_device(m, bench.device, channels_last=True) for n, m in modules.items()}
    dataset, batch = bench.dataset(case), bench.options.sample_batch
    batches = 3 if bench.options.cpu_smoke else 8
    for precision in ("fp32", "bf16"):
        for nfe in (1, 2, 4):
            with tf32(FULL.tf32):
                sampler = Sampler(
                    method,
                    modules,
                    method.plan_sampling(nfe),
                    seed=0,
                    labels=lambda start, count: dataset.labels_for(count, 0, start),
                    precision=precision,
                    compiled=not bench.options.no_compile,
                )
                found = time_sampling(bench, sampler, nfe, batch, batches)
            bench.put(found, "sampling", name, precision, f"nfe-{nfe}")


@torch.no_grad()
def time_sampling(
    bench: Bench, sampler: Sampler, nfe: int, batch: int, batches: int
) -> dict[str, Any]:
    """Time a stream of batches, then the network alone on the same shapes."""
    began = time.perf_counter()
    for _ in sampler.stream(2 * batch, batch):
        pass
    bench.sync()
    warm = time.perf_counter() - began
    sampler.seconds = 0.0
    began = time.perf_counter()
    for _ in sampler.stream(batches * batch, batch, first=2 * batch):
        pass
    bench.sync()
    wall = time.perf_counter() - began

    net: nn.Module | Any = sampler.nets["model"]
    x = torch.randn(batch, *sampler.method.data.data_shape, device=bench.device)
    c = torch.randn(batch, device=bench.device)
    classes = sampler.method.data.num_classes
    labels = torch.zeros(batch, dtype=torch.int64, device=bench.device) if classes else None
    for _ in range(2):
        net(x, c, labels)
    bench.sync()
    began = time.perf_counter()
    for _ in range(batches * nfe):
        net(x, c, labels)
    bench.sync()
    network = time.perf_counter() - began
    return {
        "images_per_s": round(batches * batch / wall, 1),
        "network_images_per_s": round(batches * batch / network, 1),
        "share_not_network": round(max(1 - network / wall, 0.0), 4),
        "batch": batch,
        "warm_up_s": round(warm, 2),
    }


def measure_profile(bench: Bench, name: str, case: Case, method: str) -> None:
    """Print where a step's GPU time goes."""
    from torch.profiler import ProfilerActivity, profile

    training = bench.training(method, case, bench.options.batch or case.batch, bench_variant(bench))
    cuda = bench.device.type == "cuda"
    with tf32(FULL.tf32):
        for _ in range(3):
            training.step()
        bench.sync()
        with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as prof:
            for _ in range(2):
                training.step()
            bench.sync()
    events = prof.key_averages()
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    total = sum(getattr(e, key) for e in events) or 1.0
    rows = sorted(events, key=lambda e: -getattr(e, key))[:30]
    bench.put(
        [
            [
                f"{getattr(e, key) / total:.1%}",
                round(getattr(e, key) / 2e3, 3),
                e.count // 2,
                e.key[:110],
            ]
            for e in rows
        ],
        "profile",
        name,
        method,
    )


def hardware(bench: Bench) -> None:
    """Record what this was measured on."""
    gpu: dict[str, Any] = {}
    if bench.device.type == "cuda":
        properties = torch.cuda.get_device_properties(bench.device)
        gpu = {
            "name": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
        import triton

        gpu["triton"] = triton.__version__
    known = environment(torch.get_num_threads(), bench.context.gpu)
    bench.put(gpu, "gpu")
    bench.put(known.model_dump(mode="json"), "environment")


def parse() -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument(
        "--parts",
        default="train,table,sampling",
        help=f"of {','.join(PARTS)} [default: all but profile]",
    )
    parser.add_argument(
        "--case",
        default="cifar10-ddpmpp,imagenet64-edm2-s",
        help=f"of {','.join(CASES)} [default: %(default)s]",
    )
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--batch", type=int, default=0, help="images a step [default: the case's]")
    parser.add_argument("--sample-batch", type=int, default=500)
    parser.add_argument("--steps", type=int, default=20, help="timed steps")
    parser.add_argument("--seconds", type=float, default=1e6, help="start nothing after this long")
    parser.add_argument("--no-compile", action="store_true", help="eager networks everywhere")
    parser.add_argument("--cpu-smoke", action="store_true", help="a tiny problem on the CPU")
    options = parser.parse_args()
    if options.cpu_smoke:
        options.case, options.steps, options.sample_batch = "smoke", 2, 8
    unknown = set(options.parts.split(",")) - set(PARTS)
    unknown |= set(options.case.split(",")) - set(CASES)
    if unknown:
        parser.error(f"unknown {', '.join(sorted(unknown))}")
    return options


def measure_part(bench: Bench, part: str, name: str, case: Case) -> None:
    """Measure one part of one case, every method of it where it has methods."""
    if part == "table":
        measure_table(bench, name, case)
    elif part == "sampling":
        bench.attempt(lambda: measure_sampling(bench, name, case), "sampling", name, "state")
    else:
        work = measure_training if part == "train" else measure_profile
        for method in bench.options.methods.split(","):
            bench.attempt(
                lambda m=method: work(bench, name, case, m),  # type: ignore[misc]
                part,
                name,
                method,
            )


#: By part, the figures of its summary and their headings.
SUMMARY = {
    "train": {
        "images_per_s": "images/s",
        "utilisation": "utilisation",
        "step_ms": "ms a step",
        "step_over_edm": "of edm's step",
        "gflops_per_image": "GFLOP an image",
        "peak_memory_gib": "GiB",
    },
    "table": {"step_ms": "ms a step", "images_per_s": "images/s", "speed_up": "speed-up"},
    "sampling": {"images_per_s": "images/s", "share_not_network": "not the network"},
}


def print_summary(results: dict[str, Any]) -> None:
    """Print the figures once more, a table a part and case."""
    for part, columns in SUMMARY.items():
        for name, rows in results.get(part, {}).items():
            print(f"\n{part}, {name}: {' | '.join(columns.values())}")
            for row, found in flat_rows(rows):
                figures = " | ".join(str(found.get(key, "-")) for key in columns)
                print(f"  {row:32} {found.get('error') or found.get('skipped') or figures}")


def flat_rows(rows: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the measurements of nested tables, each with its path."""
    for key, value in rows.items():
        nested = isinstance(value, dict) and any(isinstance(v, dict) for v in value.values())
        if nested:
            yield from flat_rows(value, f"{prefix}{key} ")
        elif isinstance(value, dict):
            yield f"{prefix}{key}", value


def main() -> int:
    """Run the parts asked for; the exit code says whether every measurement succeeded."""
    options = parse()
    bench = Bench(options)
    hardware(bench)
    measure_ceiling(bench)
    for name in options.case.split(","):
        for part in options.parts.split(","):
            measure_part(bench, part, name, CASES[name])
    print_summary(bench.results)
    return int('"error"' in json.dumps(bench.results))


if __name__ == "__main__":
    sys.exit(main())

"""What ``cmbench prepare`` costs beside a bare decode loop, and how fast its result is read.

    python benchmarks/data.py [--images N] [--workers N] [--repeats N] [--archive FILE]
                              [--json FILE]

Decoding: 60,000 pictures of 32x32 pixels, as an EDM zip of PNGs and as class folders of JPEGs, are
prepared by ``cmbench prepare`` and decoded by as many processes of a bare Pillow loop that has the
encoded bytes in memory. The two alternate, so that other load hits both alike; the ratio of the
rates is reported by wall time and by processor time. ``--archive`` adds a packed tar (for example
cifar10-jpeg.tar.xz), whose bare loop reads the same unpacked bytes.

Reading: shuffled batches gathered from the memory map into one reused buffer (the copy to the
device), on one core, beside a plain memory copy of as many bytes.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from cmbench.data.locations import DataLocations
from cmbench.data.sources.base import EncodedSource
from cmbench.data.sources.detect import open_source

CLASSES = 10


class Cost(NamedTuple):
    """Seconds on the clock and seconds of processor, all processes together."""

    wall_s: float
    cpu_s: float


def pictures(count: int) -> Iterator[Image.Image]:
    """Smooth pictures with some grain: they pack about as photographs do."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((32, 32), Image.Resampling.BICUBIC)).astype(np.int16)
        grain = rng.integers(-12, 13, (32, 32, 3), dtype=np.int16)
        yield Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def make_zip(path: Path, count: int) -> None:
    """An archive as EDM's dataset tool makes it: stored PNGs that are not compressed."""
    labels = []
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for i, image in enumerate(pictures(count)):
            name = f"{i // 1000:05d}/img{i:08d}.png"
            archive.writestr(name, encoded(image, "png", compress_level=0))
            labels.append([name, i % CLASSES])
        archive.writestr("dataset.json", json.dumps({"labels": labels}))


def make_folder(path: Path, count: int) -> None:
    """Class folders of JPEGs."""
    for c in range(CLASSES):
        (path / f"class-{c}").mkdir(parents=True)
    for i, image in enumerate(pictures(count)):
        data = encoded(image, "jpeg", quality=75)
        (path / f"class-{i % CLASSES}" / f"{i:05d}.jpg").write_bytes(data)


# ---- decoding ----------------------------------------------------------------------------------


def cpu_seconds() -> float:
    mine, theirs = (
        resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return mine.ru_utime + mine.ru_stime + theirs.ru_utime + theirs.ru_stime


def timed(call: Callable[[], object]) -> Cost:
    wall, cpu = time.perf_counter(), cpu_seconds()
    call()
    return Cost(time.perf_counter() - wall, cpu_seconds() - cpu)


def _bare_worker(datas: list[bytes], start: Any, results: Any) -> None:
    Image.open(io.BytesIO(datas[0])).load()  # import the decoder before the clock runs
    start.wait()
    wall, cpu = time.perf_counter(), time.process_time()
    for data in datas:
        np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    results.put((wall, time.perf_counter(), time.process_time() - cpu))


def bare_loop(datas: list[bytes], workers: int) -> Cost:
    """Decode in ``workers`` processes that hold their share of the bytes already."""
    context = multiprocessing.get_context("fork")
    start, results = context.Barrier(workers), context.Queue()
    children = [
        context.Process(target=_bare_worker, args=(datas[i::workers], start, results))
        for i in range(workers)
    ]
    for child in children:
        child.start()
    found = [results.get() for _ in children]
    for child in children:
        child.join()
    begin, end, cpu = zip(*found)
    return Cost(max(end) - min(begin), sum(cpu))


def measure_decoding(source: Path, workers: int, repeats: int) -> dict[str, float]:
    """Prepare ``source`` and run the bare loop over its images, in turn."""
    with tempfile.TemporaryDirectory(prefix="cmbench-bench-") as scratch:
        opened = open_source(source, spool=Path(scratch) / "spool")
        assert isinstance(opened, EncodedSource)
        index, reader = opened.index(), opened.reader()
        datas = [reader.read(locator) for locator in index.locators]
        bare, ours = [], []
        for i in range(repeats):
            target = Path(scratch) / f"data{i}"
            bare.append(bare_loop(datas, workers))
            ours.append(timed(partial(prepare_at, source, target, workers)))
            shutil.rmtree(target)
    count = len(datas)
    wall = [b.wall_s / o.wall_s for b, o in zip(bare, ours)]
    cpu = [b.cpu_s / o.cpu_s for b, o in zip(bare, ours)]
    return {
        "images": count,
        "workers": workers,
        "bare_images_per_s": count / statistics.median(b.wall_s for b in bare),
        "prepare_images_per_s": count / statistics.median(o.wall_s for o in ours),
        "ratio_wall": statistics.median(wall),
        "ratio_cpu": statistics.median(cpu),
    }


def prepare_at(source: Path, target: Path, workers: int) -> None:
    # Imported here, as the command line does: a worker process imports the main module again, and
    # should find there no more than it does under `cmbench prepare`.
    from cmbench.data.catalog import CIFAR10_JPEG
    from cmbench.data.preparation.run import Request, prepare
    from cmbench.data.rules import RULES

    rule = replace(RULES["cifar10-jpeg"], count=None)
    prepare(CIFAR10_JPEG, rule, Request(source, workers=workers), DataLocations(target))


# ---- reading -----------------------------------------------------------------------------------


def measure_reading(source: Path, repeats: int, batch: int = 512) -> dict[str, float]:
    """Gather every image once, in shuffled batches, into one buffer; copy as much by memcpy."""
    import torch

    from cmbench.data.catalog import CIFAR10_JPEG
    from cmbench.data.prepared import build

    torch.set_num_threads(1)
    rates: dict[str, list[float]] = {"shuffled": [], "in_order": [], "memcpy": []}
    with tempfile.TemporaryDirectory(prefix="cmbench-bench-") as scratch:
        locations = DataLocations(Path(scratch))
        prepare_at(source, Path(scratch), 1)
        dataset = build(CIFAR10_JPEG, locations)
        assert dataset.size is not None
        images = dataset.host_pixels
        buffer = torch.empty((batch, *dataset.data_shape), dtype=torch.uint8)
        steps = dataset.size // batch
        total = steps * buffer.numel()
        plain = np.array(images[: steps * batch]).reshape(steps, *buffer.shape)

        def shuffled(epoch: int) -> None:
            for step in range(steps):
                part = dataset._stream.take(epoch * dataset.size + step * batch, batch, 0)
                dataset.gather(part.indices, buffer)

        def in_order() -> None:
            for pixels in dataset.reference_images(batch):
                buffer[: len(pixels)].copy_(pixels)

        def memcpy() -> None:
            for step in range(steps):
                np.copyto(buffer.numpy(), plain[step])

        for epoch in range(repeats + 1):
            for name, call in (
                ("shuffled", lambda epoch=epoch: shuffled(epoch)),
                ("in_order", in_order),
                ("memcpy", memcpy),
            ):
                cost = timed(call)
                if epoch:
                    rates[name].append(total / cost.cpu_s / 1e9)
    found = {f"{name}_gb_per_s": statistics.median(values) for name, values in rates.items()}
    ratio = found["shuffled_gb_per_s"] / found["memcpy_gb_per_s"]
    return found | {"shuffled_over_memcpy": ratio}


# ---- all of it ---------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=60_000)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--archive", type=Path, help="a packed tar of images to measure too")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="cmbench-bench-") as scratch:
        archive, folder = Path(scratch) / "edm.zip", Path(scratch) / "folders"
        make_zip(archive, options.images)
        make_folder(folder, options.images)
        sources = {"zip of PNG": archive, "folders of JPEG": folder}
        if options.archive:
            sources[f"tar ({options.archive.name})"] = options.archive
        for name, source in sources.items():
            figures[name] = measure_decoding(source, options.workers, options.repeats)
            show(name, figures[name])
        figures["reading"] = measure_reading(archive, options.repeats)
        show("reading", figures["reading"])
    if options.json:
        tools = {"numpy": np.__version__, "pillow": Image.__version__, "cpus": os.cpu_count()}
        options.json.write_text(json.dumps({"figures": figures, "tools": tools}, indent=1) + "\n")


def show(name: str, figures: dict[str, float]) -> None:
    values = ", ".join(f"{key} {value:.4g}" for key, value in figures.items())
    print(f"{name}: {values}", flush=True)


if __name__ == "__main__":
    main()

"""Train the extractor of the `cifar10-jpeg` benchmark; write weights, hash and measurements.

    python benchmarks/train_cifar_extractor.py --source cifar10-jpeg.tar.xz
    python benchmarks/train_cifar_extractor.py --source FOLDER --epochs 1 --limit 200 --out /tmp/w

``--source`` is the archive or the folder with ``train/<class>/<n>.jpg`` and ``test/…``. Two to
three minutes on one GPU, seven an epoch on a CPU core with bfloat16 units (``--bf16``). One seed;
as repeatable as the device's convolutions are.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from cmbench.files import sha256_file, write_atomically
from cmbench.metrics._files import write_tensors
from cmbench.metrics.frechet import frechet_distance
from cmbench.metrics.quantize import quantize
from cmbench.metrics.shipped_cnn import SHIPPED, CifarExtractor, CifarNetwork
from cmbench.metrics.statistics import moments_of

SEED = 20240602
BATCH_SIZE = 512
PEAK_LEARNING_RATE = 0.4
WEIGHT_DECAY = 5e-4
CUTOUT = 8
#: Images that distances are measured on: of the training set, evenly spaced, and of noise.
MEASURED, NOISE = 10_000, 2_000

Split = tuple[Tensor, Tensor]


def entries(source: Path) -> Iterator[tuple[str, bytes]]:
    """Yield ``split/class/name.jpg`` with its bytes, from a folder or an archive."""
    if source.is_dir():
        for path in sorted(source.glob("*/*/*.jpg")):
            yield path.relative_to(source).as_posix(), path.read_bytes()
        return
    with tarfile.open(source) as archive:
        for member in archive:
            file = archive.extractfile(member) if member.isfile() else None
            if file is not None:
                yield member.name.removeprefix("./"), file.read()


def load_splits(source: Path, limit: int | None) -> dict[str, Split]:
    """Return uint8 images ``[N, 3, 32, 32]`` and labels ``[N]`` of train and test."""
    pixels: dict[str, list[tuple[str, str, bytes]]] = {"train": [], "test": []}
    for name, data in entries(source):
        parts = name.split("/")
        if len(parts) == 3 and parts[0] in pixels and parts[2].endswith(".jpg"):
            pixels[parts[0]].append((parts[1], parts[2], data))
    if not pixels["train"] or not pixels["test"]:
        raise SystemExit(f"{source}: no train/<class>/<n>.jpg and test/<class>/<n>.jpg in it")
    classes = sorted({label for label, _, _ in pixels["train"]})
    found = {}
    for split, items in pixels.items():
        items.sort(key=lambda item: item[:2])
        items = items[:: max(1, len(items) // limit)][:limit] if limit else items
        images = np.stack(
            [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for _, _, data in items]
        )
        labels = torch.tensor([classes.index(label) for label, _, _ in items])
        found[split] = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), labels
    return found


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror, shift by up to four pixels, cut a square out; ``images`` in [-1, 1]."""
    n, device = len(images), images.device
    flip = torch.rand(n, generator=generator) < 0.5
    shift = torch.randint(0, 9, (2, n, 1), generator=generator)
    hole = torch.randint(0, 32, (2, n, 1), generator=generator)
    flip, shift, hole = (t.to(device, non_blocking=True) for t in (flip, shift, hole))
    images = torch.where(flip[:, None, None, None], images.flip(3), images)
    padded = functional.pad(images, (4, 4, 4, 4), mode="reflect")
    line = torch.arange(32, device=device)
    rows, columns = line + shift[0], line + shift[1]
    which = torch.arange(n, device=device)[:, None, None]
    images = padded.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None, :]]
    inside = ((line - hole[0]).abs() <= CUTOUT // 2)[:, :, None] & (
        (line - hole[1]).abs() <= CUTOUT // 2
    )[:, None, :]
    return images.masked_fill(inside[..., None], 0.0).permute(0, 3, 1, 2)


def train_network(train: Split, epochs: int, device: torch.device, *, bf16: bool) -> CifarNetwork:
    """Train with SGD under a one-cycle schedule, convolutions in bfloat16 if ``bf16``."""
    torch.manual_seed(SEED)
    network = CifarNetwork().to(device).to(memory_format=torch.channels_last)
    images, labels = train[0].to(device), train[1].to(device)
    batch_size = min(BATCH_SIZE, len(images))
    steps = epochs * (len(images) // batch_size)
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=PEAK_LEARNING_RATE,
        momentum=0.9,
        nesterov=True,
        weight_decay=WEIGHT_DECAY,
        foreach=True,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_LEARNING_RATE, max(steps, 2), pct_start=0.2
    )
    generator = torch.Generator().manual_seed(SEED)
    began = time.perf_counter()
    for epoch in range(epochs):
        order = torch.randperm(len(images), generator=generator).to(device)
        for batch in order.split(batch_size)[: len(images) // batch_size]:
            x = augment(images[batch].float() / 127.5 - 1, generator)
            x = x.contiguous(memory_format=torch.channels_last)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                _, logits = network(x)
            loss = functional.cross_entropy(logits.float(), labels[batch], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if epoch % 5 == 0 or epoch == epochs - 1 or device.type == "cpu":
            print(
                f"epoch {epoch + 1}/{epochs}: loss {loss.item():.3f}, "
                f"{time.perf_counter() - began:.0f} s",
                flush=True,
            )
    return network.eval()


def stored(network: CifarNetwork) -> dict[str, Tensor]:
    """Return what is shipped: convolutions in bfloat16, everything else in float32."""
    state = {k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()}
    return {k: v.to(torch.bfloat16) if v.ndim == 4 else v for k, v in state.items()}


def features_of(extractor: CifarExtractor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return features and logits of uint8 images, on the CPU."""
    parts = [extractor(batch) for batch in images.split(1000)]
    logits = [p.logits.cpu() for p in parts if p.logits is not None]
    return torch.cat([p.pool.cpu() for p in parts]), torch.cat(logits)


def measure(extractor: CifarExtractor, splits: dict[str, Split]) -> dict[str, float | int]:
    """Return test accuracy, the floor between disjoint real sets, and noise's distance."""
    images = splits["train"][0]
    train, _ = features_of(extractor, images[:: max(len(images) // MEASURED, 1)])
    test, logits = features_of(extractor, splits["test"][0])
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    halves = [moments_of(train[part]) for part in order.chunk(2)]
    every = moments_of(train)
    generator = torch.Generator().manual_seed(0)
    shape = (min(NOISE, len(train)), 3, 32, 32)
    noise = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    gauss = quantize(torch.randn(shape, generator=generator), "round")
    return {
        "test_accuracy": float((logits.argmax(1) == splits["test"][1]).double().mean()),
        "test_images": len(test),
        "measured_train_images": len(train),
        "floor_real_halves": frechet_distance(*halves),
        "test_set": frechet_distance(moments_of(test), every),
        "uniform_noise": frechet_distance(moments_of(features_of(extractor, noise)[0]), every),
        "gaussian_noise": frechet_distance(moments_of(features_of(extractor, gauss)[0]), every),
        "covariance_rank": int(torch.linalg.matrix_rank(every.cov, hermitian=True)),
    }


def main() -> int:
    """Train, write, measure what was written."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--source", type=Path, required=True, help="archive or folder of JPEGs")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--limit", type=int, help="images of each split, for a smoke run")
    parser.add_argument(
        "--measure-only",
        action="store_true",
        help="measure weights that an interrupted run with these options has left",
    )
    parser.add_argument("--bf16", action="store_true", help="on the CPU too [default: on a GPU]")
    parser.add_argument("--out", type=Path, default=SHIPPED, help="folder of the weights")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bf16 = arguments.bf16 or device.type == "cuda"
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    began = time.perf_counter()
    splits = load_splits(arguments.source, arguments.limit)
    loaded = time.perf_counter() - began
    path = arguments.out / "cifar-cnn.safetensors"
    trained = None
    if not arguments.measure_only:
        network = train_network(splits["train"], arguments.epochs, device, bf16=bf16)
        trained = round(time.perf_counter() - began - loaded, 1)
        write_tensors(path, stored(network), {"kind": CifarExtractor.name})
    facts: dict[str, object] = {"name": "cifar-cnn", "sha256": sha256_file(path)}
    write_atomically(path.with_suffix(".json"), json.dumps(facts).encode())
    facts |= {
        "made_by": f"benchmarks/{Path(__file__).name}",
        "data": "CIFAR-10 re-encoded as JPEG, quality about 75, 4:2:0 (lossy)",
        "train_images": len(splits["train"][0]),
        "epochs": arguments.epochs,
        "precision": "bf16" if bf16 else "fp32",
        "parameters": sum(p.numel() for p in CifarNetwork().parameters()),
        "torch": torch.__version__.split("+")[0],
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "seconds_loading": round(loaded, 1),
        "seconds_training": trained,
        **measure(CifarExtractor(path).to(device), splits),
    }
    write_atomically(path.with_suffix(".json"), (json.dumps(facts, indent=2) + "\n").encode())
    print(json.dumps(facts, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())

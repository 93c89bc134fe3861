"""Train the extractor of the `digits` benchmark and write its weights, hash and measurements.

    python benchmarks/train_digits_extractor.py            # writes cmbench/metrics/weights/
    python benchmarks/train_digits_extractor.py --check    # trains again and compares with the file

Deterministic: one thread, one seed, CPU. The data are the UCI handwritten digits as scikit-learn
ships them (CC BY 4.0): 8x8, values 0..16, stored as bytes by round(v * 255 / 16).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional

from cmbench.files import sha256_file, write_atomically
from cmbench.metrics._files import read_tensors, write_tensors
from cmbench.metrics.frechet import frechet_distance
from cmbench.metrics.quantize import quantize
from cmbench.metrics.shipped_cnn import SHIPPED, DigitsExtractor, DigitsNetwork
from cmbench.metrics.statistics import moments_of

WEIGHTS = SHIPPED / "digits-cnn.safetensors"
SEED = 20240601
HELD_OUT_SHARE = 0.25
EPOCHS = 40
BATCH_SIZE = 64
PEAK_LEARNING_RATE = 3e-3
WEIGHT_DECAY = 1e-2


def load_images() -> tuple[Tensor, Tensor]:
    """Return uint8 images ``[1797, 1, 8, 8]`` and labels ``[1797]``."""
    digits = load_digits()
    pixels = np.round(digits.images * 255 / 16).astype(np.uint8)
    return torch.from_numpy(pixels)[:, None], torch.from_numpy(digits.target).long()


def split(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return indices of a class-balanced train and held-out split."""
    generator = torch.Generator().manual_seed(SEED)
    train, held_out = [], []
    for digit in range(10):
        members = torch.nonzero(labels == digit)[:, 0]
        members = members[torch.randperm(len(members), generator=generator)]
        cut = round(len(members) * HELD_OUT_SHARE)
        held_out.append(members[:cut])
        train.append(members[cut:])
    return torch.cat(train), torch.cat(held_out)


def shift(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift a batch by up to one pixel: the only augmentation."""
    dy, dx = (int(value) for value in torch.randint(-1, 2, (2,), generator=generator))
    padded = functional.pad(images, (1, 1, 1, 1), value=-1.0)
    return padded[:, :, 1 + dy : 9 + dy, 1 + dx : 9 + dx]


def train_network(images: Tensor, labels: Tensor) -> DigitsNetwork:
    """Train with AdamW under a one-cycle schedule; ``images`` in [-1, 1]."""
    torch.manual_seed(SEED)
    network = DigitsNetwork()
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=WEIGHT_DECAY)
    steps = EPOCHS * (len(images) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, steps)
    generator = torch.Generator().manual_seed(SEED)
    for _ in range(EPOCHS):
        order = torch.randperm(len(images), generator=generator)
        for batch in order.split(BATCH_SIZE)[: len(images) // BATCH_SIZE]:
            _, logits = network(shift(images[batch], generator))
            loss = functional.cross_entropy(logits, labels[batch], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def measure(images: Tensor, labels: Tensor, held_out: Tensor) -> dict[str, float | int]:
    """Return held-out accuracy, the floor between disjoint real halves, and noise's distance."""
    extractor = DigitsExtractor()
    features = extractor(images)
    assert features.logits is not None
    correct = features.logits.argmax(1)[held_out] == labels[held_out]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    halves = [moments_of(features.pool[part]) for part in order.chunk(2)]
    every = moments_of(features.pool)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, images.shape, generator=generator, dtype=torch.uint8)
    gauss = quantize(torch.randn(images.shape, generator=generator), "round")
    return {
        "held_out_accuracy": float(correct.double().mean()),
        "held_out_images": len(held_out),
        "floor_real_halves": frechet_distance(*halves),
        "uniform_noise": frechet_distance(moments_of(extractor(noise).pool), every),
        "gaussian_noise": frechet_distance(moments_of(extractor(gauss).pool), every),
        "covariance_rank": int(torch.linalg.matrix_rank(every.cov, hermitian=True)),
    }


def main() -> int:
    """Train, then write or check."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the shipped weights")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    images, labels = load_images()
    train, held_out = split(labels)
    network = train_network(images[train].float() / 127.5 - 1, labels[train])
    if arguments.check:
        shipped, _ = read_tensors(WEIGHTS, DigitsExtractor.name)
        pairs = [(shipped[name], value) for name, value in network.state_dict().items()]
        worst = max(float((a - b).abs().max()) for a, b in pairs)
        print(f"largest difference from {WEIGHTS.name}: {worst:.3g}")
        return int(worst > 0)
    write_tensors(WEIGHTS, network.state_dict(), {"kind": DigitsExtractor.name})
    facts: dict[str, object] = {"name": "digits-cnn", "sha256": sha256_file(WEIGHTS)}
    write_atomically(WEIGHTS.with_suffix(".json"), json.dumps(facts).encode())
    facts |= {
        "made_by": f"benchmarks/{Path(__file__).name}",
        "data": "UCI handwritten digits (scikit-learn load_digits), CC BY 4.0",
        "train_images": len(train),
        "torch": torch.__version__.split("+")[0],
        **measure(images, labels, held_out),
    }
    write_atomically(WEIGHTS.with_suffix(".json"), (json.dumps(facts, indent=2) + "\n").encode())
    print(json.dumps(facts, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())

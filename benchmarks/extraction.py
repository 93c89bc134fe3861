"""From a folder of PNG files to features: ours, torch-fidelity and clean-fid side by side.

    python benchmarks/extraction.py --images 96 --out benchmarks/results/extraction-cpu.json

Random weights in the libraries' own formats, so the work is that of the published networks and the
distances mean nothing. Each library reads and extracts through its public interface, on one thread,
in the same process and in turn; CPU seconds, so other processes disturb little. Features are
compared with the library's own on the same files.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cmbench.metrics.clean_fid import CleanFidExtractor
from cmbench.metrics.extractor import Extractor
from cmbench.metrics.inception import InceptionExtractor
from cmbench.metrics.probe import relative_error
from cmbench.samples.opening import open_samples

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "metrics"))

SIZE = 32


def write_images(folder: Path, count: int) -> Path:
    """Write smooth colour images with noise."""
    folder.mkdir()
    random = np.random.RandomState(0)
    for number in range(count):
        coarse = random.rand(4, 4, 3).repeat(SIZE // 4, 0).repeat(SIZE // 4, 1)
        image = (coarse + 0.1 * random.randn(SIZE, SIZE, 3)).clip(0, 1) * 255
        Image.fromarray(image.astype(np.uint8)).save(folder / f"{number:05}.png")
    return folder


def ours(folder: Path, extractor: Extractor) -> Tensor:
    """Return our features of a folder."""
    batches = open_samples(str(folder)).batches(64)
    return torch.cat([extractor(batch.images).pool for batch in batches])


def torch_fidelity_features(folder: Path, weights: Path) -> Tensor:
    """Return torch-fidelity's 2048 features, through the functions its metrics call."""
    from torch_fidelity.utils import create_feature_extractor, extract_featuresdict_from_input_id

    options: dict[str, Any] = {
        "feature_extractor_weights_path": str(weights),
        "cuda": False,
        "verbose": False,
        "input1": str(folder),
        "batch_size": 64,
        "save_cpu_ram": True,
    }
    key = str(weights)
    if key not in _EXTRACTORS:
        _EXTRACTORS[key] = create_feature_extractor(
            "inception-v3-compat", ["2048", "logits_unbiased"], **options
        )
    found: Tensor = extract_featuresdict_from_input_id(1, _EXTRACTORS[key], **options)["2048"]
    return found


_EXTRACTORS: dict[str, Any] = {}


def clean_fid_features(folder: Path, mode: str, network: Any) -> Tensor:
    """Return clean-fid's features."""
    from cleanfid import fid

    found = fid.get_folder_features(
        str(folder),
        network,
        num_workers=0,
        batch_size=64,
        device=torch.device("cpu"),
        mode=mode,
        verbose=False,
    )
    return torch.from_numpy(found)


def compare(
    first: Callable[[], Tensor], second: Callable[[], Tensor], repeat: int
) -> dict[str, float]:
    """Return CPU seconds of both, measured in turn, their ratio, and how the features differ."""
    times: tuple[list[float], list[float]] = ([], [])
    found: list[Tensor] = []
    for _ in range(repeat):
        found = []
        for work, seconds in zip((first, second), times, strict=True):
            began = time.process_time()
            found.append(work())
            seconds.append(time.process_time() - began)
    count = len(found[0])
    return {
        "images": count,
        "ours_cpu_s_an_image": min(times[0]) / count,
        "library_cpu_s_an_image": min(times[1]) / count,
        "times_faster": min(times[1]) / min(times[0]),
        "times_faster_median_of_pairs": float(
            np.median([b / a for a, b in zip(*times, strict=True)])
        ),
        "relative_difference": relative_error(found[0], found[1]),
    }


def measure(count: int, repeat: int) -> dict[str, dict[str, float]]:
    """Return the figures of every pair."""
    from random_inception import write_random_torchscript, write_random_weights

    with tempfile.TemporaryDirectory() as root:
        weights = write_random_weights(Path(root) / "random.pth")
        detector = write_random_torchscript(weights, Path(root) / "detector.pt")
        folder = write_images(Path(root) / "images", count)
        inception = InceptionExtractor(weights)
        found = {
            "torch-fidelity": compare(
                lambda: ours(folder, inception),
                lambda: torch_fidelity_features(folder, weights),
                repeat,
            )
        }
        for mode in ("legacy-tensorflow", "clean"):
            mine = CleanFidExtractor(
                mode, detector, implementation="fast", fast_location=weights, trust=True
            )
            found[f"clean-fid {mode}"] = compare(
                lambda mine=mine: ours(folder, mine),  # type: ignore[misc]
                lambda mode=mode, mine=mine: clean_fid_features(  # type: ignore[misc]
                    folder, mode.replace("-", "_"), mine.library
                ),
                repeat,
            )
    return found


def versions() -> dict[str, str]:
    """Return what the figures depend on."""
    names = ("torch", "torch-fidelity", "clean-fid", "numpy", "scipy", "pillow")
    return {
        **{name: version(name) for name in names},
        "python": platform.python_version(),
        "processor": processor(),
        "threads": str(torch.get_num_threads()),
    }


def processor() -> str:
    """Return the processor's name, where the system says it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = {"versions": versions(), **measure(arguments.images, arguments.repeat)}
    text = json.dumps(found, indent=2)
    print(text)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()

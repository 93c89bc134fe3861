"""Make the board of `cifar10-jpeg` from what `cifar10_jpeg.py` has packed: records, notes, pages.

    python benchmarks/cifar10_jpeg_board.py OUT          # from the repository's root

OUT is the ``--out`` of `cifar10_jpeg.py`. Unpacks ``records.tar.gz`` into
``leaderboards/cifar10-jpeg/records``, writes ``board.toml`` beside it unless there is one, takes
over the weights of the extractor that measured them where the package ships none, renders every
page and prints what to commit. Nothing here trains or needs a GPU.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cmbench.errors import UserError
from cmbench.records.record import Record, read_record

DATASET = "cifar10-jpeg"
ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = ROOT / "cmbench" / "metrics" / "weights"
WHO = "cifar10_jpeg_board.py"


def unpack(archive: Path, folder: Path) -> list[Record]:
    """Put the archive's records and their artifacts into ``folder``; return the records.

    Raises:
        UserError: a record is damaged, of another dataset, or another than the one that is there.
    """
    with tempfile.TemporaryDirectory(prefix="cifar10-jpeg-board-") as name:
        with tarfile.open(archive) as packed:
            packed.extractall(name, filter="data")
        source = Path(name) / "records" / DATASET
        records = {path: read_record(path) for path in sorted(source.glob("*.json"))}
        if not records:
            raise UserError(f"{WHO}, {archive}", f"holds no record of {DATASET}")
        for path in records:
            there = folder / path.name
            if there.exists() and there.read_bytes() != path.read_bytes():
                raise UserError(
                    f"{WHO}, {path.name}",
                    f"is not the record that lies in {folder}",
                    remedy="remove that folder if these records are to replace it",
                )
        shutil.copytree(source, folder, dirs_exist_ok=True)
    return list(records.values())


def board(records: Sequence[Record], budget: dict[str, Any], extractor: dict[str, Any]) -> str:
    """Return the text of ``board.toml``: what was done, from the records themselves."""
    return f'''schema_version = 1
dataset = "{DATASET}"
title = "CIFAR-10 as JPEG, 32×32"
rank_metric = "fd-cifar-cnn"
description = """
All of CIFAR-10 in lossy JPEG: it is not CIFAR-10, and these numbers are compared with nothing but
themselves. {extractor_line(extractor)}

{lengths(records, budget)} Every student starts from its diffusion model where its method does (ict
does not); diffusion models are trained first and their time is not counted.

{seeds_line(records)} Made by benchmarks/cifar10_jpeg.py and benchmarks/cifar10_jpeg_board.py.
"""
'''


def extractor_line(extractor: dict[str, Any]) -> str:
    """Say what the distance is measured with."""
    if not {"test_accuracy", "floor_real_halves"} <= set(extractor):
        return "The extractor is a small classifier of these images (fd-cifar-cnn, never FID)."
    return (
        f"The extractor is a small classifier of these images (fd-cifar-cnn, never FID), test "
        f"accuracy {extractor['test_accuracy']:.1%}; two disjoint halves of the real images score "
        f"{extractor['floor_real_halves']:.3g}."
    )


def lengths(records: Sequence[Record], budget: dict[str, Any]) -> str:
    """Say how long each method was trained, and why."""
    seen: dict[str, int] = {}
    for record in records:
        seen[record.method] = max(seen.get(record.method, 0), record.training.images_seen)
    trained = ", ".join(f"{name} {images:,}" for name, images in sorted(seen.items()))
    told = f"Images seen in training: {trained}."
    if not budget:
        return f"{told} Lengths are the recipes': estimates of equal GPU time, not measured."
    students = budget["students"]
    devices = " and ".join(sorted({found["device"] for found in students.values()}))
    speeds = ", ".join(f"{n} {f['images_per_s']:,.0f}" for n, f in sorted(students.items()))
    return (
        f"{told} Every student has {budget['budget_seconds']:g} s of training steps on {devices}, "
        f"at the speed that a calibration there found (images a second: {speeds}); compilation is "
        "not counted."
    )


def seeds_line(records: Sequence[Record]) -> str:
    """Say how many seeds and samples there are."""
    seeds = sorted({r.training.seed for r in records})
    counts = {(r.sampling.num_samples, r.sampling.protocol_samples) for r in records}
    few = any(made < wanted for made, wanted in counts)
    samples = " or ".join(f"{made:,}" for made, _ in sorted(counts))
    return (
        f"{len(seeds)} training seed(s), {samples} samples a cell"
        f"{', fewer than the protocol asks for: a trial, no result' if few else ''}."
    )


def read_json(path: Path) -> dict[str, Any]:
    """Return a file's table, empty if there is none."""
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def ship_weights(out: Path) -> list[Path]:
    """Copy the extractor that the records are measured with into the package, if it has none."""
    names = ("cifar-cnn.safetensors", "cifar-cnn.json")
    missing = [n for n in names if (out / n).exists() and not (WEIGHTS / n).exists()]
    return [Path(shutil.copyfile(out / name, WEIGHTS / name)) for name in missing]


def parse() -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="the --out of cifar10_jpeg.py")
    parser.add_argument("--leaderboards", type=Path, default=ROOT / "leaderboards")
    parser.add_argument("--reports", type=Path, default=ROOT / "reports")
    return parser.parse_args()


def main() -> int:
    """Unpack, write the board, render, say what to commit."""
    options = parse()
    folder = options.leaderboards / DATASET
    extractor = read_json(options.out / "cifar-cnn.json") or read_json(WEIGHTS / "cifar-cnn.json")
    try:
        records = unpack(options.out / "records.tar.gz", folder / "records")
    except (UserError, OSError, tarfile.TarError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not (folder / "board.toml").exists():
        text = board(records, read_json(options.out / "budget.json"), extractor)
        (folder / "board.toml").write_text(text, encoding="utf-8")
    if options.leaderboards == ROOT / "leaderboards":
        commit = [folder, options.reports, *ship_weights(options.out)]
        print("commit:", *(path.relative_to(ROOT) for path in commit))
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "cmbench",
            "leaderboard",
            "render",
            str(options.leaderboards),
            "--out",
            str(options.reports),
        ],
        check=False,
    ).returncode


if __name__ == "__main__":
    sys.exit(main())

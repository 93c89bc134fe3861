"""Train and measure the few-step methods on `cifar10-jpeg`, in pieces resumed from checkpoints.

    python benchmarks/cifar10_jpeg.py --archive cifar10-jpeg.tar.xz --out results --seconds 540
    python benchmarks/cifar10_jpeg.py --archive cifar10-jpeg.tar.xz --out /tmp/out --smoke  # CPU

``--archive`` may be left out where ``CMBENCH_CIFAR10_JPEG`` names it. ``--smoke`` takes a few
pictures of each class, tiny networks and few samples: it shows that everything runs, and measures
nothing. Where the package ships no extractor, one is trained into ``--out``.

Everything goes through ``cmbench prepare`` and ``cmbench run --time-limit``; a run that was stopped
is started again until it is done or the time is over. After every piece, records with their
artifacts and the runs' logs are packed into ``--out`` (``records.tar.gz``, ``runs.tar.gz``), so
that a command that is cut off keeps what is finished.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from cmbench.errors import EXIT_REQUEUE

DATASET = "cifar10-jpeg"
METHODS = "edm,ect,ict,cd,sct,scd,pd"
EXTRACTOR = Path(__file__).with_name("train_cifar_extractor.py")
WEIGHTS = Path(__file__).parents[1] / "cmbench" / "metrics" / "weights" / "cifar-cnn.safetensors"
ARCHIVE_VARIABLE = "CMBENCH_CIFAR10_JPEG"
PICTURE = re.compile(r"(?:\./)?((?:train|test)/[a-z]+)/(\d+)\.jpg")
#: Pictures of each class and split that a smoke run takes.
FEW = 40
#: Seconds at the end that are kept free for packing.
RESERVE = 15.0


class Session:
    """The commands of one session against its clock."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.began = time.monotonic()
        self.work = Path(options.work or tempfile.mkdtemp(prefix="cifar10-jpeg-"))
        self.out: Path = options.out
        self.out.mkdir(parents=True, exist_ok=True)
        self.environment = {
            **os.environ, "CMBENCH_DATA": str(self.work / "data"),
            "CMBENCH_WEIGHTS": str(self.out.resolve()),
        }

    def left(self) -> float:
        """Seconds that remain for work."""
        return float(self.options.seconds) - RESERVE - (time.monotonic() - self.began)

    def call(self, *arguments: str) -> int:
        """Run a command, print its time, return its exit code."""
        began = time.monotonic()
        done = subprocess.run([sys.executable, *arguments], env=self.environment, check=False)
        now = time.monotonic()
        print(f"[{now - self.began:6.1f}s] {now - began:.1f} s, exit {done.returncode}: "
              f"{' '.join(arguments)}", flush=True)
        return done.returncode

    def cmbench(self, *arguments: str) -> int:
        """Run a cmbench verb."""
        return self.call("-m", "cmbench", *arguments)

    @property
    def workspace(self) -> Path:
        """Where runs and records go."""
        return self.work / "workspace"

    def pack(self) -> None:
        """Pack what there is: records with artifacts, run logs without weights."""
        self._pack("records.tar.gz", self.workspace / "records", "**/*")
        self._pack("runs.tar.gz", self.workspace / "runs", "**/*.json*", skip="checkpoints")

    def _pack(self, name: str, folder: Path, pattern: str, skip: str = "\0") -> None:
        if not folder.exists():
            return
        temporary = self.out / f"{name}.part"
        with tarfile.open(temporary, "w:gz") as archive:
            for path in sorted(folder.glob(pattern)):
                if path.is_file() and skip not in path.parts:
                    archive.add(path, path.relative_to(folder.parent))
        temporary.replace(self.out / name)


def run_to_the_end(session: Session, methods: str, *more: str) -> int:
    """Start ``cmbench run`` again and again while it asks for it and there is time."""
    options = session.options
    while session.left() > options.least:
        limit = min(session.left(), options.piece)
        command = [
            "run", "--method", methods, "--dataset", DATASET, "--recipe", options.recipe,
            "--workspace", str(session.workspace), "--time-limit", f"{limit:.0f}",
            "--batch-size", str(options.sample_batch), "--no-report", *more,
        ]
        if options.samples:
            command += ["--samples", str(options.samples)]
        if options.compile != "auto":
            command.append("--compile" if options.compile == "yes" else "--no-compile")
        code = session.cmbench(*command)
        session.pack()
        if code != EXIT_REQUEUE:
            return code
    return EXIT_REQUEUE


def parse() -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--archive", type=Path, default=os.environ.get(ARCHIVE_VARIABLE),
                        help=f"cifar10-jpeg.tar.xz or folder [env: {ARCHIVE_VARIABLE}]")
    parser.add_argument("--out", type=Path, required=True, help="folder for the archives")
    parser.add_argument("--work", help="folder of data and workspace, kept [default: a new one]")
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--seconds", type=float, default=540.0, help="wall clock for everything")
    parser.add_argument("--piece", type=float, default=180.0, help="time limit of a piece")
    parser.add_argument("--least", type=float, default=25.0, help="start no piece with less left")
    parser.add_argument("--samples", type=int, default=0, help="images a cell [default: protocol]")
    parser.add_argument("--sample-batch", type=int, default=2000)
    parser.add_argument("--compile", choices=("auto", "yes", "no"), default="auto")
    parser.add_argument("--train-extractor", action="store_true",
                        help="into --out, also where weights are shipped (which go first)")
    parser.add_argument("--extractor-epochs", type=int, default=30)
    parser.add_argument("--smoke", action="store_true", help="tiny networks and few images, CPU")
    options = parser.parse_args()
    if options.archive is None or not Path(options.archive).exists():
        parser.error(f"no archive at {options.archive}: give --archive or set {ARCHIVE_VARIABLE}")
    options.archive = Path(options.archive)
    if options.smoke:
        options.recipe, options.samples, options.sample_batch = "smoke", 64, 64
        options.compile, options.least = "no", 5.0
    return options


def main() -> int:
    """Prepare, train the extractor if need be, train and measure, pack."""
    options = parse()
    session = Session(options)
    if options.smoke and options.archive.is_file():
        options.archive = few_pictures(options.archive, session.work / "few", FEW)
    if session.cmbench("prepare", DATASET, "--source", str(options.archive), *subset(options)):
        return 1
    if options.train_extractor or not WEIGHTS.exists():
        limits = ["--epochs", "1", "--limit", "64"] if options.smoke else [
            "--epochs", str(options.extractor_epochs)]
        if session.call(str(EXTRACTOR), "--source", str(options.archive),
                        "--out", str(session.out), *limits):
            return 1
    code = run_to_the_end(session, options.methods)
    if not code and "edm" in options.methods.split(","):
        # What the teacher reaches with many evaluations bounds what its students can.
        code = run_to_the_end(session, "edm", "--nfe", "35")
    session.pack()
    print(f"done in {time.monotonic() - session.began:.0f} s, exit {code}", flush=True)
    return code


def few_pictures(archive: Path, folder: Path, count: int) -> Path:
    """Write the first ``count`` pictures of each class and split to ``folder``; return it."""
    with tarfile.open(archive, "r|*") as pictures:
        for member in pictures:
            found = PICTURE.fullmatch(member.name)
            if found is None or int(found[2]) >= count or not member.isfile():
                continue
            file = pictures.extractfile(member)
            assert file is not None
            path = folder / found[1] / f"{found[2]}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file.read())
    return folder


def subset(options: argparse.Namespace) -> list[str]:
    """Let a smoke run prepare fewer images."""
    return ["--subset"] if options.smoke else []


if __name__ == "__main__":
    sys.exit(main())

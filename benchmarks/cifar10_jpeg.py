"""Train and measure the few-step methods on `cifar10-jpeg`, in pieces resumed from checkpoints.

    python benchmarks/cifar10_jpeg.py --archive cifar10-jpeg.tar.xz --out results --work work \
        --seconds 540 --budget-seconds 60      # again and again, until it ends with exit 0
    python benchmarks/cifar10_jpeg.py --archive cifar10-jpeg.tar.xz --out /tmp/out --smoke  # CPU

``--archive`` may be left out where ``CMBENCH_CIFAR10_JPEG`` names it. ``--smoke`` takes a few
pictures of each class, tiny networks and few samples: it shows that everything runs, and measures
nothing. Where the package ships no extractor, one is trained, once for a ``--work``.

``--budget-seconds`` gives every student the same GPU time: `equal_time.py` measures their speed on
this device once the teachers are trained, and keeps the lengths in ``--work``, a copy in ``--out``.
Without it lengths are the recipes', which are estimates.

Everything goes through ``cmbench prepare`` and ``cmbench run --time-limit``; a run that was stopped
is started again until it is done or the time is over. After every piece, records with their
artifacts and the runs' logs are packed into ``--out`` (``records.tar.gz``, ``runs.tar.gz``), so
that a command that is cut off keeps what is finished. At the end `cifar10_jpeg_board.py` makes the
board of them (``leaderboards/``, ``reports/`` in ``--out``); run by hand it puts it into the
repository.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from cmbench.errors import EXIT_REQUEUE

DATASET = "cifar10-jpeg"
METHODS = "edm,ect,ict,cd,sct,scd,pd"
TEACHER = "edm"
EXTRACTOR = Path(__file__).with_name("train_cifar_extractor.py")
EQUAL_TIME = Path(__file__).with_name("equal_time.py")
BOARD = Path(__file__).with_name("cifar10_jpeg_board.py")
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
            **os.environ,
            "CMBENCH_DATA": str(self.work / "data"),
            "CMBENCH_WEIGHTS": str(self.weights.resolve()),
        }

    def left(self) -> float:
        """Seconds that remain for work."""
        return float(self.options.seconds) - RESERVE - (time.monotonic() - self.began)

    def call(self, *arguments: str) -> int:
        """Run a command, print its time, return its exit code."""
        began = time.monotonic()
        done = subprocess.run([sys.executable, *arguments], env=self.environment, check=False)
        now = time.monotonic()
        print(
            f"[{now - self.began:6.1f}s] {now - began:.1f} s, exit {done.returncode}: "
            f"{' '.join(arguments)}",
            flush=True,
        )
        return done.returncode

    def cmbench(self, *arguments: str) -> int:
        """Run a cmbench verb."""
        return self.call("-m", "cmbench", *arguments)

    @property
    def workspace(self) -> Path:
        """Where runs and records go."""
        return self.work / "workspace"

    @property
    def weights(self) -> Path:
        """Where the extractor is, if the package ships none: every cell is measured with one."""
        return self.work / "weights"

    @property
    def budget(self) -> Path:
        """The lengths of the students; they belong to the runs, so they lie beside them."""
        return self.work / "budget.json"

    def pack(self) -> None:
        """Pack what there is: records with artifacts, run logs, lengths, the extractor."""
        for path in (self.budget, *self.weights.glob("cifar-cnn.*")):
            if path.exists():
                shutil.copyfile(path, self.out / path.name)
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
            "run",
            "--method",
            methods,
            "--dataset",
            DATASET,
            "--recipe",
            options.recipe,
            "--workspace",
            str(session.workspace),
            "--time-limit",
            f"{limit:.0f}",
            "--batch-size",
            str(options.sample_batch),
            "--no-report",
            *more,
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


def train_and_measure(session: Session) -> int:
    """Train and measure every method; return 75 for more time, or the worst other exit code."""
    worst = 0
    for code in exit_codes(session):
        worst = max(worst, code)
        if code == EXIT_REQUEUE:
            break
    return worst


def exit_codes(session: Session) -> Iterator[int]:
    """Do one thing after another, yield how it ended."""
    options = session.options
    methods = options.methods.split(",")
    if not options.budget_seconds:
        yield run_to_the_end(session, options.methods)
    else:
        students = [name for name in methods if name != TEACHER]
        if TEACHER in methods:
            yield run_to_the_end(session, TEACHER)
        code = calibrate(session, students)
        yield code
        if code:
            return  # nobody's length is known
        lengths = json.loads(session.budget.read_text(encoding="utf-8"))["students"]
        for name in students:
            length = float(lengths[name]["duration_kimg"])
            yield run_to_the_end(session, name, "-o", f"duration_kimg={length!r}")
    if TEACHER in methods:
        # What the teacher reaches with many evaluations bounds what its students can.
        yield run_to_the_end(session, TEACHER, "--nfe", "35")


def calibrate(session: Session, students: list[str]) -> int:
    """Measure what the file of lengths lacks, training teachers in pieces on the way."""
    options, code = session.options, EXIT_REQUEUE
    while code == EXIT_REQUEUE and session.left() > options.least:
        code = session.call(
            str(EQUAL_TIME),
            "--methods",
            ",".join(students),
            "--dataset",
            DATASET,
            "--recipe",
            options.recipe,
            "--budget-seconds",
            str(options.budget_seconds),
            "--workspace",
            str(session.workspace),
            "--out",
            str(session.budget),
            "--time-limit",
            f"{min(session.left(), options.piece):.0f}",
            "--compile",
            options.compile,
        )
    return code


def parse() -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--archive",
        type=Path,
        default=os.environ.get(ARCHIVE_VARIABLE),
        help=f"cifar10-jpeg.tar.xz or folder [env: {ARCHIVE_VARIABLE}]",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the archives")
    parser.add_argument("--work", help="folder of data and workspace, kept [default: a new one]")
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--seconds", type=float, default=540.0, help="wall clock for everything")
    parser.add_argument("--piece", type=float, default=180.0, help="time limit of a piece")
    parser.add_argument(
        "--budget-seconds",
        type=float,
        default=0.0,
        help="GPU time of each student [default: the recipes' lengths]",
    )
    parser.add_argument("--least", type=float, default=25.0, help="start no piece with less left")
    parser.add_argument("--samples", type=int, default=0, help="images a cell [default: protocol]")
    parser.add_argument("--sample-batch", type=int, default=2000)
    parser.add_argument("--compile", choices=("auto", "yes", "no"), default="auto")
    parser.add_argument(
        "--train-extractor",
        action="store_true",
        help="also where weights are shipped (which go first)",
    )
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
        few = session.work / "few"
        if not few.exists():  # the next command of this --work must find the same files
            few_pictures(options.archive, session.work / "few.part", FEW).rename(few)
        options.archive = few
    if session.cmbench("prepare", DATASET, "--source", str(options.archive), *subset(options)):
        return 1
    trained = (session.weights / WEIGHTS.name).with_suffix(".json").exists()  # written last
    if not trained and (options.train_extractor or not WEIGHTS.exists()):
        limits = (
            ["--epochs", "1", "--limit", "64"]
            if options.smoke
            else ["--epochs", str(options.extractor_epochs)]
        )
        if session.call(
            str(EXTRACTOR), "--source", str(options.archive), "--out", str(session.weights), *limits
        ):
            return 1
    code = train_and_measure(session)
    session.pack()
    if any(session.workspace.glob("records/*/*.json")):
        code = max(
            code,
            session.call(
                str(BOARD),
                str(session.out),
                "--leaderboards",
                str(session.out / "leaderboards"),
                "--reports",
                str(session.out / "reports"),
            ),
        )
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

"""``benchmarks/cifar10_jpeg.py`` runs to its end on a few pictures."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from record_factory import metric, on_disk, record

from cmbench.errors import UserError
from cmbench.sweep.context import Context
from cmbench.sweep.planning import plan_run

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPT = BENCHMARKS / "cifar10_jpeg.py"
VARIABLE = "CMBENCH_CIFAR10_JPEG"
ARCHIVE = os.environ.get(VARIABLE, "")  # tests see no such variable later


def loaded(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return loaded("cifar10_jpeg")


@pytest.fixture(scope="module")
def equal_time() -> ModuleType:
    return loaded("equal_time")


@pytest.fixture(scope="module")
def board() -> ModuleType:
    return loaded("cifar10_jpeg_board")


def test_few_pictures_takes_the_first_of_each_class_and_nothing_else(
    script: ModuleType, tmp_path: Path
) -> None:
    names = [
        f"{part}/{kind}/{n:04d}.jpg"
        for part in ("train", "test")
        for kind in ("cat", "dog")
        for n in range(5)
    ]
    strange = ["../train/cat/0000.jpg", "/train/cat/0001.jpg", "train/cat/../0000.jpg", "notes.txt"]
    with tarfile.open(tmp_path / "a.tar.xz", "w:xz") as archive:
        for name in [*strange, *names]:
            member = tarfile.TarInfo(name)
            member.size = 3
            archive.addfile(member, io.BytesIO(b"jpg"))
    folder = script.few_pictures(tmp_path / "a.tar.xz", tmp_path / "few", 2)
    written = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    assert written == sorted(n for n in names if n.endswith(("0000.jpg", "0001.jpg")))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar.xz", "few"]


def test_without_an_archive_it_says_what_to_give(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--smoke", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(
        f"no archive at None: give --archive or set {VARIABLE}"
    )


# ---- equal GPU time ------------------------------------------------------------------------------


@given(st.floats(1, 1e5), st.floats(1, 1e4), st.integers(1, 2048), st.sampled_from([1.0, 4.0]))
def test_a_length_is_whole_batches_that_fit_the_time(
    equal_time: ModuleType, rate: float, seconds: float, batch: int, passes: float
) -> None:
    images = equal_time.length_kimg(rate, seconds, batch, passes) * 1000
    batches = images / batch
    assert batches == pytest.approx(round(batches), abs=1e-6)
    assert batches >= 1
    spent = images * passes / rate
    step = batch * passes / rate
    assert spent <= max(seconds, step) * (1 + 1e-9)
    assert spent > seconds - step * (1 + 1e-9)


def test_a_slower_method_and_one_of_several_stages_get_fewer_images(equal_time: ModuleType) -> None:
    assert equal_time.length_kimg(1000, 60, 512) == 117 * 0.512
    assert equal_time.length_kimg(500, 60, 512) == 58 * 0.512
    assert equal_time.length_kimg(1000, 60, 512, passes=4) == 29 * 0.512
    assert equal_time.length_kimg(1, 1, 512) == 0.512
    with pytest.raises(ValueError, match="no length from 0 images/s"):
        equal_time.length_kimg(0, 60, 512)


def test_what_was_measured_once_is_kept(equal_time: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "budget.json"
    budget = equal_time.Budget(path, 60.0)
    assert budget.missing(["sct", "cd"]) == ["sct", "cd"]
    budget.add("sct", {"duration_kimg": 10.24})
    again = equal_time.Budget(path, 60.0)
    assert again.missing(["sct", "cd"]) == ["cd"]
    assert again.table["students"]["sct"]["duration_kimg"] == 10.24
    with pytest.raises(UserError, match=r"--budget-seconds 61: .* was measured for 60; give that"):
        equal_time.Budget(path, 61.0)
    for damaged in ("{", "[]", '{"budget_seconds": 60, "students": {"sct": {}}}'):
        path.write_text(damaged)
        with pytest.raises(UserError, match="cannot be read"):
            equal_time.Budget(path, 60.0)


def test_a_run_is_timed_with_its_teacher(equal_time: ModuleType, toys: Context) -> None:
    plan = plan_run(toys, "toy", "toys", "staged", 0)
    found = equal_time.calibrate(toys, plan, 0.5, 3)
    assert found["passes"] == 2
    assert found["images_per_s"] > 0
    expected = equal_time.length_kimg(found["images_per_s"], 0.5, 32, 2)
    assert found["duration_kimg"] == pytest.approx(expected, rel=0.01, abs=0.032)
    assert not toys.workspace.run(plan.run_id).exists(), "a calibration is no run"


class Fake:
    """A session whose commands end as told."""

    def __init__(self, work: Path, codes: list[int]) -> None:
        self.options = SimpleNamespace(
            methods="edm,sct,cd",
            budget_seconds=60.0,
            least=0.0,
            piece=9.0,
            recipe="demo",
            compile="auto",
            samples=0,
            sample_batch=10,
        )
        self.workspace, self.budget = work, work / "budget.json"
        self.codes, self.commands = iter(codes), list[tuple[str, ...]]()
        students = {"sct": {"duration_kimg": 59.904}, "cd": {"duration_kimg": 29.696}}
        self.budget.write_text(json.dumps({"budget_seconds": 60.0, "students": students}))

    def left(self) -> float:
        return 100.0

    def call(self, *arguments: str) -> int:
        self.commands.append(arguments)
        return next(self.codes)

    def cmbench(self, *arguments: str) -> int:
        return self.call(*arguments)

    def pack(self) -> None:
        """Nothing."""


def test_students_are_trained_for_the_lengths_of_the_file(
    script: ModuleType, tmp_path: Path
) -> None:
    session = Fake(tmp_path, [0, 75, 0, 1, 0, 0])
    assert script.train_and_measure(session) == 1, "the failure of one does not stop the next"
    teacher, piece, rest, sct, cd, many = session.commands
    assert teacher[:3] == ("run", "--method", "edm")
    assert piece == rest
    assert piece[0].endswith("equal_time.py")
    assert sct[2] == "sct"
    assert "duration_kimg=59.904" in sct
    assert cd[2] == "cd"
    assert "duration_kimg=29.696" in cd
    assert many[many.index("--nfe") + 1] == "35"


def test_without_lengths_no_student_is_trained(script: ModuleType, tmp_path: Path) -> None:
    session = Fake(tmp_path, [0, 3])
    assert script.train_and_measure(session) == 3
    assert len(session.commands) == 2


# ---- the board -----------------------------------------------------------------------------------


def packed(folder: Path, value: float) -> Path:
    metrics = {"fd-cifar-cnn": metric(value, "fd-cifar-cnn")}
    made = [
        record(name, dataset="cifar10-jpeg", metrics=metrics, rank_metric="fd-cifar-cnn")
        for name in ("edm", "sct")
    ]
    on_disk(folder / "records" / "cifar10-jpeg", made)
    with tarfile.open(folder / "records.tar.gz", "w:gz") as archive:
        archive.add(folder / "records", "records")
    return folder


def made_board(out: Path, place: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable,
            str(BENCHMARKS / "cifar10_jpeg_board.py"),
            str(out),
            "--leaderboards",
            str(place / "leaderboards"),
            "--reports",
            str(place / "reports"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )


def test_one_command_makes_the_board_of_what_was_packed(tmp_path: Path) -> None:
    out = packed(tmp_path / "out", 1.5)
    found = {"device": "a GPU", "images_per_s": 1234.0, "duration_kimg": 9.0}
    (out / "budget.json").write_text(json.dumps({"budget_seconds": 60, "students": {"sct": found}}))
    done = made_board(out, tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "leaderboards" / "cifar10-jpeg"
    assert len(list((folder / "records").glob("*.json"))) == 2
    text = (folder / "board.toml").read_text()
    assert "Every student has 60 s of training steps on a GPU" in text
    assert "sct 1,234" in text
    page = (tmp_path / "reports" / "cifar10-jpeg.md").read_text()
    assert "| sct | 1 |" in page
    (folder / "board.toml").write_text(text.replace("JPEG, 32×32", "JPEG, edited"))
    assert made_board(out, tmp_path).returncode == 0, "again, with the same records"
    assert "edited" in (folder / "board.toml").read_text(), "what a person wrote stays"


def test_other_records_of_the_same_cells_are_refused(tmp_path: Path) -> None:
    assert made_board(packed(tmp_path / "first", 1.5), tmp_path).returncode == 0
    done = made_board(packed(tmp_path / "second", 1.6), tmp_path)
    assert done.returncode == 2
    assert "is not the record that lies in" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_board_without_a_budget_says_that_lengths_are_estimates(board: ModuleType) -> None:
    text = board.board([record("sct", dataset="cifar10-jpeg")], {}, {})
    assert "estimates of equal GPU time, not measured" in text
    assert tomllib.loads(text)["rank_metric"] == "fd-cifar-cnn"


@pytest.mark.slow
@pytest.mark.skipif(
    not Path(ARCHIVE or "/nowhere").exists(),
    reason=f"needs the cifar10-jpeg archive: set {VARIABLE}",
)
def test_smoke_runs_to_the_end(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            str(SCRIPT),
            "--smoke",
            "--archive",
            ARCHIVE,
            "--out",
            str(tmp_path / "o"),
            "--work",
            str(tmp_path / "w"),
            "--methods",
            "edm,sct",
            "--seconds",
            "280",
            "--budget-seconds",
            "1",
            "--train-extractor",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1].endswith("exit 0")
    with tarfile.open(tmp_path / "o" / "records.tar.gz") as packed:
        records = [n for n in packed.getnames() if n.endswith(".json")]
    assert len(records) >= 2
    assert (tmp_path / "o" / "cifar-cnn.safetensors").is_file()
    assert "sct" in json.loads((tmp_path / "o" / "budget.json").read_text())["students"]
    assert (tmp_path / "o" / "leaderboards" / "cifar10-jpeg" / "board.toml").is_file()
    assert (tmp_path / "o" / "reports" / "cifar10-jpeg.html").is_file()

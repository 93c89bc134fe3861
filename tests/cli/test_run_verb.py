"""``cmbench run``, in process: what it prints where, its exit codes, and bad input in one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cmbench.cli import common, run_work
from cmbench.cli.common import parse_numbers, parse_seeds, parse_sigmas, stop_asker
from cmbench.errors import BusyError, UserError
from cmbench.records.record import read_record
from cmbench.records.workspace import Workspace

Command = Callable[..., Any]
TOYS = ("run", "-m", "toy", "-d", "toys", "--no-report")


def one_line(outcome: Any, code: int, start: str) -> str:
    """Check that a command failed with one line on standard error, and return it."""
    assert outcome.code == code, outcome.err
    lines = [x for x in outcome.err.splitlines() if x.startswith("error: ")]
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith(start), lines[0]
    assert "Traceback" not in outcome.err
    return str(lines[0])


# ---- a good sweep -------------------------------------------------------------------------------


def test_results_go_to_stdout_and_talk_to_stderr(
    cmbench_with_toys: Command, workspace: Workspace
) -> None:
    done = cmbench_with_toys("run", "-m", "toy", "-d", "toys")
    assert done.code == 0
    lines = done.out.splitlines()
    table, best, report = lines[:3], lines[3:-1], lines[-1:]
    assert [line.split() for line in table[:1]] == [
        ["method", "seed", "NFE", "fd-pixels", "images/s", "status"]
    ]
    assert [line.split()[-1] for line in table[1:]] == ["finished", "finished"]
    assert best[1].split() == ["fd-pixels", "NFE", "1", "NFE", "2"]
    assert best[2].split()[0] == "toy"
    assert [line.split(":")[0] for line in best[4:]] == ["NFE 1", "NFE 2"]
    assert all(line.endswith("(one seed: no verdict)") for line in best[4:])
    assert report == [f"report: {workspace.reports / 'toys.html'}"]
    assert (workspace.reports / "toys.html").is_file()
    talk = done.err.splitlines()
    assert talk[0].startswith("train toy-demo-s0-")
    assert sum(line.startswith("sample toy-demo-s0-nfe") for line in talk) == 2
    assert len(list(workspace.records("toys").glob("*.json"))) == 2


def test_a_second_run_finds_every_cell_done(cmbench_with_toys: Command) -> None:
    first = cmbench_with_toys(*TOYS)
    second = cmbench_with_toys(*TOYS)
    assert (second.code, second.out) == (0, first.out)
    assert second.err.splitlines() == warned_cells(first.err)


def warned_cells(text: str) -> list[str]:
    """Return the lines that are the warnings of records."""
    return [line for line in text.splitlines() if line.startswith("warning: 1 cell(s) of toy: ")]


def test_precision_makes_cells_of_their_own(
    cmbench_with_toys: Command, workspace: Workspace
) -> None:
    for options in ((), ("--precision", "bf16"), ("--precision", "fp32")):
        assert cmbench_with_toys(*TOYS, "--nfe", "1", *options).code == 0
    records = [json.loads(p.read_text()) for p in workspace.records("toys").glob("*.json")]
    assert sorted(r["sampling"]["dtype"] for r in records) == ["bfloat16", "float32"]


def test_quiet_prints_the_warnings_of_records_only(
    cmbench_with_toys: Command, workspace: Workspace
) -> None:
    """They decide what a number is worth; a finished sweep prints them again."""
    done = cmbench_with_toys(*TOYS, "--quiet", "--nfe", "1")
    (path,) = workspace.records("toys").glob("*.json")
    warnings = json.loads(path.read_text())["warnings"]
    assert any("samples are duplicates" in warning for warning in warnings)
    expected = [f"warning: 1 cell(s) of toy: {warning}" for warning in warnings]
    assert (done.code, done.err.splitlines()) == (0, expected)
    assert cmbench_with_toys(*TOYS, "--quiet", "--nfe", "1").err == done.err


def test_columns_follow_the_protocol_fresh_or_read_back(cmbench: Command) -> None:
    arguments = (
        "run",
        "-m",
        "edm",
        "-r",
        "smoke",
        "--nfe",
        "1",
        "--samples",
        "20",
        "--no-report",
        "-o",
        "duration_kimg=0.032",
        "-o",
        "batch_size=32",
    )
    fresh, again = cmbench(*arguments), cmbench(*arguments)
    assert fresh.out.split()[:4] == ["method", "seed", "NFE", "fd-digits"]
    assert again.out == fresh.out


def test_dry_run_prints_the_plan_and_writes_nothing(
    cmbench_with_toys: Command, workspace: Workspace
) -> None:
    plan = cmbench_with_toys(*TOYS, "--dry-run", "--seeds", "2", "--nfe", "1,3")
    assert plan.code == 0
    text = plan.out
    assert text.splitlines()[0] == "runs"
    assert text.count(" to train\n") == 2
    assert text.count(" to do\n") == 2
    assert text.count("declined: the toy takes one or two steps") == 2
    assert " 320 " in text
    assert "64" in text
    assert not workspace.root.exists()
    cmbench_with_toys(*TOYS, "--nfe", "1")
    text = cmbench_with_toys(*TOYS, "--dry-run", "--nfe", "1,2").out
    assert [line.split()[-1] for line in text.splitlines() if "toy-demo" in line] == [
        "done",
        "done",
        "do",
    ]


def test_dry_run_names_the_teacher_first(cmbench: Command) -> None:
    done = cmbench("run", "--recipe", "smoke", "--dry-run")
    assert done.code == 0, done.err
    rows = [line.split()[0] for line in done.out.splitlines() if line.startswith("digits/")]
    assert len(rows) == 2
    assert rows[0].startswith("digits/edm-")


def test_dry_run_shows_the_images_of_all_phases(cmbench: Command) -> None:
    out = cmbench("run", "-m", "pd", "-d", "digits", "--recipe", "smoke", "--dry-run").out
    rows = [line.split() for line in out.splitlines()]
    run = next(row for row in rows if row and row[0].startswith("digits/pd-"))
    cost = next(row for row in rows if row and row[0].startswith("pd-smoke"))
    assert run[2] == cost[1] == "3,840"


def test_dry_run_shows_what_can_be_resumed(
    cmbench_with_toys: Command, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        assert cmbench_with_toys(*TOYS, "--quiet").code == 75
    newest = max(workspace.root.glob("runs/toys/*/checkpoints/*.json"))
    (newest.parent / "notes.json").write_text("{}")
    line = cmbench_with_toys(*TOYS, "--dry-run").out.splitlines()[2]
    assert line.endswith(f"resume at {int(newest.stem)} images")


# ---- options ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"), [("1", (1,)), ("1,2,4", (1, 2, 4)), ("4,1,4", (4, 1))]
)
def test_numbers(text: str, expected: object) -> None:
    assert parse_numbers(text, "--nfe") == expected


@pytest.mark.parametrize("text", ["0", "-1", "1,0", "x", "", ",", "1.5", "1,,2"])
def test_what_is_no_list_of_numbers(text: str) -> None:
    with pytest.raises(
        UserError, match=r"--nfe: .*; allowed: whole numbers from 1 to 100,000, for"
    ):
        parse_numbers(text, "--nfe")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1", (0,)),
        ("3", (0, 1, 2)),
        ("0,2", (0, 2)),
        ("7,", (7,)),
        ("3-5", (3, 4, 5)),
        ("2,2", (2,)),
    ],
)
def test_seeds(text: str, expected: object) -> None:
    assert parse_seeds(text) == expected


@pytest.mark.parametrize(
    "text", ["0", "x", "", ",", "-1", "5-3", "1-2-3", "1.5", "²", "999999999999", "0-999999999"]
)
def test_what_are_no_seeds(text: str) -> None:
    with pytest.raises(UserError, match=r"--seeds: .*; allowed: a count \(3\), a list \(0,2\) or"):
        parse_seeds(text)


def test_noise_levels() -> None:
    assert parse_sigmas("80,0.8") == (80.0, 0.8)
    assert parse_sigmas("tuned") == "tuned"
    for text in ("", "x", "1,2", "1,1", "0", "-1", "nan", "inf", "inf,1", "80,nan", "2,0"):
        with pytest.raises(UserError, match=r"--sigmas: .*; allowed: descending positive"):
            parse_sigmas(text)


BAD_INPUT = [
    (("-m", "tyo"), "error: cmbench run: unknown method 'tyo'; allowed: ", "did you mean 'toy'?"),
    (("-m", ","), "error: --method: ','; allowed: names", "`cmbench list methods`"),
    (("-m", ""), "error: -m: an empty value; ", "give a value, or leave it out"),
    (("-d", "toy"), "error: cmbench run: unknown dataset 'toy'; ", "did you mean 'toys'?"),
    (("-d", "gmm"), "error: method 'toy': has no recipe for dataset 'gmm'; allowed: toys", ""),
    (
        ("-r", "dmeo"),
        "error: method 'toy' on 'toys': unknown recipe 'dmeo'; allowed: classes, demo, staged",
        "did you mean 'demo'?",
    ),
    (("-r", "gone.toml:x"), "error: recipe file gone.toml: cannot be read (No such file", ""),
    (
        ("-o", "lr"),
        "error: -o: 'lr' is not key=value; allowed: for example -o optimizer.lr=1e-4",
        "",
    ),
    (
        ("-o", "batch_sise=3"),
        "error: recipe toy/toys.demo: batch_sise: unknown key; allowed: keys ",
        "did you mean 'batch_size'?",
    ),
    (
        ("-o", "batch_size=0"),
        "error: recipe toy/toys.demo: batch_size: Input should be greater than 0, got 0; ",
        "correct the recipe or the -o override of 'batch_size'",
    ),
    (
        ("-o", "optimizer.lr=nan"),
        "error: recipe toy/toys.demo: optimizer.lr: Input should be a finite number",
        "",
    ),
    (
        ("-o", "optimizer.lr=abc"),
        "error: recipe toy/toys.demo: optimizer.lr: Input should be a valid number, "
        "unable to parse string as a number, got 'abc'; allowed: optimizer.lr > 0, peak learning "
        "rate; ",
        "override of 'optimizer.lr'",
    ),
    (
        ("-o", "network.width=0"),
        "error: network 'mlp': width: Input should be greater than or "
        "equal to 8, got 0; allowed: network.width >= 8, hidden width (features); ",
        "correct the recipe or the -o override of 'network.width'",
    ),
    (
        ("-o", "optimizer.name=sgd"),
        "error: recipe toy/toys.demo: optimizer.name: Input should be "
        "'adam', 'adamw' or 'radam', got 'sgd'",
        "",
    ),
    (("-o", "network.name=mpl"), "error: cmbench: unknown network 'mpl'; ", "did you mean 'mlp'?"),
    (
        ("--nfe", "0"),
        "error: --nfe: '0'; allowed: whole numbers from 1 to 100,000, for example 1,2,4",
        "",
    ),
    (
        ("--nfe", "1000000"),
        "error: --nfe: '1000000'; allowed: whole numbers from 1 to 100,000, for example 1,2,4",
        "",
    ),
    (("--seeds", "x"), "error: --seeds: 'x'; allowed: a count (3), a list (0,2) or a range", ""),
    (("--sigmas", "1,2"), "error: --sigmas: '1,2'; allowed: descending positive noise levels", ""),
    (("--precision", "bf8"), "error: --precision: 'bf8'; allowed: fp32, bf16, fp16", ""),
    (("--ema", "best"), "error: --ema: 'best' is not kept by this run; allowed: raw, h", ""),
    (("--device", "gpu"), "error: --device: 'gpu'; allowed: auto, cpu, cuda", ""),
    (("--executor", "grid"), "error: cmbench run: unknown executor 'grid'; allowed: ", ""),
    (("-w", "/dev/null/below"), "error: workspace /dev/null/below: cannot be written (", ""),
]


@pytest.mark.parametrize(("arguments", "start", "end"), BAD_INPUT, ids=lambda x: str(x)[:40])
def test_bad_input_is_one_line_and_leaves_nothing(
    cmbench_with_toys: Command,
    workspace: Workspace,
    arguments: tuple[str, ...],
    start: str,
    end: str,
) -> None:
    line = one_line(cmbench_with_toys(*TOYS, *arguments), 2, start)
    assert line.endswith(end)
    assert not workspace.records("toys").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("--samples", "1"),
        ("--samples", "many"),
        ("--batch-size", "0"),
        ("--threads", "0"),
        ("--time-limit", "0"),
        ("--no-such-option",),
    ],
)
def test_what_click_refuses_has_its_exit_code(
    cmbench_with_toys: Command, arguments: tuple[str, ...]
) -> None:
    done = cmbench_with_toys(*TOYS, *arguments)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: cmbench run: ")
    assert done.err.count("\n") == 1
    assert "Traceback" not in done.err


def test_a_gpu_that_is_not_there_is_exit_4(cmbench_with_toys: Command) -> None:
    one_line(cmbench_with_toys(*TOYS, "--device", "cuda:77"), 4, "error: --device: 'cuda:77': ")


def test_too_few_samples_are_refused_in_words(cmbench: Command) -> None:
    """Two images are too few for neighbours: a reason, no crash."""
    done = cmbench(
        "run",
        "-m",
        "edm",
        "-r",
        "smoke",
        "--nfe",
        "1",
        "--samples",
        "2",
        "--no-report",
        "-o",
        "duration_kimg=0.032",
        "-o",
        "batch_size=32",
    )
    line = one_line(done, 1, "error: 1 cell(s) failed: precision and recall: 2 samples; allowed: ")
    assert line.endswith("evaluate more samples")


# ---- failures -----------------------------------------------------------------------------------


def test_failed_cells_are_exit_1_with_one_line_a_reason(cmbench_with_toys: Command) -> None:
    done = cmbench_with_toys(*TOYS, "-o", "trouble=nan-loss", "--seeds", "2")
    line = one_line(done, 1, "error: 4 cell(s) failed: training phase 'part-0': the loss is not ")
    assert "at 0 images seen" in line
    assert [row.split()[-1] for row in done.out.splitlines()[1:]] == ["failed"] * 4


def test_a_broken_plugin_leaves_the_others(cmbench_with_toys: Command) -> None:
    done = cmbench_with_toys("run", "-m", "broken-toy,toy", "-d", "toys", "--no-report")
    line = one_line(done, 1, "error: plugin 'toys' (toy-distribution 1.2.3): cannot import ")
    assert line.endswith("fix or reinstall that distribution")
    assert [row.split()[-1] for row in done.out.splitlines()[1:3]] == ["finished"] * 2
    alone = cmbench_with_toys("run", "-m", "broken-toy", "-d", "toys", "--no-report")
    one_line(alone, 2, "error: plugin 'toys' (toy-distribution 1.2.3): cannot import ")
    assert alone.out == ""


def test_debug_shows_the_traceback_of_a_method(cmbench_with_toys: Command) -> None:
    done = cmbench_with_toys(*TOYS, "-o", "trouble=raise", "--nfe", "1", "--debug")
    assert done.code == 1
    assert "Traceback" in done.err
    assert 'raise RuntimeError("the toy' in done.err


@pytest.mark.parametrize("text", ["{", '{"schema_version": 99}'])
def test_a_corrupt_record_is_one_line(
    cmbench_with_toys: Command, workspace: Workspace, text: str
) -> None:
    cmbench_with_toys(*TOYS, "--nfe", "1")
    (path,) = workspace.records("toys").glob("*.json")
    path.write_text(text)
    one_line(cmbench_with_toys(*TOYS, "--nfe", "1"), 2, f"error: record {path}: ")
    path.unlink()
    assert cmbench_with_toys(*TOYS, "--nfe", "1").code == 0


def test_a_corrupt_result_is_one_line(cmbench_with_toys: Command, workspace: Workspace) -> None:
    cmbench_with_toys(*TOYS, "--nfe", "1")
    (path,) = workspace.root.glob("runs/toys/*/result.json")
    path.write_text("{")
    done = cmbench_with_toys(*TOYS, "--nfe", "1,2")
    one_line(done, 1, f"error: 1 cell(s) failed: run file {path}: is not JSON (")
    one_line(cmbench_with_toys(*TOYS, "--nfe", "1,2", "--dry-run"), 2, f"error: run file {path}: ")


def test_an_unexpected_error_is_one_line_too(
    cmbench_with_toys: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise AssertionError("an\ninvariant")

    monkeypatch.setattr(run_work, "sweep", broken)
    line = one_line(cmbench_with_toys(*TOYS), 2, "error: unexpected AssertionError: an invariant; ")
    assert line.endswith("run again with --debug for the traceback and report it")


# ---- the recorded command -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "recorded"),
    [
        ("run -w /tmp/w --nfe 1,2 -q --no-report", "cmbench run --nfe 1,2"),
        ("--debug run --workspace=/tmp/w -o sigma=2", "cmbench run -o sigma=2"),
        ("report -w/tmp/w --dataset digits", "cmbench report --dataset digits"),
        ("eval folder --workspace /tmp/w --quiet", "cmbench eval folder"),
    ],
)
def test_the_recorded_command_leaves_out_what_concerns_one_machine(
    monkeypatch: pytest.MonkeyPatch, typed: str, recorded: str
) -> None:
    monkeypatch.setattr("sys.argv", ["/opt/bin/cmbench", *typed.split()])
    assert common.command_line() == recorded


def test_every_verb_records_the_same_command(
    cmbench_with_toys: Command, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = ["run", *TOYS[1:], "--nfe", "1", "-w", str(workspace.root)]
    monkeypatch.setattr("sys.argv", ["cmbench", *typed])
    assert cmbench_with_toys(*typed).code == 0
    (path,) = workspace.records("toys").glob("*.json")
    assert str(workspace.root) not in (command := read_record(path).command)
    assert command.endswith("--nfe 1")
    monkeypatch.setattr("sys.argv", ["cmbench", "report", "-w", str(workspace.root)])
    assert cmbench_with_toys("report", "-w", str(workspace.root)).code == 0
    assert "with `cmbench report`." in (workspace.reports / "toys.md").read_text()


# ---- stopping -----------------------------------------------------------------------------------


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let the time limit be over after that many questions."""
    clock = iter(range(10**9))
    monkeypatch.setattr(common.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(
        run_work, "stop_asker", lambda _, **options: stop_asker(step - 0.5, **options)
    )


def test_the_time_limit_saves_and_says_start_again(
    cmbench_with_toys: Command, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        done = cmbench_with_toys(*TOYS, "--quiet")
    line = one_line(done, 75, "error: run toys/toy-demo-s0-")
    assert "stopped by the time limit of 4.5 s after " in line
    assert line.endswith("checkpoint saved; start the same command again to continue")
    assert done.out == ""
    again = cmbench_with_toys(*TOYS)
    assert again.code == 0
    assert ", resumed at " in again.err


def test_signals_ask_to_stop_and_their_handlers_are_given_back() -> None:
    before = {number: signal.getsignal(number) for number in common.STOP_SIGNALS}
    with stop_asker(None) as ask:
        assert ask() is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert ask() == "stopped by SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert {number: signal.getsignal(number) for number in common.STOP_SIGNALS} == before


def test_an_interrupt_is_exit_130(
    cmbench_with_toys: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run_work, "sweep", interrupted)
    done = cmbench_with_toys(*TOYS)
    assert (done.code, done.err.strip()) == (130, "interrupted")


# ---- real processes -----------------------------------------------------------------------------


@pytest.fixture
def toys_installed(tmp_path: Path) -> dict[str, str]:
    """The environment of a process in which the toys are an installed distribution."""
    info = tmp_path / "site" / "toys-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "entry_points.txt").write_text("[cmbench]\ntoys = toy:PLUGIN\n")
    (info / "METADATA").write_text("Name: toys\nVersion: 1.0\n")
    tests = str(Path(__file__).parents[1])
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(info.parent), tests])}


def test_sigterm_and_a_second_process(
    toys_installed: dict[str, str], workspace: Workspace, cmbench_with_toys: Command
) -> None:
    """While one process trains, another is told so; SIGTERM saves; a third goes on to the end."""
    long = ("-o", "duration_kimg=1000", "-o", "checkpoint_kimg=0.32")
    command = [sys.executable, "-m", "cmbench", *TOYS, "--nfe", "1", *long]
    first = subprocess.Popen(
        command, env=toys_installed, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not list(workspace.root.glob("runs/toys/*/checkpoints/*.json")):
        assert first.poll() is None, first.communicate()[1]
        signal.sigtimedwait([], 0.05)
    busy = cmbench_with_toys(*TOYS, "--nfe", "1", *long)
    one_line(busy, 5, "error: run toys/toy-demo-s0-")
    assert "another process is training it (lock " in busy.err
    first.send_signal(signal.SIGTERM)
    out, err = first.communicate()
    assert (first.returncode, out) == (75, "")
    last = err.splitlines()[-1]
    assert last.startswith("error: run toys/toy-demo-s0-")
    assert "stopped by SIGTERM after " in last
    newest = max(workspace.root.glob("runs/toys/*/checkpoints/*.json"))
    seen = json.loads(newest.read_text())["meta"]["state"]["seen_nimg"]
    assert f"after {seen} images; checkpoint saved" in last


# ---- what a newcomer tripped over ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("-m", "edm", "--sampler", "foo"), "--sampler foo: no cell supports these settings"),
        (("-m", "ict,cd", "--sampler", "foo"), "ict at NFE 1: sampler 'foo'"),
        (("-m", "edm", "--sigmas", "80", "--nfe", "3"), "--sigmas 80: no cell supports these"),
    ],
)
def test_samplers_and_levels_that_no_method_takes_are_refused(
    cmbench: Command, workspace: Workspace, options: tuple[str, ...], said: str
) -> None:
    line = one_line(cmbench("run", "-r", "smoke", "--no-report", *options), 2, "error: --s")
    assert said in line
    assert not workspace.root.exists()


def test_skipped_cells_are_said_with_their_reason(cmbench_with_toys: Command) -> None:
    done = cmbench_with_toys(*TOYS, "--nfe", "1,3", "-q")
    assert done.code == 0
    *others, last = done.err.splitlines()
    assert last == "skipped: 1 cell(s) of toy: the toy takes one or two steps"
    assert others == warned_cells(done.err)


def test_fewer_samples_than_the_protocol_are_warned_of(cmbench_with_toys: Command) -> None:
    done = cmbench_with_toys(*TOYS, "--nfe", "1", "--samples", "32", "--dry-run")
    warning = "warning: 32 samples instead of the protocol's 64: never ranked with full ones"
    assert warning in done.err.splitlines()
    assert "instead" not in cmbench_with_toys(*TOYS, "--samples", "64", "--dry-run").err


def test_training_on_no_image_is_refused(cmbench_with_toys: Command) -> None:
    failed = cmbench_with_toys(*TOYS, "-o", "duration_kimg=0")
    assert "duration_kimg 0 is shorter than one image; allowed: from 0.001" in one_line(
        failed, 2, "error: recipe toy/toys.demo"
    )


def test_an_override_given_twice_is_refused(cmbench_with_toys: Command) -> None:
    failed = cmbench_with_toys(*TOYS, "-o", "batch_size=8", "-o", "batch_size = 16")
    assert "batch_size is given twice: 'batch_size=8' and 'batch_size = 16'" in one_line(
        failed, 2, "error: -o"
    )


def test_a_recipe_file_without_a_name_says_what_it_holds(
    cmbench_with_toys: Command, tmp_path: Path
) -> None:
    file = tmp_path / "r.toml"
    file.write_text("[toys.mine]\nextends = 'demo'\n[gmm.other]\n")
    line = one_line(cmbench_with_toys(*TOYS, "-r", str(file)), 2, "error: --recipe: ")
    assert "allowed: FILE.toml:NAME; the file has toys.mine, gmm.other" in line
    assert line.endswith(f"give {file}:mine")


def test_a_folder_that_is_not_there_is_said_so(cmbench: Command) -> None:
    line = one_line(cmbench("run", "-d", "folder:/nonexist"), 4, "error: dataset 'folder:/nonexist")
    assert "/nonexist does not exist" in line
    assert "prepare" not in line


def test_saving_samples_of_finished_cells_is_said_to_do_nothing(cmbench_with_toys: Command) -> None:
    options = (*TOYS, "--nfe", "1", "--save-samples")
    cmbench_with_toys(*TOYS, "--nfe", "1")
    assert (
        "--save-samples: 1 finished cell(s) have no saved images" in cmbench_with_toys(*options).err
    )
    cmbench_with_toys(*options, "-o", "sigma=3")
    again = cmbench_with_toys(*options, "-o", "sigma=3").err
    assert again.splitlines() == warned_cells(again)


def test_a_failure_says_where_and_how_to_see_more(cmbench_with_toys: Command) -> None:
    failed = cmbench_with_toys(*TOYS, "--nfe", "1", "-o", "trouble=sample-raises")
    one_line(failed, 1, "error: 1 cell(s) failed: method 'toy' failed while sampling: ValueError")
    assert "run again with --debug for the tracebacks" in failed.err.splitlines()


def test_a_busy_run_is_said_once(
    cmbench_with_toys: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(*_: object) -> None:
        raise BusyError("run x", "another process is training it")

    monkeypatch.setattr("cmbench.sweep.sweep.obtain_run", busy)
    done = cmbench_with_toys(*TOYS)
    assert done.code == 5
    assert done.err.count("another process is training it") == 1

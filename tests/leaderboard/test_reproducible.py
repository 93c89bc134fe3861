"""Every published row has a command whose recipe exists, or a reason why there is none."""

from __future__ import annotations

import json
from pathlib import Path

import click.testing
import pytest

from cmbench.cli.leaderboard import leaderboard
from cmbench.errors import UserError
from cmbench.leaderboard.boards import board_folders
from cmbench.leaderboard.published_files import load_published
from cmbench.leaderboard.reproducible import (
    COMMANDS_FILE,
    check_commands,
    command_line,
    entries_of,
    read_entries,
)
from cmbench.plugin.manager import load_plugins
from cmbench.sweep.recipes import recipe_names

BOARDS = board_folders(Path(__file__).parents[2] / "leaderboards")
HEADER = (BOARDS[0] / "published.csv").read_text().splitlines()[0]
BOARD = """
schema_version = 1
dataset = "gmm"
title = "Mixture"
rank_metric = "fid"
[tables.t]
title = "A table"
rows = 2
[protocols.p]
title = "A protocol"
reason = "none"
"""
RUN = '[[rows]]\npublished = ["Diffusion"]\nrun = { method = "edm", recipe = "smoke" }\n'
GAN = '[[rows]]\nfamilies = ["GAN"]\nreason = "a GAN"\nnote = "old"\n'


@pytest.mark.parametrize("folder", BOARDS, ids=lambda folder: folder.name)
def test_every_published_row_is_answered(folder: Path) -> None:
    plugins, published = load_plugins(), load_published(folder)
    assert check_commands(folder, published) == []
    for row, entry in entries_of(published, read_entries(folder)):
        assert entry is not None, row.method
        if entry.run is not None:
            spec = plugins.methods.get(entry.run.method)
            found = (entry.run.dataset or published.board.dataset, entry.run.recipe)
            assert found in recipe_names(spec), (row.method, found)
            assert row.joins in ("", entry.run.method), row.method
        elif row.joins:
            assert entry.published, f"{row.method}: a reason of its own, not its family's"


def test_the_talks_table_of_imagenet512_has_a_command_per_size() -> None:
    (folder,) = (path for path in BOARDS if path.name == "imagenet512")
    published = load_published(folder)
    lines = {
        (row.method, row.nfe): command_line(entry.run, "imagenet512", row.nfe)
        for row, entry in entries_of(published, read_entries(folder))
        if entry is not None and entry.run is not None
    }
    assert len(lines) == 20
    assert lines["sCD-XXL", "2"] == (
        "cmbench run --method scd --dataset imagenet512 --recipe paper-xxl --nfe 2"
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "gmm"
    made.mkdir()
    (made / "board.toml").write_text(BOARD)
    rows = []
    for method, family, nfe in (("Diffusion", "diffusion", "2"), ("GAN", "GAN", "1")):
        values = dict.fromkeys(HEADER.split(","), "")
        values |= {"table": "t", "method": method, "family": family, "nfe": nfe, "fid": "2.5"}
        values |= {"protocol": "p", "source": "s", "year": "2020", "reference": '"A, 2020"'}
        rows.append(",".join(values.values()))
    (made / "published.csv").write_text("\n".join([HEADER, *rows]) + "\n")
    return made


def run(*arguments: object) -> click.testing.Result:
    runner = click.testing.CliRunner()
    return runner.invoke(leaderboard, [str(a) for a in arguments], standalone_mode=False)


def test_the_first_entry_that_selects_a_row_applies(folder: Path) -> None:
    special = '[[rows]]\npublished = ["GAN"]\nnfe = ["1"]\nreason = "its own"\n'
    (folder / COMMANDS_FILE).write_text(RUN + special + GAN)
    published = load_published(folder)
    answered = entries_of(published, read_entries(folder))
    assert [entry.reason for _, entry in answered if entry is not None] == ["", "its own"]
    (problem,) = check_commands(folder, published)
    assert "rows.3" in str(problem)
    assert "selects no row" in str(problem)


def test_a_row_without_an_entry_is_a_problem_of_its_line(folder: Path) -> None:
    (folder / COMMANDS_FILE).write_text(RUN)
    result = run("validate", folder.parent)
    assert result.return_value == 2
    assert "published.csv line 3" in result.stderr
    assert "selects 'GAN' at NFE 1" in result.stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rows = 3", "rows: Input should be a valid"),
        ('[[rows]]\nreason = "x"', "published, families: select rows"),
        ('[[rows]]\npublished = ["GAN"]', "give either run or reason"),
        (RUN + 'reason = "x"', "give either run or reason"),
        (GAN + 'who = "x"', "rows.0.who: Extra inputs"),
        ("[[rows", "Expected"),
    ],
)
def test_a_wrong_file_is_refused_by_name(folder: Path, text: str, said: str) -> None:
    (folder / COMMANDS_FILE).write_text(text)
    with pytest.raises(UserError, match=COMMANDS_FILE) as error:
        read_entries(folder)
    assert said in str(error.value)


def test_commands_with_costs_and_reasons(folder: Path) -> None:
    (folder / COMMANDS_FILE).write_text(RUN + GAN)
    result = run("commands", "gmm", folder.parent)
    assert result.return_value == 0
    assert "cmbench run --method edm --dataset gmm --recipe smoke --nfe 2" in result.stdout
    assert "1e+14 FLOP/s" in result.stdout
    assert "a GAN" in result.stdout
    diffusion, gan = json.loads(run("commands", "gmm", folder.parent, "--json").stdout)
    assert diffusion["cost"]["images"] == 10_240
    assert diffusion["cost"]["gpu_hours"] > 0
    assert diffusion["cost"]["teacher_gpu_hours"] is None
    assert diffusion["supposed_flops_per_second"] == 1e14
    assert (gan["command"], gan["cost"], gan["reason"], gan["note"]) == ("", None, "a GAN", "old")


def test_a_board_without_the_file_says_so(folder: Path) -> None:
    assert check_commands(folder, load_published(folder)) == []
    assert "commands.toml has no entry for it" in run("commands", "gmm", folder.parent).stdout


def test_unknown_names_are_one_line_with_a_suggestion(folder: Path) -> None:
    result = run("commands", "gm", folder.parent)
    assert "unknown board 'gm'; allowed: gmm; did you mean 'gmm'?" in str(result.exception)
    (folder / COMMANDS_FILE).write_text(RUN.replace('"smoke"', '"smok"') + GAN)
    result = run("commands", "gmm", folder.parent)
    assert isinstance(result.exception, UserError)
    assert "did you mean 'smoke'?" in str(result.exception)

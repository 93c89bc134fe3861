"""Published rows: the deck is complete, and every mistake is named with file, line and field."""

from __future__ import annotations

import csv
import io
import shutil
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmbench.errors import UserError
from cmbench.leaderboard.published import METRICS, PublishedRow
from cmbench.leaderboard.published_files import check_papers, check_published, load_published

TALK = 'talk "Consistency Models"'
BOARDS = Path(__file__).parents[2] / "leaderboards"
#: Rows of every table of the deck, counted on the slides.
DECK = {
    ("cifar10", "cd"): 15,
    ("cifar10", "ct"): 21,
    ("cifar10", "ict"): 34,
    ("cifar10", "samples"): 2,
    ("imagenet64", "cm"): 5,
    ("imagenet64", "scm"): 20,
    ("imagenet64", "samples"): 6,
    ("lsun-bedroom256", "cm-bedroom"): 9,
    ("lsun-bedroom256", "samples"): 6,
    ("lsun-cat256", "cm-cat"): 7,
    ("imagenet512", "scm-512"): 53,
}
DATASETS = sorted(path.parent.name for path in BOARDS.glob("*/published.csv"))


def rows(dataset: str, **wanted: str) -> list[PublishedRow]:
    found = [row for _, row in load_published(BOARDS / dataset).rows]
    return [r for r in found if all(getattr(r, k) == v for k, v in wanted.items())]


def test_every_table_of_the_deck_is_there_with_every_row() -> None:
    counts = Counter((d, r.table) for d in DATASETS for r in rows(d) if r.source == TALK)
    assert counts == DECK


@pytest.mark.parametrize("dataset", DATASETS)
def test_files_are_valid(dataset: str) -> None:
    assert check_published(BOARDS / dataset)[1] == []


@pytest.mark.parametrize(
    ("dataset", "method", "nfe", "fids"),
    [
        ("cifar10", "DDIM", "10", {"8.23", "13.36"}),
        ("cifar10", "DFNO", "1", {"4.12", "3.78"}),
        ("cifar10", "Score SDE", "2000", {"2.20", "2.38"}),
        ("lsun-bedroom256", "CT", "2", {"7.85", "7.80"}),
        ("imagenet512", "EDM2-S", "63x2", {"2.23", "2.29"}),
    ],
)
def test_disagreements_are_all_kept_with_a_note(
    dataset: str, method: str, nfe: str, fids: set[str]
) -> None:
    found = rows(dataset, method=method, nfe=nfe)
    assert {r.fid for r in found} == fids
    assert all(r.note for r in found)


def test_marks_of_the_deck_and_of_its_sources() -> None:
    knowledge, *_ = rows("cifar10", table="cd", method="Knowledge Distillation")
    assert knowledge.marks == ("synthetic pairs",)
    assert {r.marks for r in rows("cifar10", table="ict", method="CD")} == {("LPIPS-trained",)}
    pd = rows("imagenet64", table="scm", method="PD")
    assert all("re-implementation" in r.marks and "394M UViT" in r.note for r in pd)
    secondary = {
        r.method
        for d in DATASETS
        for r in rows(d, table="successors")
        if "secondary source" in r.marks
    }
    assert secondary == {"SCT-M", "IMM", "AYF-S"}, "SiDA and Uni-Instruct print theirs"


def test_successors_after_the_deck() -> None:
    found = {r.method for d in DATASETS for r in rows(d, table="successors")}
    assert found >= {
        "TCM",
        "MeanFlow",
        "AYF-S",
        "IMM",
        "SCT-M",
        "CTM",
        "SiDA",
        "Uni-Instruct",
        "DMD2",
        "f-distill",
    }


def test_guidance_counts_in_nfe_and_parameters_are_numbers() -> None:
    row, *_ = rows("imagenet512", method="EDM2-XXL", table="scm-512")
    assert (row.nfe, row.nfe_total, row.parameter_count) == ("63x2", 126, 1_500_000_000)


def test_rows_print_their_source_text_and_sort_by_value() -> None:
    board = load_published(BOARDS / "lsun-bedroom256").as_rows()
    found = next(r for r in board if r.title == "PG-SWGAN")
    assert found.measurements["fid"].text == "8.0"
    assert found.measurements["fid"].mean == 8.0
    assert found.kind == "reported"
    assert found.measurements["fid"].key == ""


def test_ids_are_unique() -> None:
    for dataset in DATASETS:
        ids = Counter(r.id for r in load_published(BOARDS / dataset).as_rows())
        assert max(ids.values()) == 1


def test_every_row_has_authors_and_a_paper_has_one_reference_on_all_boards() -> None:
    every = [
        (BOARDS / d / "published.csv", line, row)
        for d in DATASETS
        for line, row in load_published(BOARDS / d).rows
    ]
    assert check_papers(every) == []
    without = {row.method for _, _, row in every if not row.arxiv}
    assert without == {"Large-DiT"}, "the only one that is not on arXiv"


def test_another_reference_for_a_paper_is_named_by_row(board: Path) -> None:
    change(board / "published.csv", 8, "reference", "Someone et al., 2023")
    (problem,) = check_published(board)[1]
    assert (problem.line, problem.field) == (8, "reference")
    assert "arXiv 2303.01469 is 'Song et al., 2023' in " in problem.message
    assert "published.csv line 7 (found 'Someone et al., 2023')" in problem.message


def test_corrections_of_the_audit() -> None:
    ctm = rows("cifar10", arxiv="2310.02279", nfe="1")
    assert {r.fid for r in ctm} == {"1.87", "1.98"}
    assert all(r.note for r in ctm)
    assert {r.conditioning for r in rows("imagenet512")} == {"conditional"}
    assert {r.reference for r in rows("imagenet64", method="DMD2", fid="1.28")} == {
        "Yin et al., 2024"
    }
    assert not rows("imagenet512", method="DiffT")
    assert rows("imagenet512", method="DiffiT")[0].fid == "2.67"
    for dataset, method in (("cifar10", "MeanFlow"), ("cifar10", "IMM"), ("imagenet64", "AYF-S")):
        assert {r.family for r in rows(dataset, method=method)} == {"flow map"}
    assert len(rows("imagenet256")) == 61


def test_one_result_in_two_tables_is_one_row_with_both_places() -> None:
    found = [r for r in load_published(BOARDS / "cifar10").as_rows() if r.title == "CD"]
    assert [(r.nfe, r.measurements["fid"].text, r.marks) for r in found] == [
        (1, "3.55", ("LPIPS-trained",)),
        (2, "2.93", ("LPIPS-trained",)),
    ]
    assert found[0].details["place"] == (
        "Consistency Models: State-of-the-art few-step generation with consistency distillation"
        " (CD); Improved Techniques for Consistency Training: Results on CIFAR-10"
    )
    assert "; " in found[0].details["table"]
    deep = [r for r in load_published(BOARDS / "cifar10").as_rows() if r.title == "iCT-deep"]
    assert [r.marks for r in deep] == [(), ()], "a figure's caption repeats the table"


def test_what_disagrees_stays_apart() -> None:
    board = load_published(BOARDS / "cifar10").as_rows()
    ddim = [r.measurements["fid"].text for r in board if r.title == "DDIM" and r.nfe == 10]
    assert ddim == ["8.23", "13.36"]
    row = next(r for r in load_published(BOARDS / "imagenet256").as_rows() if r.title == "VAR-d30")
    assert (row.nfe, row.nfe_text) == (None, "not stated")
    dit = [r for r in load_published(BOARDS / "imagenet512").as_rows() if r.title == "DiT-XL/2"]
    assert [(r.nfe, r.measurements["is"].text) for r in dit] == [(500, "240.82")]


# ---- bad files ----------------------------------------------------------------------------------


@pytest.fixture
def board(tmp_path: Path) -> Path:
    return Path(shutil.copytree(BOARDS / "lsun-cat256", tmp_path / "lsun-cat256"))


def change(path: Path, line: int, field: str, value: str) -> None:
    table = list(csv.reader(path.read_text().splitlines()))
    table[line - 1][table[0].index(field)] = value
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(table)
    path.write_text(buffer.getvalue())


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("fid", "2,5", "pattern"),
        ("fid", "-1", "pattern"),
        ("nfe", "63 x 2", "pattern"),
        ("nfe", "0", "pattern"),
        ("year", "20222", "less than or equal to 2100"),
        ("year", "", "Input should be a valid integer"),
        ("year", "2023", "2023 is not the year of reference 'Karras et al., 2022'"),
        ("reference", "", "pattern"),
        ("reference", "arXiv:2206.00364", "pattern"),
        ("arxiv", "2213.00001", "pattern"),
        ("arxiv", "2306.00364", "2306.00364 is later than the year of its row, 2022"),
        ("family", "gan", "Input should be"),
        ("conditioning", "class", "Input should be"),
        ("marks", "lpips", "Input should be"),
        ("parameters", "280 M", "pattern"),
        ("precision", "1.01", "not between 0 and 1"),
        ("recall", "71", "not between 0 and 1"),
        ("table", "nope", "is not in board.toml (cm-cat)"),
        ("protocol", "nope", "is not in board.toml (unstated)"),
        ("method", "", "at least 1 character"),
    ],
)
def test_a_bad_value_names_file_line_and_field(
    board: Path, field: str, value: str, message: str
) -> None:
    change(board / "published.csv", 4, field, value)
    found, problems = check_published(board)
    assert found is None
    problem = problems[0]
    assert (problem.file.name, problem.line, problem.field) == ("published.csv", 4, field)
    assert message in problem.message
    with pytest.raises(UserError, match=rf"published.csv line 4, field '{field}'"):
        load_published(board)


def test_a_row_without_any_number_is_refused(board: Path) -> None:
    change(board / "published.csv", 2, "fid", "")
    assert "needs at least one" in check_published(board)[1][0].message


def test_a_lost_or_repeated_row_is_noticed(board: Path) -> None:
    path = board / "published.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-1]) + "\n")
    problem = check_published(board)[1][0]
    assert (problem.field, problem.file.name) == ("tables.cm-cat.rows", "board.toml")
    assert "has 7 rows, published.csv has 6" in problem.message
    assert (board / "board.toml").read_text().splitlines()[problem.line - 1] == "rows = 7"
    path.write_text("\n".join([*lines, lines[-1]]) + "\n")
    assert check_published(board)[1][0].message == "repeats line 8"


def test_structure_errors_are_named(board: Path) -> None:
    path = board / "published.csv"
    text = path.read_text()
    path.write_text(text.replace("fid,is", "FID,is", 1))
    assert check_published(board)[1][0].message.startswith("the header must be table,block")
    path.write_text(text + "a,b\n")
    problem = check_published(board)[1][0]
    assert (problem.line, problem.message) == (9, "has 2 fields instead of 20")
    path.write_text(text + '"unclosed')
    assert "is not CSV" in check_published(board)[1][0].message
    path.unlink()
    assert "cannot be read" in check_published(board)[1][0].message


def test_board_errors_are_named(board: Path) -> None:
    path = board / "board.toml"
    text = path.read_text()
    path.write_text(text.replace('rank_metric = "fid"', 'rank_metric = "FID"'))
    problem = check_published(board)[1][0]
    assert (problem.line, problem.field) == (4, "rank_metric")
    path.write_text(text.replace("rows = 7", "rows = 0"))
    problem = check_published(board)[1][0]
    assert problem.field == "tables.cm-cat.rows"
    assert path.read_text().splitlines()[problem.line - 1] == "rows = 0"
    path.write_text(text.replace("[tables", "[[tables"))
    assert "is not TOML" in check_published(board)[1][0].message
    path.write_text(text + 'extra = "x"\n')
    assert check_published(board)[1][0].field == "protocols.unstated.extra"
    path.write_text(text.replace('dataset = "lsun-cat256"', 'dataset = "cats"'))
    assert "but the folder is 'lsun-cat256'" in str(check_published(board)[1][0])
    path.write_text(text.replace("schema_version = 1", "schema_version = 2"))
    assert check_published(board)[1][0].field == "schema_version"


@given(st.dictionaries(st.sampled_from(list(METRICS)), st.text(max_size=12), min_size=1))
def test_printed_numbers_are_numbers_or_refused(cells: dict[str, str]) -> None:
    base = {f.alias or n: "" for n, f in PublishedRow.model_fields.items()}
    base |= {
        "table": "t",
        "method": "m",
        "year": "2024",
        "reference": "A et al., 2024",
        "family": "GAN",
        "nfe": "1",
        "fid": "1.0",
        "protocol": "p",
        "source": "s",
    }
    try:
        row = PublishedRow.model_validate(base | cells)
    except ValueError:
        return
    for name in METRICS:
        text = getattr(row, "is_" if name == "is" else name)
        assert text == "" or float(text) >= 0


def test_a_deeply_nested_board_is_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "digits"
    folder.mkdir()
    (folder / "board.toml").write_text("a = " + "{a = " * 3000)
    (folder / "published.csv").write_text("")
    _, problems = check_published(folder)
    assert "is not TOML: maximum recursion depth exceeded" in "; ".join(map(str, problems))


@pytest.mark.parametrize("name", ["nfe", "fid", "parameters"])
def test_numbers_of_absurd_length(name: str) -> None:
    """Python refuses to make integers of more than 4,300 digits."""
    sound = rows("imagenet512", nfe="63x2")[0].model_dump(by_alias=True) | {"marks": ""}
    PublishedRow.model_validate(sound)
    with pytest.raises(ValueError, match="String should match pattern"):
        PublishedRow.model_validate(sound | {name: "9" * 5000})

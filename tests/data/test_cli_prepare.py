from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from command_outcome import Outcome
from dataset_builders import class_folder, edm_zip, encode, pictures

import cmbench.cli.prepare as cli
from cmbench.errors import UserError


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CMBENCH_DATA", str(tmp_path / "data"))

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(cli.prepare, list(arguments))

    return run


def error_of(result: Result) -> str:
    assert isinstance(result.exception, UserError), result.output
    return str(result.exception)


def test_the_targets_are_listed(call, tmp_path: Path) -> None:
    (tmp_path / "data/cifar10.partial").mkdir(parents=True)
    lines = call().stdout.splitlines()
    assert lines[0] == f"prepared datasets are in {tmp_path / 'data'}"
    states = {line.split()[0]: line.split()[1] for line in lines[1:]}
    assert states["cifar10"] == "interrupted"
    assert states["imagenet64"] == "missing"
    assert "digits" not in states


def test_cifar10_from_a_zip_then_again_then_verified(call, tmp_path: Path) -> None:
    path = edm_zip(tmp_path / "a.zip", pictures(10, 32), list(range(10)))
    result = call("cifar10", "--source", str(path), "--subset")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("cifar10: 10 images 3x32x32, 10 classes\n")
    assert "verifying" in result.stderr
    assert "(already prepared)" in call("cifar10", "--source", str(path), "--subset").stdout
    assert "images are unchanged" in call("cifar10", "--verify").stdout
    assert "cifar10            10 images" in call().stdout
    with open(tmp_path / "data/cifar10/images.npy", "r+b") as file:
        file.seek(200)
        file.write(b"\0\1\2\3")
    assert "images 0-9 have changed" in error_of(call("cifar10", "--verify"))


def test_a_folder_of_ones_own_gets_a_name(call, tmp_path: Path) -> None:
    class_folder(tmp_path / "mine", pictures(6, 16))
    target = f"folder:{tmp_path / 'mine'}"
    options = ("--name", "photos8", "--transform", "adm-crop", "--resolution", "8")
    assert call(target, *options).stdout.startswith("photos8: 6 images 3x8x8, 3 classes")
    assert "photos8: 6 images" in call("photos8", "--verify").stdout
    assert call(target).stdout.startswith("folder-mine-")
    (tmp_path / "mine/ant/00000.png").write_bytes(encode(pictures(1, 16, channels=1)[0]))
    other = call(target, "--name", "grey").stdout
    assert other.startswith("grey: 6 images 3x16x16")  # though its first image is grey
    assert "note: 1 of 6 images are grey (made RGB by repeating the channel)" in other


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cifra10",), r"unknown target 'cifra10'; allowed: .*; did you mean 'cifar10'?"),
        (("cifar10",), "'cifar10' needs --source PATH; PATH is cifar-10-python.tar.gz"),
        (("digits",), "'digits' is built in and needs no preparation"),
        (("cifar10", "--source", "gone"), "--source: gone does not exist"),
        (("cifar10", "--verify"), "'cifar10' is not prepared in"),
        (("cifar10", "--source", "x", "--transform", "none"), "--transform: 'cifar10' has its own"),
        (("cifar10", "--source", "x", "--resolution", "8"), "--resolution: 'cifar10' has its own"),
        (("folder:gone",), "gone does not exist"),
        (("folder:a", "--source", "b"), "--source: 'b', but 'folder:a' names the source itself"),
        (("folder:.", "--name", "cifar10"), "--name: 'cifar10'; allowed: letters"),
        (("folder:.", "--name", "../x"), "--name: '../x'; allowed: letters"),
    ],
)
def test_bad_requests_get_one_line(call, arguments: tuple[str, ...], message: str) -> None:
    assert re.search(message, error_of(call(*arguments)))


def test_weights_are_handed_on(call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(cli.WEIGHTS, "weights-x", "something to fetch")
    monkeypatch.setattr(
        "cmbench.metrics.weight_files.prepare_target",
        lambda name, source, locations: f"{name}: got {source}",
    )
    assert call("weights-x", "--source", "w.pt").stdout == "weights-x: got w.pt\n"
    assert "weights-x          weights            something to fetch" in call().stdout


def test_help_states_each_default_once(cmbench: Callable[..., Outcome]) -> None:
    text = " ".join(cmbench("prepare", "--help").out.split())
    assert "--split NAME Part of the source. [default: train] --transform" in text

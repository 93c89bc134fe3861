from __future__ import annotations

import subprocess
import sys

import pytest

from cmbench.data.base import load_dataset
from cmbench.data.catalog import BUILTIN_DATASETS
from cmbench.data.locations import DATA_VARIABLE, DataLocations
from cmbench.data.rules import RULES
from cmbench.data.transforms import TRANSFORMS
from cmbench.errors import EXIT_MISSING, MissingError
from cmbench.plugin.specs import DatasetSpec, load_object

NOT_EMBEDDED = [s for s in BUILTIN_DATASETS if not s.embedded]


def test_names_are_unique_and_plain() -> None:
    names = [s.name for s in BUILTIN_DATASETS]
    assert len(set(names)) == len(names)
    assert all(name.replace("-", "").isalnum() for name in names)


def test_the_imagenet64_references_are_datasets_of_their_own() -> None:
    found = {s.name: RULES[s.name].transform for s in BUILTIN_DATASETS if "imagenet64" in s.name}
    assert found == {
        "imagenet64": "dhariwal-crop",
        "imagenet64-adm": "adm-crop",
        "imagenet64-edm": "edm-crop",
        "imagenet64-small": "none",
    }


def test_every_dataset_that_is_not_embedded_has_a_rule() -> None:
    assert set(RULES) == {s.name for s in NOT_EMBEDDED}
    assert {rule.transform for rule in RULES.values()} <= set(TRANSFORMS)


@pytest.mark.parametrize("spec", NOT_EMBEDDED, ids=lambda s: s.name)
def test_a_dataset_that_is_not_prepared_says_how_to_prepare_it(
    spec: DatasetSpec, locations: DataLocations
) -> None:
    with pytest.raises(MissingError) as caught:
        load_dataset(spec, load_object(spec.factory), locations)
    assert f"cmbench prepare {spec.name} --source PATH" in str(caught.value)
    assert RULES[spec.name].hint in str(caught.value)
    assert caught.value.exit_code == EXIT_MISSING


@pytest.mark.parametrize(
    "module", ["cmbench.data.catalog", "cmbench.data.preparation.run", "cmbench.data.custom"]
)
def test_listing_and_preparing_import_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_data_folder_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DATA_VARIABLE, "/somewhere")
    assert str(DataLocations().folder("cifar10")) == "/somewhere/cifar10"
    monkeypatch.delenv(DATA_VARIABLE)
    assert DataLocations().data_dir.name == "cmbench"

"""Statistics of other programs that cannot be an extractor's are refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cmbench.errors import EXIT_USAGE, UserError
from cmbench.metrics import reference_import
from cmbench.metrics.catalog import EXTRACTORS
from cmbench.metrics.inception import SPATIAL_CHANNELS
from cmbench.metrics.reference_import import PUBLISHED, SPATIAL_WIDTH, WIDTHS, import_reference

ONE = np.eye(2048)


def write(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def test_the_width_of_each_extractor_is_known() -> None:
    from cmbench.metrics.clean_fid import CleanFidExtractor
    from cmbench.metrics.dinov2 import ARCHITECTURES

    assert WIDTHS.keys() == PUBLISHED.keys()
    assert WIDTHS["dinov2"] == ARCHITECTURES["vitl14"][1]
    assert WIDTHS["inception"] == WIDTHS["inception-clean"] == CleanFidExtractor.feature_dim
    assert SPATIAL_WIDTH == SPATIAL_CHANNELS * 17 * 17


@pytest.mark.parametrize(
    ("width", "extractor", "expected"), [(64, None, 2048), (2048, "dinov2", 1024)]
)
def test_statistics_of_another_width_are_refused(
    tmp_path: Path, width: int, extractor: str | None, expected: int
) -> None:
    path = write(tmp_path / "x.npz", mu=np.zeros(width), sigma=np.eye(width))
    with pytest.raises(UserError, match=rf"statistics of {width} features; allowed: {expected}, "):
        import_reference(path, extractor=extractor)


def test_spatial_statistics_and_rows_of_another_width_are_refused(tmp_path: Path) -> None:
    path = write(
        tmp_path / "x.npz", mu=np.zeros(2048), sigma=ONE, mu_s=np.zeros(9), sigma_s=np.eye(9)
    )
    with pytest.raises(UserError, match=r"spatial statistics of 9 features; allowed: 2023, "):
        import_reference(path)
    rows = write(tmp_path / "f.npz", feats=np.random.RandomState(0).randn(20, 64))
    with pytest.raises(
        UserError, match=r"rows of 64 features; allowed: 2048, the width of 'incept"
    ):
        import_reference(rows)


@pytest.mark.usefixtures("any_width")
@pytest.mark.parametrize(
    ("sigma", "message"),
    [
        (np.diag([1.0, -0.5, 2.0]), r"the variance of feature 1 is -0\.5; allowed: a covariance"),
        (np.array([[1.0, 2.0], [2.0, 1.0]]), r"has the eigenvalue -1, a negative variance"),
        (np.array([[1.0, 0.5], [0.0, 1.0]]), r"sigma is not symmetric"),
        (np.eye(3)[:2], r"mean of shape \(2,\) with covariance \(2, 3\)"),
    ],
)
def test_what_is_no_covariance_is_refused(tmp_path: Path, sigma: Any, message: str) -> None:
    path = write(tmp_path / "x.npz", mu=np.zeros(len(sigma)), sigma=sigma)
    with pytest.raises(UserError, match=message) as caught:
        import_reference(path)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("any_width")
def test_rounding_of_a_covariance_of_low_rank_is_accepted(tmp_path: Path) -> None:
    rows = np.random.RandomState(0).randn(20, 60).astype(np.float32)
    sigma = np.cov(rows, rowvar=False).astype(np.float32)
    assert np.linalg.eigvalsh(sigma.astype(np.float64)).min() < 0, "rounding makes it so"
    reference = import_reference(write(tmp_path / "x.npz", mu=rows.mean(0), sigma=sigma))
    assert reference.moments.dim == 60


@pytest.mark.parametrize("name", sorted({s.name for s in EXTRACTORS} - PUBLISHED.keys()))
def test_listed_extractors_without_published_statistics_are_not_called_unknown(
    cmbench: Callable[..., Any], tmp_path: Path, name: str
) -> None:
    path = write(tmp_path / "x.npz", mu=np.zeros(64), sigma=np.eye(64))
    done = cmbench("refs", "import", str(path), "--extractor", name)
    assert done.code == EXIT_USAGE
    (line,) = done.err.splitlines()
    assert f"statistics of '{name}' cannot be imported" in line
    assert "unknown" not in line
    assert "give the images themselves as --reference" in line
    other = cmbench("refs", "import", str(path), "--extractor", "nothing")
    assert "unknown extractor 'nothing'" in other.err
    assert reference_import.PUBLISHED.keys() <= {s.name for s in EXTRACTORS}


def test_statistics_of_other_programs_can_be_shown(
    cmbench: Callable[..., Any], tmp_path: Path
) -> None:
    path = write(tmp_path / "edm.npz", mu=np.zeros(2048), sigma=ONE)
    done = cmbench("refs", "show", str(path))
    assert done.code == 0, done.err
    facts = dict(line.split(maxsplit=1) for line in done.out.splitlines())
    assert (facts["source"], facts["origin"], facts["dimensions"]) == ("edm", "edm", "2048")
    other = cmbench("refs", "show", str(write(tmp_path / "x.npz", a=np.zeros(1))))
    assert other.code == EXIT_USAGE
    assert len(other.err.splitlines()) == 1
    assert "holds a; allowed: an EDM" in other.err


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (1e300, r"variances sum to 2\.0\de\+303; allowed: 1e-12 to 1e\+12; fetch"),
        (1e-30, r"variances sum to 2\.0\de-27; allowed: 1e-12 "),
        (0.0, r"variances sum to 0; allowed: 1e-12 "),
    ],
)
def test_variances_that_no_images_have_are_refused(
    tmp_path: Path, scale: float, message: str
) -> None:
    path = write(tmp_path / "x.npz", mu=np.zeros(2048), sigma=ONE * scale)
    with pytest.raises(UserError, match=message):
        import_reference(path)
    spatial = {"mu_s": np.zeros(2023), "sigma_s": np.eye(2023) * scale}
    path = write(tmp_path / "s.npz", mu=np.zeros(2048), sigma=ONE, **spatial)
    with pytest.raises(UserError, match=message):
        import_reference(path)


def test_means_and_features_that_no_images_have_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.npz", mu=np.full(2048, 1e200), sigma=ONE)
    with pytest.raises(UserError, match=r"mu up to 1e\+200; allowed: 0 to 1e\+06; fetch"):
        import_reference(path)
    rows = np.random.RandomState(0).randn(8, 2048)
    for scale, message in (
        (1e300, r"features up to \d\.\d+e\+300; allowed: 0 to 1e\+06"),
        (np.nan, r"features up to nan; allowed: 0 to 1e\+06"),
        (1e-20, r"variances sum to \d\.\d+e-37; allowed: 1e-12 "),
    ):
        with pytest.raises(UserError, match=message):
            import_reference(write(tmp_path / "f.npz", feats=rows * scale))

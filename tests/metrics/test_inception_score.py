from __future__ import annotations

import pytest
import torch

from cmbench.errors import NonFiniteError, UserError
from cmbench.metrics.inception_score import inception_score


def test_equals_torch_fidelity() -> None:
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = torch.randn(503, 17, generator=torch.Generator().manual_seed(0)) * 3
    for splits, shuffle in ((10, True), (7, False), (1, True)):
        theirs = isc_features_to_metric(logits, splits=splits, shuffle=shuffle, rng_seed=2020)
        ours = inception_score(logits, splits=splits, shuffle_seed=2020 if shuffle else None)
        assert ours.mean == pytest.approx(theirs["inception_score_mean"], rel=1e-12)
        assert ours.std == pytest.approx(theirs["inception_score_std"], rel=1e-9, abs=1e-12)


def test_certain_and_balanced_scores_the_number_of_classes() -> None:
    logits = torch.eye(8).repeat(20, 1) * 1e4
    assert inception_score(logits, splits=1).mean == pytest.approx(8, rel=1e-12)


def test_one_class_or_no_opinion_scores_one() -> None:
    one_class = torch.zeros(40, 8)
    one_class[:, 3] = 1e4
    assert inception_score(one_class, splits=4).mean == pytest.approx(1, rel=1e-12)
    assert inception_score(torch.zeros(40, 8), splits=4).mean == pytest.approx(1, rel=1e-12)


def test_bad_input_is_named() -> None:
    with pytest.raises(UserError, match="10 splits of 5 samples; allowed: 1 to 5"):
        inception_score(torch.zeros(5, 3))
    with pytest.raises(NonFiniteError, match="logits"):
        inception_score(torch.full((20, 3), torch.nan))

from __future__ import annotations

import pytest
import torch
from metric_kit import metrics

from cmbench.errors import NonFiniteError, UserError
from cmbench.metrics.inception_score import inception_score
from cmbench.metrics.shipped_cnn import DigitsExtractor
from cmbench.metrics.suite import MetricSuite


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


def test_openais_evaluator() -> None:
    """Chunks of a fixed size in the order of the samples; the last is what is left."""
    logits = torch.randn(23, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scores = []
    for chunk in logits.softmax(1).split(5):
        divergence = (chunk * (chunk.log() - chunk.mean(0).log())).sum(1)
        scores.append(float(divergence.mean().exp()))
    found = inception_score(logits, split_size=5, shuffle_seed=None)
    assert found.splits == len(scores) == 5
    assert found.mean == pytest.approx(sum(scores) / 5, rel=1e-12)


def test_openais_metric_has_a_key_of_its_own() -> None:
    images = torch.randint(0, 256, (30, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    suite = MetricSuite(metrics("is", "is-openai"), extractor=DigitsExtractor())
    suite.update(images.to(torch.uint8))
    found = suite.finalize()
    logits = suite.samples.logits
    assert logits is not None
    whole = inception_score(logits, splits=1)
    assert found["is-openai"].value == pytest.approx(whole.mean, rel=1e-12)
    assert found["is-openai"].standard_error is None, "one chunk says nothing of its spread"
    assert ":split-size=5000:shuffle=none:" in found["is-openai"].key
    assert ":splits=10:shuffle=2020:" in found["is"].key
    assert found["is"].standard_error is not None

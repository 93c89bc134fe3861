"""Inception score: exp of the mean KL divergence from class posterior to class marginal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from cmbench.errors import NonFiniteError, UserError
from cmbench.metrics.metric import MetricData
from cmbench.metrics.values import Estimate, Json, normal_interval

MAX_SPLITS = 10
#: Samples per chunk of OpenAI's evaluator, which takes them in order.
OPENAI_SPLIT = 5000


@dataclass(frozen=True)
class InceptionScore:
    """Mean and population standard deviation over ``splits`` chunks of the samples."""

    mean: float
    std: float
    splits: int


def inception_score(
    logits: Tensor,
    *,
    splits: int = 10,
    split_size: int | None = None,
    shuffle_seed: int | None = 2020,
) -> InceptionScore:
    """Return exp E_x KL(p(y|x) || p(y)), averaged over chunks (Salimans et al. 2016, sec. 4).

    Args:
        logits: ``[N, K]`` of any classifier, without a softmax; float64 inside.
        splits: number of chunks of (nearly) equal size; each needs one sample at least.
        split_size: chunks of this many samples instead; the last may be smaller.
        shuffle_seed: order of the samples before splitting: torch-fidelity's permutation
            (``RandomState(2020)``) by default, None keeps the order, as OpenAI's evaluator does.

    Raises:
        UserError: fewer samples than chunks.
        NonFiniteError: a logit is NaN or infinite.
    """
    count = logits.shape[0]
    if split_size is not None:
        splits = math.ceil(count / split_size)
    if not 1 <= splits <= count:
        raise UserError(
            "inception score",
            f"{splits} splits of {count} samples",
            allowed=f"1 to {count}",
            remedy="evaluate more samples or lower the number of splits",
        )
    if not torch.isfinite(logits).all():
        raise NonFiniteError(
            "inception score", "NaN or infinite logits", remedy="look at the images"
        )
    if shuffle_seed is not None:
        order = np.random.RandomState(shuffle_seed).permutation(count)
        logits = logits[torch.from_numpy(order).to(logits.device)]
    log_p = logits.double().log_softmax(1)
    scores = []
    edges = [index * count // splits for index in range(splits + 1)]
    if split_size is not None:
        edges = [min(index * split_size, count) for index in range(splits + 1)]
    for start, stop in pairwise(edges):
        chunk = log_p[start:stop]
        p = chunk.exp()
        # The marginal in log space too: a class that no sample has stays 0 * -inf free.
        log_q = chunk.logsumexp(0) - np.log(len(chunk))
        scores.append(float((p * (chunk - log_q)).sum(1).mean().exp()))
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)), splits)


def torch_fidelity_score(data: MetricData) -> Estimate:
    """Return the score over at most 10 chunks of the shuffled samples, as torch-fidelity has it.

    ``detail.real`` is the score of the real images.
    """
    splits = min(MAX_SPLITS, len(data.logits))
    score = inception_score(data.logits, splits=splits)
    real = {} if data.real_score is None else {"real": data.real_score}
    return _estimate(score, (f"splits={splits}", "shuffle=2020"), real)


def openai_score(data: MetricData) -> Estimate:
    """Return the score over chunks of 5,000 samples in order, as OpenAI's evaluator has it."""
    score = inception_score(data.logits, split_size=OPENAI_SPLIT, shuffle_seed=None)
    return _estimate(score, (f"split-size={OPENAI_SPLIT}", "shuffle=none"), {})


def _estimate(
    score: InceptionScore, facts: tuple[str, ...], known: Mapping[str, float]
) -> Estimate:
    detail: dict[str, Json] = {"splits": score.splits, "std": score.std, **known}
    if score.splits == 1:  # nothing varies between chunks
        return Estimate(score.mean, detail=detail, facts=facts)
    error = score.std / math.sqrt(score.splits)
    return Estimate(score.mean, error, normal_interval(score.mean, error), detail, facts)

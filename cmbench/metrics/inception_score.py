"""Inception score: exp of the mean KL divergence from class posterior to class marginal."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from cmbench.errors import NonFiniteError, UserError


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

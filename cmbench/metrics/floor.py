"""The floor: what a perfect generator is expected to score at a row's counts of images.

A Fréchet distance between two finite sets of one distribution is not 0 but about b (1/N + 1/M), and
two manifolds of finite sets overlap in part only. Without that number a reader cannot tell how much
of a score the generator is to blame for. It is the floor of distances and the ceiling of scores
where higher is better; records call both ``floor``:

* Fréchet distance: mean and standard deviation over random splits of the real images into halves of
  h, times (1/N + 1/M) / (2/h).
* Kernel distance: 0, since the estimator is unbiased.
* Precision is the chance f(M) that a new image lies in the manifold of M real ones, recall the
  chance f(N) that a real one lies in the manifold of N new ones. f(n) is measured by leaving out
  each of n + 1 real images in turn: of all of them, and of random subsets of half, a quarter, …
  of their number. Between these counts f is interpolated in log n. Beyond the number of real
  images it cannot be measured: the value is that of all of them.
* Density: 1. Coverage: 1 - Π (M - i) / (N + M - i) for i = 1 … k. Both hold for any distribution
  (Naeem et al. 2020, arXiv:2002.09797, Lemmas 1 and 2).

:mod:`cmbench.metrics.real_splits` measures it once per reference.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from itertools import pairwise

from cmbench.metrics.values import Json


@dataclass(frozen=True)
class Share:
    """Share of real images inside the manifold of ``count`` others.

    ``std`` is the standard deviation over sets of ``count + 1`` images, estimated from ``subsets``
    random ones.
    """

    count: int
    mean: float
    std: float
    subsets: int


@dataclass(frozen=True)
class Floors:
    """What splits of the real images say about each other.

    Args:
        splits: number of random splits into halves.
        half: number of images in each half.
        distance: mean Fréchet distance between the halves.
        distance_std: its standard deviation over splits.
        inside: shares inside the manifold of the others, by ascending count.
    """

    splits: int
    half: int
    distance: float
    distance_std: float
    inside: tuple[Share, ...]

    def to_json(self) -> str:
        """Return all of it as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Floors | None:
        """Return what :meth:`to_json` wrote; None for anything else (an older file's floor)."""
        try:
            facts = json.loads(text)
            inside = tuple(Share(**share) for share in facts.pop("inside"))
            return cls(**facts, inside=inside)
        except (ValueError, TypeError, KeyError, AttributeError):
            return None

    def of_distance(self, samples: int, reference: int) -> dict[str, Json]:
        """Return the floor of a Fréchet distance of N samples to M reference images."""
        scale = (1 / samples + 1 / reference) / (2 / self.half)
        std = scale * self.distance_std
        return _facts(scale * self.distance, std, samples, reference, self.splits)

    def of_unbiased(self, samples: int, reference: int) -> dict[str, Json]:
        """Return the floor of an unbiased distance: 0."""
        return _facts(0.0, None, samples, reference)

    def of_share(self, name: str, samples: int, reference: int, k: int) -> dict[str, Json]:
        """Return the ceiling of precision, recall, density or coverage, ``k`` neighbours each.

        ``samples`` and ``reference_samples`` of the result are the counts that it is for: never
        more than the real images allow.
        """
        if name == "precision":
            share = self._inside(reference)
            return _facts(share.mean, share.std, samples, share.count, share.subsets)
        if name == "recall":
            share = self._inside(samples)
            return _facts(share.mean, share.std, share.count, reference, share.subsets)
        missed = math.prod((reference - i) / (samples + reference - i) for i in range(1, k + 1))
        return _facts(1.0 if name == "density" else 1 - missed, None, samples, reference)

    def _inside(self, count: int) -> Share:
        """Return the share inside the manifold of ``count`` others, as far as it is known."""
        first, last = self.inside[0], self.inside[-1]
        if not first.count < count < last.count:
            return first if count <= first.count else last
        pairs = pairwise(self.inside)
        low, high = next(pair for pair in pairs if count <= pair[1].count)
        weight = math.log(count / low.count) / math.log(high.count / low.count)
        mean, std = (a + weight * (b - a) for a, b in ((low.mean, high.mean), (low.std, high.std)))
        return Share(count, mean, std, low.subsets)


def _facts(
    value: float, std: float | None, samples: int, reference: int, splits: int = 0
) -> dict[str, Json]:
    """Return what a record says; ``splits`` is 0 for values that no real image decides."""
    return {
        "value": value,
        "std": std,
        "samples": samples,
        "reference_samples": reference,
        "splits": splits,
    }

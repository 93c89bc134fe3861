"""Sampling: per-image seeds, counted network evaluations, streaming batches."""

from cmbench.sampling.draws import ImageDraws
from cmbench.sampling.stream import SampleBatch, Sampler

__all__ = ["ImageDraws", "SampleBatch", "Sampler"]

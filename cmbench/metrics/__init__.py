"""metrics: feature extractors, Fréchet distance, IS, precision/recall, KID.

Import the submodules directly; this package imports nothing, so that the torch-free
:mod:`cmbench.metrics.catalog` stays torch-free.
"""

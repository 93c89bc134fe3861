"""Checkpoints of other projects, read without running their code.

``read_checkpoint`` (in :mod:`cmbench.importers.read`) is the door: EDM, EDM2, ECT and TCM pickles,
OpenAI's ``.pt``, diffusers folders and OpenAI's JAX checkpoints become :class:`ImportedNetwork`.
"""

"""Checkpoints from elsewhere, read without running anything of theirs.

``read_checkpoint`` (in :mod:`cmbench.importers.read`) is the door: EDM, EDM2, ECT and TCM pickles,
OpenAI's ``.pt``, diffusers folders and OpenAI's JAX checkpoints become :class:`ImportedNetwork`.
"""

"""Datasets: specs with their protocol, readers, and the one prepared format.

``catalog``, ``locations`` and everything that ``cmbench prepare``
uses import no torch; ``base`` and the datasets themselves do.
"""

"""Datasets: specs with their protocol, readers, and the one prepared format.

``catalog`` (what there is), ``locations`` (where it lies) and everything that ``cmbench prepare``
uses import no torch; ``base`` and the datasets themselves do.
"""

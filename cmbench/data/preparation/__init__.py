"""``cmbench prepare``: convert a source into the prepared format, once. Imports no torch.

``run.prepare`` is the door. This file imports nothing, since every worker process imports it.
"""

"""``cmbench prepare``: convert a source into the prepared format, once. Imports no torch.

``run.prepare`` is the entry point. This file imports nothing: every worker process imports it.
"""

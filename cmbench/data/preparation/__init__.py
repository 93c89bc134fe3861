"""``cmbench prepare``: convert a source into the prepared format, once. Imports no torch."""

from cmbench.data.preparation.run import Progress, Request, prepare

__all__ = ["Progress", "Request", "prepare"]

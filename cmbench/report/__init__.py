"""Reports: one self-contained HTML page per dataset, and its table as Markdown, CSV and LaTeX."""

from cmbench.report.render import render

__all__ = ["render"]

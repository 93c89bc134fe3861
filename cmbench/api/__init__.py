"""The functions of ``import cmbench``: sweeps, results, models, scoring, data."""

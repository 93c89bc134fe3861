"""Runs, cells, plans, execution and records."""

"""Measuring: samples in, metric values and warnings out."""

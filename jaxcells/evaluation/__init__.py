"""Figures with confidence intervals, from a trained workdir."""

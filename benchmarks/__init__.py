"""Measurements beside the peers: `python -m benchmarks.NAME` from the repository root."""

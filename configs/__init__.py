"""Experiments: `default.py` is the recipe, the others change a few of its keys."""

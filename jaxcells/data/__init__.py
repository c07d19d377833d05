"""From image files to batches, in NumPy alone: nothing under this package imports JAX."""

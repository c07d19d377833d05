"""jaxcells: from folders of microscope images to a tested JAX/Flax classifier.

Importing this package, or anything under `jaxcells.data`, does not import JAX.
"""

from jaxcells.files import Error

__version__ = "0.1.0"

__all__ = ["Error", "__version__"]

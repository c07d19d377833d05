"""Scripts for those who work on jaxcells: `python -m tools.NAME` from the repository root."""

"""Scripts for those who work on jaxcells; run from the repository root as `python -m tools.NAME`."""

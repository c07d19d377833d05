"""The only script: `python launch.py [VERB] --config FILE`. See `python launch.py --help`."""

import sys

try:
    from jaxcells.cli import run
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}; use the Python of the README's set-up: .venv/bin/python launch.py")

if __name__ == "__main__":
    run()

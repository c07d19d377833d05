"""The only script: `python launch.py [VERB] --config FILE`. See `python launch.py --help`."""

from jaxcells.cli import run

if __name__ == "__main__":
    run()

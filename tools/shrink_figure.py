"""Makes a small copy of a figure for the README: 1000 pixels wide, 256 colours.

python launch.py describe --config configs/resnet34.py
python tools/shrink_figure.py runs/resnet34/describe/network.png docs/network.png

python launch.py gradients --config configs/gradients.py
python tools/shrink_figure.py runs/gradients/gradients/gradients.png docs/gradients.png

python launch.py compare --config configs/degradation.py
python tools/shrink_figure.py runs/degradation/compare/curves.png docs/degradation.png
"""

import argparse
from pathlib import Path

from PIL import Image

_WIDTH = 1000


def main() -> None:
    """Reads one picture and writes the other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("figure", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    figure = Image.open(args.figure).convert("RGB")
    size = (_WIDTH, round(figure.height * _WIDTH / figure.width))
    figure.resize(size, Image.Resampling.LANCZOS).quantize(256).save(args.out, optimize=True)


if __name__ == "__main__":
    main()

"""The demo's network on an eighth, a quarter, half and all of the training images.

python launch.py compare --config configs/learning_curve.py

Says whether more images would help, in compare/table.md and compare/learning_curve.png. On images
of your own: `--config.data.root=FOLDER`, and `--config.data.crop_size` where they are small.
"""

from ml_collections import ConfigDict

from configs import demo


def get_config() -> ConfigDict:
    config = demo.get_config()
    config.experiments = ("resnet18",)
    config.seeds = (0,)
    # Shares of the training images of every class; a smaller one is a part of a larger one.
    config.fractions = (0.125, 0.25, 0.5, 1.0)
    return config

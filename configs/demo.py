"""The whole path in minutes: a small network on the built-in sample, from random parameters.

python launch.py --config configs/demo.py
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    config = default.get_config()
    config.init = "random"
    config.model.name = "resnet18"
    config.model.width = 16
    config.data.crop_size = 100
    config.data.crops_per_class = 600
    config.data.split = (400, 100, 100)
    config.data.augment.dihedral = True  # cells in suspension have no upright
    config.optim.learning_rate = 0.03
    config.optim.schedule = "cosine"
    config.train.num_epochs = 10
    return config

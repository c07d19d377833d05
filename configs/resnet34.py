"""ResNet-34 from ImageNet weights, by the recipe of the reference study.

python launch.py --config configs/resnet34.py --config.data.root=FOLDER
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    config = default.get_config()
    config.model.name = "resnet34"
    return config

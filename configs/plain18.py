"""The plain twin of ResNet-18: the same layers without shortcuts (He et al. 2016, section 3.3).

python launch.py --config configs/plain18.py --config.data.root=FOLDER

There are no pre-trained weights for it, so it starts at random.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    config = default.get_config()
    config.model.name = "plain18"
    config.init = "random"
    return config

"""Linear probe: a ResNet-34 stays as ImageNet made it, and only a new head is trained.

python launch.py --config configs/linear_probe.py --config.data.root=FOLDER

What the frozen layers make of every crop is computed once and kept, so an epoch takes a moment.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    config = default.get_config()
    config.optim.freeze = ("(?!fc)",)  # all but the head
    config.optim.learning_rate = 0.01
    return config

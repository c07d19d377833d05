"""ResNet-34 fine-tuned in two phases: the new head alone for 5 epochs, then everything.

python launch.py --config configs/two_phase.py --config.data.root=FOLDER

A head that starts at random sends large gradients into layers that know better; it learns first.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    config = default.get_config()
    config.optim.freeze = ("(?!fc)",)  # all but the head
    config.optim.freeze_epochs = 5
    return config

"""Does depth harm without shortcuts? 18 and 34 layers, plain and residual, on the sample.

python launch.py compare --config configs/degradation.py

The experiment of He et al. 2016, section 4.1, at a size for two cores: the four networks have equal
seeds, crops and settings and differ in their names alone. What counts is the training loss.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    config = default.get_config()
    config.experiments = ("plain18", "plain34", "resnet18", "resnet34")
    config.seeds = (0, 1)
    config.init = "random"
    config.model.width = 16
    config.data.crop_size = 64
    config.data.crops_per_class = 360
    config.data.split = (320, 20, 20)
    config.optim.learning_rate = 0.03
    config.optim.schedule = "cosine"
    config.train.num_epochs = 16
    return config

"""Does depth harm without shortcuts? 18 and 34 layers, plain and residual, on the sample.

python launch.py compare --config configs/degradation.py

The experiment of He et al. 2016, section 4.1, at a size for two cores: the four networks have equal
seeds, crops and settings and differ in their names alone. What counts is the training loss, in
compare/curves.png. Takes about 10 minutes on two cores. Found there, in the last of 16 epochs, with
both seeds: plain-18 0.03 and 0.16, plain-34 1.04 and 1.09 (chance is ln 3 = 1.10), ResNet-18 0.008
and 0.003, ResNet-34 0.07 and 0.007. The deeper plain network does not train at all, which is more
than the paper's degradation; with shortcuts both depths fit, the deeper one no better.
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

"""The gradient in every layer of plain, residual and pre-activation networks, on the sample.

python launch.py gradients --config configs/gradients.py

Takes two minutes on two cores, nearly all of it to compile six networks. Result to expect in
runs/gradients/gradients: with norms, at initialisation, the gradient of plain34 grows some 21-fold
from the last stage to the first, where that of resnet34 and preact34 stays within a factor of 2.5;
after 24 steps it is some 9 times smaller in the first stage than in the last. Without norms, at
initialisation, it is as even as the others', and thousands of times smaller.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    config = default.get_config()
    config.init = "random"
    config.model.name = "resnet34"  # and so plain34 and preact34
    config.model.width = 16
    config.data.crop_size = 64
    config.data.crops_per_class = 148
    config.data.split = (128, 10, 10)
    config.optim.learning_rate = 0.01
    config.train.num_epochs = 2  # 24 steps
    return config

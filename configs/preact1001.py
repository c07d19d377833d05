r"""1001 layers of identity mappings on crops of 32x32 pixels (He et al. 2016b, section 5).

python launch.py --config configs/preact1001.py --config.data.root=FOLDER

The recipe of the paper for CIFAR, with a cosine instead of two steps of the learning rate. A crop
should hold a cell: take images at a scale at which cells are some 30 pixels wide, as in the
built-in sample, which it runs on without data.root.

Needs 7 GB of GPU memory, in proportion to batch size and area of a crop: 27 GB at
--config.data.crop_size=64 (computed by XLA for the compiled step, not measured on a GPU).

On a CPU, 164 layers are a matter of minutes. On the built-in sample this took 12 on two busy cores,
and gave a balanced accuracy of 0.57 over three classes:

python launch.py --config configs/preact1001.py --config.model.name=preact164 \
    --config.train.batch_size=32 --config.optim.learning_rate=0.025 --config.train.num_epochs=4
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    config = default.get_config()
    config.init = "random"
    config.model.name = "preact1001"
    config.model.width = 16
    config.data.crop_size = 32
    config.data.augment.dihedral = True
    config.optim.learning_rate = 0.1
    config.optim.weight_decay = 1e-4
    config.optim.schedule = "cosine"
    config.train.batch_size = 128
    config.train.num_epochs = 200
    return config

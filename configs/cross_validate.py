"""Five-fold cross-validation of ResNet-34: each field tested once, by a network that never saw it.

python launch.py cross_validate --config configs/cross_validate.py --config.data.root=FOLDER

Takes five times as long as one run. The same command goes on after an interruption. The test split
of `--config resnet34` with the same seed stays shut, for the network that is trained at the end.
For folders too small for a test split of their own (2 to 10 fields a class):
`--config.keep_test=False`, and `--config.folds=0` to leave out one field after another. Another
network or recipe: `--config.experiment=NAME`. Days or plates: `--config.data.batch_by=REGEX`.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    config = default.get_config()
    # A config file of this folder. What is changed here of default.py, or on the command line,
    # wins over it.
    config.experiment = "resnet34"
    # How many; every class needs as many groups. 0 leaves out one group after another.
    config.folds = 5
    # Whether the test split of a plain run is left out; if not, all fields are tested.
    config.keep_test = True
    return config

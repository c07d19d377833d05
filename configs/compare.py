"""The four depths of the reference study, compared by time and performance, and one chosen.

python launch.py compare --config configs/compare.py --config.data.root=FOLDER

All are trained on the same crops and split. The same command goes on after an interruption, and
trains what is added to the lists: `--config.seeds=0,1,2`, `--config.experiments=resnet18,plain18`.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    config = default.get_config()
    # Config files of this folder. What one changes of default.py is changed here, too.
    config.experiments = ("resnet18", "resnet34", "resnet50", "resnet152")
    # Every experiment is trained once with each; crops and split keep `config.seed`.
    config.seeds = (0,)
    return config

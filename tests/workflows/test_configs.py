"""Every shipped config does what it is for, at a size for a test."""

import pytest

from jaxcells.config import (
    SHIPPED,
    expand_comparison,
    expand_cross_validation,
    load_config,
    validate,
)
from jaxcells.files import Workdir
from jaxcells.workflows.compare import compare
from jaxcells.workflows.cross_validate import cross_validate
from jaxcells.workflows.gradients import compare_gradients
from jaxcells.workflows.train import train_and_evaluate
from tests.data.folders import write_folder

# These take long to compile and differ from the others in depth alone, or are the same once more.
LONG = ("resnet50", "resnet101", "resnet152", "compare", "degradation", "gradients", "preact1001")
LONG += ("cross_validate", "learning_curve", "plain34", "resnet34", "two_phase")
NAMES = sorted(path.stem for path in SHIPPED.glob("[!_]*.py"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("images"), {"A": 5, "B": 5})


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in LONG else n for n in NAMES]
)
def test_a_shipped_config_shrunk_is_run(name, images, tmp_path, capsys):
    config = load_config(SHIPPED / f"{name}.py")
    config.init = "random"
    config.model.width = 2
    config.data.root = str(images)
    config.data.crop_size = 32
    config.data.crops_per_class, config.data.split = 10, (6, 2, 2)
    config.train.batch_size = 6
    config.train.num_epochs = 2
    config.optim.freeze_epochs = min(config.optim.freeze_epochs, 1)
    workdir = Workdir(tmp_path / "run")
    if "experiments" in config:
        config.seeds = (0,)
        base, experiments = expand_comparison(config, SHIPPED)
        compare(base, experiments, workdir)
        assert (workdir.comparison / "table.md").exists()
        assert (workdir.comparison / "learning_curve.png").exists() == (name == "learning_curve")
    elif "folds" in config:
        config.folds = 2
        cross_validate(*expand_cross_validation(config, SHIPPED), workdir)
        assert (workdir.cross_validation / "table.md").exists()
    elif name == "gradients":
        validate(config)
        compare_gradients(config, workdir)
        assert (workdir.path / "gradients" / "gradients.png").exists()
    else:
        validate(config)
        results = train_and_evaluate(config, workdir)
        assert results.num_steps == 4
        assert results.test.num_crops == 4

import ast
import re

import pytest
from ml_collections import ConfigDict

from jaxcells import Error
from jaxcells.config import (
    SHIPPED,
    data_seed,
    data_source,
    default_config,
    differences,
    expand_comparison,
    expand_cross_validation,
    find_config,
    load_config,
    parse_multipliers,
    validate,
)
from jaxcells.files import read_json, write_json

CONFIGS = sorted(path.stem for path in SHIPPED.glob("[!_]*.py"))


def changed(**values):
    config = default_config()
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in values.items()})
    return config


def test_the_default_is_the_recipe_of_the_reference_study():
    config = default_config()
    assert config.init == "imagenet"
    assert config.model.name == "resnet34"
    assert (config.data.crop_size, config.data.crops_per_class) == (200, 954)
    assert config.data.split == (754, 100, 100)
    assert (config.optim.learning_rate, config.optim.momentum) == (0.001, 0.9)
    assert (config.optim.weight_decay, config.optim.schedule) == (0, "constant")
    assert not config.data.augment.dihedral
    assert (config.train.batch_size, config.train.num_epochs) == (32, 50)


@pytest.mark.parametrize("name", CONFIGS)
def test_shipped_configs_are_valid_and_open_with_their_command(name):
    config = load_config(SHIPPED / f"{name}.py")
    if "experiments" in config:
        expand_comparison(config, SHIPPED)
    elif "folds" in config:
        expand_cross_validation(config, SHIPPED)
    else:
        validate(config)
    opening = ast.get_docstring(ast.parse((SHIPPED / f"{name}.py").read_text("utf-8")))
    assert re.search(rf"python launch.py( \w+)? --config configs/{name}.py", opening)
    assert differences(default_config(), config) or name in ("default", "resnet34")


def test_a_config_is_a_file_or_the_name_of_one_of_ours(tmp_path):
    own = tmp_path / "resnet34.py"
    own.write_text(
        "from configs import default, linear_probe, neighbour\n"
        "def get_config():\n"
        "    config = default.get_config()\n"
        "    config.train.num_epochs = neighbour.EPOCHS\n"
        "    return config\n"
    )
    (tmp_path / "neighbour.py").write_text("EPOCHS = 7\n")
    assert find_config("resnet34") == SHIPPED / "resnet34.py"
    assert load_config(find_config(str(own))).train.num_epochs == 7
    with pytest.raises(Error, match="there is no file resnet35, nor a config of ours"):
        find_config("resnet35")
    own.write_text("")
    with pytest.raises(Error, match="defines no get_config"):
        load_config(own)


def test_all_mistakes_are_reported_at_once():
    config = changed(
        seed=-1,
        init="nowhere.safetensors",
        model__dtype="float16",
        data__crops_per_class=120,
        data__split_by="plate",
        data__border=(1, 2, 3),
        data__min_foreground=2.0,
        data__plane="seven",
        data__normalize="minmax",
        data__exclude="(",
        data__batch_by="plate",
        optim__learning_rate=0.0,
        optim__momentum=1.0,
        optim__schedule="linear",
        train__batch_size=1,
    )
    with pytest.raises(Error) as error:
        validate(config)
    text = str(error.value)
    assert text.startswith("the config has 15 mistakes:\n")
    for key in (
        *("seed=-1", "init=", "model.dtype=", "data.split=", "data.split_by="),
        *("data.border=", "data.min_foreground=", "plane", "data.normalize="),
        *("data.exclude=", "data.batch_by='plate' must be a regular expression whose group 1"),
        *("optim.learning_rate=", "optim.momentum=", "optim.schedule=", "train.batch_size="),
    ):
        assert key in text
    assert "for instance data.split=94,13,13" in text


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"model__width": 16}, "does not fit init=imagenet"),
        ({"data__source": "folder"}, r"set data\.root=FOLDER"),
        ({"data__source": "web"}, "must be folder, sample, tfds:NAME or empty"),
        ({"data__crop_size": 16}, "must be 32 or more, or 0"),
        ({"data__split": (754, 200, 0)}, "three whole numbers of 1 or more"),
        ({"data__seed": -2}, "or -1 for that of the run"),
        ({"init_conv1": "sum"}, "must be one of adapt, fresh"),
        ({"optim__freeze": ("layer(",)}, r"'layer\(',\) must be regular expressions"),
        ({"optim__freeze_epochs": 3}, "say what to freeze"),
        ({"optim__freeze": ("fc",), "optim__freeze_epochs": 50}, "leaves no epoch of 50"),
        ({"optim__multipliers": ("fc",)}, "'fc' must be a regular expression, =, and a factor"),
        ({"optim__multipliers": ("fc=-1",)}, "a factor of 0 or more"),
        ({"data__fraction": 0.0}, "above 0 and at most 1"),
        ({"data__fold": "2 of 5"}, "must be such as 2/5"),
        ({"data__fold": "2/5", "data__split_by": "crop"}, "which data.split_by=crop divides"),
        ({"data__fold": "2/batch"}, r"data\.fold='2/batch' needs data\.batch_by"),
    ],
)
def test_mistakes_say_what_to_do(values, text):
    with pytest.raises(Error, match=text):
        validate(changed(**values))


def test_whole_images_need_no_matching_counts():
    validate(changed(data__crop_size=0, data__crops_per_class=1, data__split=(8, 1, 1)))


def test_multipliers_are_pairs_and_the_last_equals_sign_counts():
    assert parse_multipliers(("fc=10", "(?=layer4)=0.5")) == (("fc", 10.0), ("(?=layer4)", 0.5))


def test_the_crops_have_the_seed_of_the_run_or_their_own():
    assert data_seed(changed(seed=5)) == 5
    assert data_seed(changed(seed=5, data__seed=0)) == 0


def test_the_source_follows_from_the_root():
    assert data_source(changed()) == "sample"
    assert data_source(changed(data__root="images")) == "folder"
    assert data_source(changed(data__source="tfds:malaria", data__root="x")) == "tfds:malaria"


def test_misspelt_and_missing_keys_of_a_config_file_are_named():
    config = default_config()
    config.optim.lerning_rate = 0.5
    del config.train.num_epochs
    with pytest.raises(Error) as error:
        validate(config)
    assert "optim.lerning_rate is not a key" in str(error.value)
    assert "train.num_epochs is missing" in str(error.value)


def test_numbers_must_be_finite():
    with pytest.raises(Error, match=r"optim\.learning_rate=inf must be a finite number"):
        validate(changed(optim__learning_rate=float("inf")))


def test_stored_configs_compare_by_key(tmp_path):
    write_json(tmp_path / "config.json", changed(train__num_epochs=3).to_dict())
    stored = ConfigDict(read_json(tmp_path / "config.json"))
    assert differences(stored, changed(train__num_epochs=3)) == []
    assert differences(stored, changed(train__num_epochs=4, seed=1, data__root="moved")) == [
        "seed was 0, now 1",
        "train.num_epochs was 3, now 4",
    ]


def test_all_crops_need_no_sum_and_other_words_are_mistakes():
    validate(changed(data__crops_per_class="all"))
    validate(changed(data__crops_per_class=60, data__split=(40, 10, 10)))
    for value in ("most", -3, 9.5, True):
        with pytest.raises(Error, match=r"data\.crops_per_class=.* must be a whole number or all"):
            validate(changed(data__crops_per_class=value))


def test_a_sheet_is_in_place_of_a_folder_and_masks_of_random_crops():
    validate(changed(data__sheet="labels.CSV", data__mask="_mask"))
    assert data_source(changed(data__sheet="labels.tsv")) == "folder"
    with pytest.raises(Error, match=r"data\.sheet='a\.xlsx' must be a \.csv or \.tsv file"):
        validate(changed(data__sheet="a.xlsx"))
    for values in ({"data__root": "images"}, {"data__source": "sample"}):
        with pytest.raises(Error, match=r"leave data\.root and data\.source empty"):
            validate(changed(data__sheet="a.csv", **values))
    for values in ({"data__crop_size": 0}, {"data__min_foreground": 0.1}):
        with pytest.raises(Error, match=r"data\.mask centres crops on cells"):
            validate(changed(data__mask="_mask", **values))
    assert differences(changed(data__sheet="a.csv"), changed(data__root="b")) == []


def cross_validation(**values):
    config = load_config(SHIPPED / "cross_validate.py")
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in values.items()})
    return expand_cross_validation(config, SHIPPED)


def test_what_a_cross_validation_sets_wins_over_its_experiment():
    run, folds, keep_test = cross_validation(
        experiment="demo", folds=0, train__num_epochs=3, data__root="images"
    )
    assert (folds, keep_test) == (0, True)
    expected = load_config(SHIPPED / "demo.py")
    expected.train.num_epochs, expected.data.root = 3, "images"
    assert run.to_dict() == expected.to_dict()
    assert cross_validation()[0].to_dict() == load_config(SHIPPED / "resnet34.py").to_dict()


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"folds": 1}, "2 or more, or 0"),
        ({"folds": -2}, "2 or more, or 0"),
        ({"data__fold": "1/5"}, r"and no data\.fold"),
        ({"experiment": "resnet35"}, "no file resnet35"),
        ({"experiment": "compare"}, "experiments is not a key"),
        ({"optim__momentum": 2.0}, r"optim\.momentum=2\.0 must be"),
        ({"optim__lerning_rate": 2.0}, r"optim\.lerning_rate is not a key"),
    ],
)
def test_wrong_cross_validations_say_what_is_wrong(values, text):
    with pytest.raises(Error, match=text):
        cross_validation(**values)

import dataclasses

import numpy as np
import pytest

from jaxcells.evaluation.bootstrap import Split
from jaxcells.evaluation.comparison import (
    RULE,
    Candidate,
    Choice,
    Comparison,
    Estimate,
    paired_difference,
)
from jaxcells.evaluation.comparison_table import (
    Row,
    as_markdown,
    as_text,
    learning_curve,
    paragraphs,
    write_table,
)


def figures(mean, low, high, *, accuracy=0.9, deviation=None, note=None):
    interval = {"balanced_accuracy": (low, high), "accuracy": (0.8, None)}
    return Estimate(accuracy, mean, interval, note, deviation and 2 * deviation, deviation)


RESNET34 = Row(
    name="resnet34",
    chosen=True,
    seeds=(0,),
    validation=figures(0.945, 0.8842, 0.98861, accuracy=0.9501),
    test=figures(0.9312, 0.87, 0.97),
    parameters=21_797_672,
    multiply_adds=3_664_000_000,
    train_s=720.4,
    epoch_s=14.41,
    train_images_per_second=52.34,
    eval_images_per_second=1186.2,
    step_memory_bytes=1_249_000_000,
    training_images=48,
)
RESNET50 = dataclasses.replace(
    RESNET34, name="resnet50", validation=figures(0.951, 0.9, 0.99), train_s=4000.0, chosen=False
)
ROWS = [RESNET34, RESNET50]
FAILED = {"preact_1001|b": "out of memory; lower train.batch_size"}
SEVERAL = figures(0.945, 0.884, 0.989, deviation=0.0123)
CANDIDATES = (
    Candidate("resnet34", RESNET34.validation, figures(0.006, -0.0104, 0.0213), True, 720.4),
    Candidate("resnet50", RESNET50.validation, figures(0, 0, 0), True, 4000),
    Candidate("resnet18", figures(0.85, 0.8, 0.9), figures(0.101, 0.05, 0.15), False, 86),
)
CHOICE = Choice(chosen="resnet34", best="resnet50", candidates=CANDIDATES)
COMPARISONS = {
    "resnet50": Comparison(figures(-0.0204, -0.0502, -0.0001), 3, 17, 0.00258),
    "resnet18": Comparison(figures(0.1, None, None), 40, 5, 6e-8),
}


def markdown(rows, choice=CHOICE, comparisons=None, failures=FAILED):
    return as_markdown(paragraphs(rows, failures, choice, comparisons or {}, []))


def text(rows, choice=CHOICE, comparisons=None, failures=FAILED, notes=()):
    return as_text(paragraphs(rows, failures, choice, comparisons or {}, notes))


def cells(table, name):
    """The cells of every row of a Markdown table that begins with `name`."""
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line[1:-1].split(" | ")] for line in lines]
    return [row[1:] for row in rows if row[0] == name]


def test_markdown_has_figures_cost_and_a_mark_of_the_chosen():
    found = markdown(ROWS)
    figures_row, cost_row, _ = cells(found, "> resnet34")
    assert figures_row == ["0.945 (0.884–0.989)", "0.931 (0.870–0.970)", "0.950", "0.900"]
    assert cost_row == ["1", "21.8 M", "3.66 G", "12 min", "14 s", "52.3", "1186", "1.25 GB"]
    assert cells(found, "resnet50")[1][3] == "67 min"
    assert cells(found, "experiment")[0] == [
        *["balanced accuracy, validation", "balanced accuracy, test"],
        *["accuracy, validation", "accuracy, test"],
    ]
    assert cells(found, "experiment")[1] == [
        *["seeds", "parameters", "multiply-adds", "training time", "time per epoch"],
        *["training images/s", "evaluation images/s", "step memory"],
    ]


def test_several_seeds_show_their_deviation_and_a_missing_interval_is_left_out():
    test = figures(0.9, None, None)
    row = dataclasses.replace(RESNET50, seeds=(0, 1, 2), validation=SEVERAL, test=test)
    found = markdown([row])
    assert cells(found, "resnet50")[0][:2] == ["0.945 ± 0.012 (0.884–0.989)", "0.900"]
    assert cells(found, "resnet50")[1][0] == "3"


def test_a_note_stands_once_with_the_experiments_it_is_about():
    few, flawless = (figures(0.9, 0.8, 1, note=note) for note in ("few fields", "no error"))
    rows = [
        dataclasses.replace(RESNET34, name="a", validation=few),
        dataclasses.replace(RESNET34, name="b", validation=few, test=flawless),
    ]
    notes = [line for line in text(rows).splitlines() if line.startswith("Note on")]
    assert notes == ["Note on validation: few fields (a, b).", "Note on test: no error (b)."]


def test_failures_stand_below_the_tables():
    found = text(ROWS, notes=["A note."])
    sentence = "preact_1001|b failed: out of memory; lower train.batch_size"
    assert f"\n\nA note.\n\n{sentence}\n\nRule: " in found
    assert found.index("1.25 GB") < found.index("A note.")
    assert r"preact\_1001\|b failed: out of memory; lower train.batch\_size" in markdown(ROWS)


def test_rule_choice_and_comparison_on_the_test_split():
    found = markdown(ROWS, CHOICE, COMPARISONS)
    assert f"Rule: {RULE}" in found
    assert cells(found, "> resnet34")[2] == ["0.006 (−0.010 to 0.021)", "yes", "12 min"]
    in_choice, in_comparison = cells(found, "resnet50")[2:]
    assert in_choice == ["best", "yes", "67 min"]
    assert cells(found, "resnet18")[0] == ["0.101 (0.050 to 0.150)", "no", "86 s"]
    assert (
        "Chosen (>): resnet34, trained in 12 min. Best on validation: resnet50, 0.951 against "
        "0.945, trained in 67 min."
    ) in found
    # Less than half of the last digit is no minus zero.
    assert in_comparison == ["−0.020 (−0.050 to 0.000)", "3", "17", "0.003"]
    assert cells(found, "resnet18")[1] == ["0.100 (no interval)", "40", "5", r"\<0.001"]
    parts = (
        "1.25 GB",
        "out of memory",
        "Rule: ",
        "Chosen (>)",
        "Test split, compared",
        "McNemar p",
    )
    places = [found.index(part) for part in parts]
    assert places == sorted(places)


def test_the_best_that_is_chosen_is_named_once_and_the_notes_follow():
    choice = Choice("resnet50", "resnet50", CANDIDATES[1:2], ("a", "b"))
    found = text([RESNET50], choice)
    assert found.endswith(
        "Chosen (>): resnet50, trained in 67 min.\n\n"
        "Note: the test split had been opened for a, b before this choice."
    )
    assert "Best on validation" not in found
    assert "Test split" not in found


@pytest.mark.parametrize("name", ["resnet34", "resnet34_dihedral_lr0.01_batch256_seeds_of_march"])
def test_text_fits_100_columns(name):
    row = dataclasses.replace(RESNET34, name=name, validation=SEVERAL, test=SEVERAL)
    candidate = dataclasses.replace(CANDIDATES[0], name=name)
    choice = dataclasses.replace(
        CHOICE, chosen=name, best=name, candidates=(candidate, *CANDIDATES[1:])
    )
    comparisons, failures = {name: COMPARISONS["resnet50"]}, {name: "x " * 90}
    lines = text([row, RESNET50], choice, comparisons, failures).splitlines()
    assert max(map(len, lines)) <= 100
    marked = [line for line in lines if line.startswith("> resnet34")]
    assert len(marked) == 3  # figures, cost, choice
    assert "0.945 ± 0.012 (0.884–0.989)" in marked[0]
    assert marked[1].split()[-2:] == ["1.25", "GB"]
    assert sum(line.startswith("resnet50") for line in lines) == 3
    shown = marked[0][2:].split("  ")[0]
    assert shown == name if name == "resnet34" else shown.endswith("march")


def test_files_hold_the_table_and_raw_numbers(tmp_path):
    row = dataclasses.replace(RESNET34, seeds=(0, 1), test=figures(0.9, 0.8, 1, deviation=0.01))
    write_table(tmp_path, [row], FAILED, paragraphs([row], FAILED, CHOICE, {}, []))
    assert (tmp_path / "table.md").read_text("utf-8") == markdown([row]) + "\n"
    header, first, second = (tmp_path / "table.csv").read_text("utf-8").splitlines()
    estimates = [
        f"{split}_{key}{end}"
        for split in ("validation", "test")
        for key in ("balanced_accuracy", "accuracy")
        for end in ("", "_deviation", "_low", "_high")
    ]
    assert header == (
        f"experiment,chosen,seeds,training_images,{','.join(estimates)},parameters,multiply_adds,"
        "train_s,epoch_s,train_images_per_second,eval_images_per_second,step_memory_bytes,failure"
    )
    assert first == (
        "resnet34,True,0 1,48,0.945,,0.8842,0.98861,0.9501,,0.8,,0.9,0.01,0.8,1,0.9,0.02,0.8,"
        ",21797672,3664000000,720.4,14.41,52.34,1186.2,1249000000,"
    )
    assert second == f"preact_1001|b{',' * 27}{FAILED['preact_1001|b']}"


@pytest.mark.parametrize(
    ("right_of_most", "verdict"),
    [
        (24, "the last images helped, and more of the kind may help further"),
        (13, "that more images would help is not shown, nor that they would not"),
        (0, "the last images did harm"),
    ],
)
def test_a_learning_curve_says_whether_more_images_would_help(right_of_most, verdict):
    labels = np.repeat([0, 1], 12)
    split = Split(labels, np.arange(24), ("A", "B"))
    order = np.argsort(np.tile(np.arange(12), 2), kind="stable")  # alike in both classes
    predictions = {}
    for name, right in (("net_fraction0.5", 12), ("net_fraction1", right_of_most)):
        is_right = np.isin(np.arange(24), order[:right])
        predictions[name] = [np.where(is_right, labels, 1 - labels)]
    rows = [
        dataclasses.replace(RESNET34, name=name, training_images=number)
        for name, number in (("net_fraction0.25", 3), ("net_fraction0.5", 6), ("net_fraction1", 12))
    ]
    heading, (_, cells), sentence = learning_curve("net", rows, predictions, split)
    assert heading.startswith("Learning curve of net")
    assert [row[1] for row in cells] == ["3", "6", "12"]
    gain = paired_difference(predictions["net_fraction1"], predictions["net_fraction0.5"], split)
    assert f"{abs(gain.balanced_accuracy):.3f} (" in sentence
    assert "12 training images instead of 6" in sentence
    assert verdict in sentence

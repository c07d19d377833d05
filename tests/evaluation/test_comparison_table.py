import csv
import dataclasses

import pytest

from jaxcells.evaluation import comparison_table
from jaxcells.evaluation.comparison import RULE, Candidate, Choice
from jaxcells.evaluation.comparison_table import (
    Row,
    table_markdown,
    table_text,
    write_table_csv,
)


def figures(mean, low, high, *, accuracy=0.9, deviation=None, note=None):
    return {
        "balanced_accuracy": mean,
        "accuracy": accuracy,
        "deviation": {"balanced_accuracy": deviation, "accuracy": deviation and 2 * deviation},
        "interval_95": {"balanced_accuracy": [low, high], "accuracy": [0.8, None]},
        "interval_note": note,
    }


RESNET34 = Row(
    name="resnet34",
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
    chosen=True,
)
RESNET50 = dataclasses.replace(
    RESNET34,
    name="resnet50",
    validation=figures(0.951, 0.9, 0.99),
    train_s=4000.0,
    chosen=False,
)
FAILED = Row(name="preact_1001|b", failure="out of memory;\n lower train.batch_size")
ROWS = [RESNET34, RESNET50, FAILED]

CANDIDATES = (
    Candidate("resnet34", 0.945, None, 0.006, (-0.0104, 0.0213), True, 720.4, None),
    Candidate("resnet50", 0.951, None, 0.0, (0.0, 0.0), True, 4000.0, None),
    Candidate("resnet18", 0.85, None, 0.101, (0.05, 0.15), False, 86.0, None),
)
CHOICE = Choice(chosen="resnet34", best="resnet50", candidates=CANDIDATES, note=None)
COMPARISONS = {
    "resnet50": {
        "accuracy": -0.02,
        "balanced_accuracy": -0.0204,
        "interval_95": {"accuracy": [-0.05, 0.0], "balanced_accuracy": [-0.0502, -0.0001]},
        "interval_note": None,
        "mcnemar": {"only_a_right": 3, "only_b_right": 17, "p_value": 0.00258},
    },
    "resnet18": {
        "accuracy": 0.1,
        "balanced_accuracy": 0.1,
        "interval_95": {"accuracy": [None, None], "balanced_accuracy": [None, None]},
        "interval_note": "one field",
        "mcnemar": {"only_a_right": 40, "only_b_right": 5, "p_value": 6e-8},
    },
}


def cells(markdown, name):
    """The cells of every row of a Markdown table that begins with `name`."""
    lines = [line for line in markdown.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line[1:-1].split(" | ")] for line in lines]
    return [row[1:] for row in rows if row[0] == name]


def test_markdown_has_figures_cost_and_the_chosen_in_bold():
    markdown = table_markdown([RESNET34, RESNET50])
    figures_row, cost_row = cells(markdown, "**resnet34**")
    expected = ["0.945 (0.884–0.989)", "0.931 (0.870–0.970)", "0.950", "0.900"]
    assert figures_row == [f"**{cell}**" for cell in expected]
    expected = ["1", "21.8 M", "3.66 G", "12 min", "14 s", "52.3", "1186", "1.25 GB"]
    assert cost_row == [f"**{cell}**" for cell in expected]
    assert cells(markdown, "resnet50")[1][3] == "67 min"
    assert "standard deviation" not in markdown
    assert "Rule" not in markdown
    (header,) = cells(markdown.splitlines()[2], "experiment")
    assert header[:2] == ["balanced accuracy, validation", "balanced accuracy, test"]
    tables = [line for line in markdown.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in tables} == {6, 10}
    assert tables[1].startswith("| ------")
    assert tables[1].endswith("---: |")


def test_several_seeds_show_their_deviation():
    row = dataclasses.replace(
        RESNET50, seeds=(0, 1, 2), validation=figures(0.945, 0.884, 0.989, deviation=0.0123)
    )
    markdown = table_markdown([row])
    assert cells(markdown, "resnet50")[0][0] == "0.945 ± 0.012 (0.884–0.989)"
    assert cells(markdown, "resnet50")[1][0] == "3"
    assert "± standard deviation over seeds" in markdown


def test_what_is_not_known_is_a_dash_and_a_missing_interval_is_left_out():
    row = Row("a", seeds=(0,), validation=figures(0.9, None, None, note="one field"))
    markdown = table_markdown([row])
    assert cells(markdown, "a") == [
        ["0.900", "–", "0.900", "–"],
        ["1", "–", "–", "–", "–", "–", "–", "–"],
    ]
    assert "Note on validation: one field." in markdown


def test_notes_name_the_experiments_unless_they_are_about_all():
    rows = [
        dataclasses.replace(
            RESNET34,
            name=name,
            validation=figures(0.9, 0.8, 1, note="few fields"),
            test=figures(0.9, 0.8, 1, note=test_note),
        )
        for name, test_note in [("a", None), ("b", "no error"), ("c", "no error")]
    ]
    markdown = table_markdown(rows)
    assert markdown.count("few fields") == 1
    assert "Note on validation: few fields." in markdown
    assert "Note on test (b, c): no error." in markdown


def test_failures_stand_below_the_tables_on_one_line():
    text = table_text(ROWS)
    assert "\n\npreact_1001|b failed: out of memory; lower train.batch_size" in text
    assert text.index("1.25 GB") < text.index("out of memory")
    assert r"preact\_1001\|b failed: out of memory; lower train.batch\_size" in table_markdown(ROWS)
    assert table_text([FAILED]) == "preact_1001|b failed: out of memory; lower train.batch_size"
    partly = dataclasses.replace(RESNET34, failure="seed 1: the loss is nan")
    text = table_text([partly])
    assert "resnet34 partly failed: seed 1: the loss is nan" in text
    assert "0.945 (0.884–0.989)" in text


def test_rule_choice_and_comparison_on_the_test_split():
    markdown = table_markdown(ROWS, CHOICE, COMPARISONS)
    assert f"Rule: {RULE}" in markdown
    expected = ["0.006 (−0.010 to 0.021)", "yes", "12 min"]
    assert cells(markdown, "**resnet34**")[2] == [f"**{cell}**" for cell in expected]
    in_choice, in_comparison = cells(markdown, "resnet50")[2:]
    assert in_choice == ["best", "yes", "67 min"]
    assert cells(markdown, "resnet18")[0] == ["0.101 (0.050 to 0.150)", "no", "86 s"]
    assert (
        "Chosen: resnet34, trained in 12 min. Best on validation: resnet50, 0.951 against 0.945, "
        "trained in 67 min."
    ) in markdown
    # Less than half of the last digit is no minus zero.
    assert in_comparison == ["−0.020 (−0.050 to 0.000)", "3", "17", "0.003"]
    assert cells(markdown, "resnet18")[1] == ["0.100", "40", "5", r"\<0.001"]
    parts = ("1.25 GB", "out of memory", "Rule: ", "Chosen: ", "Test split, compared", "McNemar p")
    places = [markdown.index(part) for part in parts]
    assert places == sorted(places)


def test_the_best_that_is_chosen_is_named_once_and_the_note_follows():
    choice = Choice("resnet50", "resnet50", CANDIDATES[1:2], note="nothing to choose from")
    text = table_text([RESNET50], choice)
    assert "Chosen: resnet50, trained in 67 min.\n\nNote: nothing to choose from." in text
    assert "Best on validation" not in text
    assert "Test split" not in text


@pytest.mark.parametrize("name", ["resnet34", "resnet34_dihedral_lr0.01_batch256_seeds_of_march"])
def test_text_fits_100_columns(name):
    row = dataclasses.replace(
        RESNET34,
        name=name,
        seeds=(0, 1, 2),
        validation=figures(0.945, 0.884, 0.989, deviation=0.0123),
        test=figures(0.945, 0.884, 0.989, deviation=0.0123),
        failure="x " * 90,
    )
    choice = dataclasses.replace(CHOICE, chosen=name, best=name)
    candidate = dataclasses.replace(CANDIDATES[0], name=name)
    choice = dataclasses.replace(choice, candidates=(candidate, *CANDIDATES[1:]))
    text = table_text([row, RESNET50], choice, {name: COMPARISONS["resnet50"]})
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    marked = [line for line in lines if line.startswith("> resnet34")]
    assert len(marked) == 3  # figures, cost, choice
    assert "0.945 ± 0.012 (0.884–0.989)" in marked[0]
    assert marked[1].split()[-2:] == ["1.25", "GB"]
    assert sum(line.startswith("  resnet50") for line in lines) == 3
    shown = marked[0][2:].split("  ")[0]
    assert shown == name if name == "resnet34" else shown.endswith("march")


def test_text_and_markdown_say_the_same():
    markdown, text = (
        show(ROWS, CHOICE, COMPARISONS).replace("\\", "") for show in (table_markdown, table_text)
    )
    for word in markdown.replace("|", " ").replace("*", " ").split():
        assert word.strip("-:") in text.replace("|", " ") or word == "multiply-adds", word


def test_csv_holds_raw_numbers(tmp_path):
    row = dataclasses.replace(RESNET34, seeds=(0, 1), test=figures(0.9, 0.8, 1, deviation=0.01))
    path = tmp_path / "table.csv"
    write_table_csv(path, [row, FAILED])
    with open(path, newline="", encoding="utf-8") as file:
        first, second = csv.DictReader(file)
    assert list(tmp_path.iterdir()) == [path]
    assert first["experiment"] == "resnet34"
    assert (first["status"], first["chosen"], first["seeds"]) == ("finished", "True", "0 1")
    assert float(first["validation_balanced_accuracy"]) == 0.945
    assert float(first["validation_balanced_accuracy_low"]) == 0.8842
    assert float(first["validation_balanced_accuracy_high"]) == 0.98861
    assert first["validation_balanced_accuracy_deviation"] == ""
    assert float(first["validation_accuracy"]) == 0.9501
    assert float(first["test_balanced_accuracy_deviation"]) == 0.01
    assert float(first["test_accuracy_deviation"]) == 0.02
    assert (first["test_accuracy_low"], first["test_accuracy_high"]) == ("0.8", "")
    assert (first["parameters"], first["multiply_adds"]) == ("21797672", "3664000000")
    assert (first["train_s"], first["epoch_s"]) == ("720.4", "14.41")
    assert first["train_images_per_second"] == "52.34"
    assert first["eval_images_per_second"] == "1186.2"
    assert first["step_memory_bytes"] == "1249000000"
    assert first["failure"] == ""
    assert second["experiment"] == "preact_1001|b"
    assert (second["status"], second["chosen"]) == ("failed", "False")
    assert second["failure"] == "out of memory; lower train.batch_size"
    assert second["train_s"] == second["test_accuracy"] == ""


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (512, "512 "),
        (1_700, "1.70 k"),
        (999_499, "999 k"),
        (999_500, "1.00 M"),
        (9_996_000, "10.0 M"),
        (21_797_672, "21.8 M"),
        (146_000_000, "146 M"),
        (11_560_000_000, "11.6 G"),
        (2.5e12, "2.50 T"),
    ],
)
def test_counts_have_three_digits(value, shown):
    assert comparison_table._count(value) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.4512, "0.45 s"),
        (2.96, "3.0 s"),
        (9.97, "10 s"),
        (86, "86 s"),
        (99.7, "1.7 min"),
        (720, "12 min"),
        (5900, "98 min"),
        (5990, "1.7 h"),
        (50 * 3600, "50 h"),
    ],
)
def test_times_have_two_digits(seconds, shown):
    assert comparison_table._time(seconds) == shown

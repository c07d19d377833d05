from jaxcells import text


def test_numbers_amounts_and_durations():
    values = [0, 0.0345, 0.45, 9.994, 9.996, 99.6, 1186.2]
    shown = ["0.00", "0.0345", "0.450", "9.99", "10.0", "99.6", "1186"]
    assert [text.digits(value) for value in values] == shown
    assert [text.digits(value, 2) for value in (0.996, 9.6, 9.97)] == ["1.0", "9.6", "10"]

    values = [512, 1_700, 999_499, 999_600, 9_996_000, 21_797_672, 11_560_000_000, 2.5e12]
    shown = ["512", "1.70 k", "999 k", "1.00 M", "10.0 M", "21.8 M", "11.6 G", "2.50 T"]
    assert [text.amount(value) for value in values] == shown

    seconds = [0.4512, 2.96, 86, 143, 720, 5399, 3 * 3600 + 320, 2 * 3600 - 5]
    shown = ["0.45 s", "3.0 s", "86 s", "2.4 min", "12 min", "90 min", "3 h 05 min", "2 h 00 min"]
    assert [text.duration(value) for value in seconds] == shown


def test_lines_and_lists():
    assert text.shortened("HE 22", 6) == "HE 22"
    assert text.shortened("x" * 30 + " passage 12", 24) == "x" * 15 + "…ssage 12"
    alike = ["x" * 30 + middle + "y" * 30 for middle in "12"]
    assert text.shortened_apart([*alike, "z"], 12) == [
        f"{'x' * 30}{n}…{'y' * 15}" for n in "12"
    ] + ["z"]
    assert text.shortened_apart(["same", "same"], 3) == ["s…e"] * 2
    assert sorted(["p 10", "p 9 b", "p 9", "2", "a"], key=text.natural) == [
        *("2", "a", "p 9", "p 9 b", "p 10")
    ]
    assert text.one_line(" a\n  b\tc ") == "a b c"
    assert text.some(["a", "b", "c", "d"]) == "a, b, c, d"
    assert text.some(["a", "b", "c", "d"], 2) == "a, b, … 2 more"
    assert (text.counted(1, "image"), text.counted(0, "image")) == ("1 image", "0 images")
    assert text.by((200, 200, 3)) == "200x200x3"


def test_text_table():
    table = text.text_table(["name", "two\nlines", "n"], [["a", "1.25 M", "7"], ["bc", "x", "10"]])
    assert table.splitlines() == [
        "         two",
        "name   lines   n",
        "a     1.25 M   7",
        "bc         x  10",
    ]
    assert text.text_table(["a", "b"], [["x", "y"], ["zz", "y"]], left=2) == "a   b\nx   y\nzz  y"


def test_a_text_table_that_must_fit_shortens_its_names():
    rows = [["the first of many names", "1"], ["other", "2"]]
    assert max(map(len, text.text_table(["name", "n"], rows, width=20).splitlines())) == 20
    assert "th…mes" not in text.text_table(["name", "n"], rows, width=9)  # 12 letters stay
    assert text.text_table(["name", "n"], rows, width=99) == text.text_table(["name", "n"], rows)


def test_markdown_table():
    table = text.markdown_table(["a", "multi-\nline\nhead"], [["x|y", "1"], ["z", "2"]])
    assert table.splitlines() == [
        r"| a    | multi-line head |",
        r"| ---- | --------------: |",
        r"| x\|y |               1 |",
        r"| z    |               2 |",
    ]
    assert text.markdown("a_b*<c>`\\") == r"a\_b\*\<c>\`" + "\\\\"

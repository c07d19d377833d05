import jinja2
import pytest

from jaxcells.evaluation import prose


@pytest.fixture
def templates(monkeypatch):
    """Templates of this test, in place of the files."""
    files = {"a.txt.j2": "One {{ word }}\nline.\n\n[table]\n\n{% if no %}\nNo.\n\n{% endif %}\n<b>"}
    monkeypatch.setattr(prose._TEMPLATES, "loader", jinja2.DictLoader(files))


def test_paragraphs_are_single_lines_with_tables_between(templates):
    table = (("head",), [["cell"]])
    said = prose.paragraphs("a", {"[table]": [table, "note"]}, word="<&>", no=False)
    assert said == ["One <&> line.", table, "note", "<b>"]  # plain text: nothing is escaped
    assert prose.paragraphs("a", {"[table]": []}, word="", no=True) == ["One line.", "No.", "<b>"]


def test_what_is_not_given_is_a_bug(templates):
    with pytest.raises(jinja2.UndefinedError, match="word"):
        prose.paragraphs("a", no=False)

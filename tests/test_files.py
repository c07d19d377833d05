import pytest

from jaxcells.files import write_whole


def test_a_file_appears_whole_and_an_interruption_leaves_the_old_one(tmp_path):
    path = tmp_path / "table.csv"
    with write_whole(path) as file:
        file.write("first\r\nµ\udcff\n")
        assert not path.exists()
    assert path.read_bytes() == b"first\r\n\xc2\xb5\xff\n"

    def interrupted():
        with write_whole(path) as file:
            file.write("second")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes().startswith(b"first")
    with write_whole(path) as file:
        file.write("third")
    assert path.read_text() == "third"
    assert [p.name for p in tmp_path.iterdir()] == ["table.csv"]

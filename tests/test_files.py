import dataclasses
from collections.abc import Mapping
from pathlib import Path

import pytest

from jaxcells import Error
from jaxcells.files import (
    Workdir,
    from_record,
    lock_workdir,
    read_json,
    staged,
    write_csv,
    write_json,
    write_whole,
)


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
    write_csv(path, ["a", "b"], [[1, None], ["x,y", 0.5]])
    assert path.read_text() == 'a,b\n1,\n"x,y",0.5\n'
    assert [p.name for p in tmp_path.iterdir()] == ["table.csv"]


@dataclasses.dataclass(frozen=True)
class Part:
    number: int
    names: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Whole:
    part: Part
    parts: Mapping[str, Part]
    pairs: tuple[tuple[int, ...], ...]
    note: str | None
    last: Part | None = None


def test_a_folder_is_whole_or_not_there(tmp_path):
    path = tmp_path / "new" / "folder"

    def interrupted():
        with staged(path) as folder:
            (folder / "half").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not path.exists()
    for name in ("first", "second"):
        with staged(path) as folder:
            (folder / name).touch()
        assert [file.name for file in path.iterdir()] == [name]
    assert list(path.parent.iterdir()) == [path]


def test_records_come_back_from_json_as_they_were(tmp_path):
    whole = Whole(Part(1, ("a", "b")), {"x": Part(2)}, ((1, 2), (3,)), None, Part(3))
    write_json(tmp_path / "whole.json", dataclasses.asdict(whole))
    assert from_record(Whole, read_json(tmp_path / "whole.json"), "whole.json") == whole
    whole = dataclasses.replace(whole, last=None, note="n")
    assert from_record(Whole, dataclasses.asdict(whole), "") == whole


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"number": 1}, "names"),
        ({"number": 1, "names": [], "old": 0}, "old"),
        ({"nomber": 1, "names": []}, "nomber, number"),
        ([1], "names, number"),
    ],
)
def test_records_of_another_version_are_refused_in_words(values, what):
    with pytest.raises(Error) as error:
        from_record(Part, values, "part.json")
    beginning = "part.json: written by another version of jaxcells, with other fields"
    assert str(error.value).startswith(f"{beginning} ({what}); ")


def test_missing_and_damaged_files_of_a_workdir(tmp_path):
    with pytest.raises(Error, match="is not the workdir of a run"):
        read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(Error, match="damaged"):
        read_json(tmp_path / "config.json")


def test_a_workdir_is_kept_by_one_and_nothing_is_made_by_naming_it(tmp_path):
    workdir = Workdir(Path(tmp_path, "run"))
    assert not workdir.is_trained
    assert not workdir.path.exists()
    with lock_workdir(workdir.path):
        with (
            pytest.raises(Error, match="another process is working there"),
            lock_workdir(workdir.path),
        ):
            pass
        (workdir.checkpoints / "7").mkdir(parents=True)
    assert workdir.is_trained
    with lock_workdir(workdir.path):
        pass

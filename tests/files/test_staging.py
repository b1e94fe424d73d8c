"""Completely or not at all."""

from pathlib import Path

import pytest

from llama2.errors import Llama2Error
from llama2.files.staging import staged_file, staged_folder


def test_a_file_appears_when_it_is_finished(tmp_path):
    path = tmp_path / "new" / "file"
    with staged_file(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    assert [each.name for each in path.parent.iterdir()] == ["file"]


def test_a_failure_keeps_what_was_there(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), staged_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_a_folder_appears_when_it_is_finished(tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    with staged_folder(path) as temporary:
        (temporary / "a").write_text("1")
        assert not any(path.iterdir())
    assert (path / "a").read_text() == "1"
    assert path.stat().st_mode & 0o777 == (tmp_path / "folder").stat().st_mode & 0o777
    with pytest.raises(RuntimeError), staged_folder(tmp_path / "other") as temporary:
        raise RuntimeError
    assert [each.name for each in tmp_path.iterdir()] == ["folder"]


def test_what_is_in_the_way_is_named(tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("mine")
    with pytest.raises(Llama2Error, match="not an empty folder"), staged_folder(tmp_path / "used"):
        pass
    with pytest.raises(Llama2Error, match="a folder of this name"), staged_file(tmp_path / "used"):
        pass
    with pytest.raises(Llama2Error, match="cannot create the folder"), staged_file(tmp_path / "used" / "file" / "x"):
        pass
    assert (tmp_path / "used" / "file").read_text() == "mine"


def test_a_device_is_never_replaced():
    with pytest.raises(Llama2Error, match="device"), staged_file(Path("/dev/null")):
        pass
    assert not Path("/dev/null").is_file()

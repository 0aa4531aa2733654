"""Files that are whole or not there."""

from pathlib import Path

import pytest

from models.checkpoints.files import find_visible, write_whole


def names_in(folder):
    return sorted(file.name for file in folder.iterdir())


def test_a_file_replaces_an_older_one(tmp_path):
    file = tmp_path / "weights.bin"
    for data in (b"old and longer", b"new"):
        write_whole(file, data)
        assert file.read_bytes() == data
    assert names_in(tmp_path) == ["weights.bin"]


def test_a_write_that_fails_leaves_the_older_file(tmp_path, monkeypatch):
    file = tmp_path / "weights.bin"
    write_whole(file, b"old")

    def write_half(path, data):
        with path.open("wb") as stream:
            stream.write(data[:1])
        raise OSError("the disk is full")

    monkeypatch.setattr(Path, "write_bytes", write_half)
    with pytest.raises(OSError, match="the disk is full"):
        write_whole(file, b"new")
    assert file.read_bytes() == b"old"
    assert names_in(tmp_path) == ["weights.bin"]


def test_hidden_files_are_not_found(tmp_path):
    for name in ("a.bin", "._a.bin", "in/b.bin", "in/.b.bin", ".cache/c.bin"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.touch()
    assert find_visible(tmp_path, "*.bin") == [tmp_path / "a.bin"]
    assert find_visible(tmp_path, "*/*.bin") == [tmp_path / "in" / "b.bin"]
    # The folder itself may lie in a hidden one, as the hub's cache does.
    assert find_visible(tmp_path / ".cache", "*") == [tmp_path / ".cache" / "c.bin"]

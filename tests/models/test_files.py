"""Files that are whole or not there."""

import argparse
import errno
import os
import re
import types
from pathlib import Path

import numpy as np
import pytest

from models import files
from models.files import output_file, output_folder, write_whole
from models.media import plots, video


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


# --------------------------------------------------------------------- full disks

VIDEO = np.random.default_rng(0).random((6, 32, 48, 3), np.float32)
WRITERS = {
    "video.mp4": lambda path: video.write_mp4(path, VIDEO, fps=8),
    "report.json": lambda path: video.write_json(path, {"a": 1}),
    "kept_share.png": lambda path: plots.plot_kept_share(
        path, np.ones((2, 3)), np.arange(2.0), title="a title"
    ),
    "model.safetensors": lambda path: write_whole(path, bytes(2_000_000)),
}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_told_with_the_file_and_leaves_none(tmp_path, monkeypatch, name):
    """The system itself refuses: temporary files lie on a device that is full."""
    monkeypatch.setattr(files.secrets, "token_hex", lambda _: "here")
    path = tmp_path / name
    path.write_text("old")
    (tmp_path / f".here.partial{path.suffix}").symlink_to("/dev/full")
    with pytest.raises(files.FullDiskError) as caught:
        WRITERS[name](path)
    message = str(caught.value)
    assert message.startswith(f"{path} cannot be written: no space left on device; ")
    assert re.search(r"it needs (more than )?[\d.]+ (bytes|kB|MB)", message)
    assert f"are free in {tmp_path}. Free some, or name another folder" in message
    assert "\n" not in message
    assert names_in(tmp_path) == [name]
    assert path.read_text() == "old"


def test_what_a_file_needs_is_told(tmp_path, monkeypatch):
    def fill(path, data):
        with path.open("wb") as stream:
            stream.write(data[:1000])
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(Path, "write_bytes", fill)
    free = types.SimpleNamespace(free=500)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda folder: free)
    with pytest.raises(files.FullDiskError) as caught:
        write_whole(tmp_path / "new" / "video.mp4", bytes(2_500_000))
    assert str(caught.value) == (
        f"{tmp_path}/new/video.mp4 cannot be written: disk quota exceeded; it needs "
        f"2.5 MB, and 1.5 kB are free in {tmp_path}/new. Free some, or name another "
        "folder"
    )
    assert caught.value.errno == errno.EDQUOT
    assert names_in(tmp_path / "new") == []


def test_other_failures_stay_what_they_are(tmp_path):
    folder = tmp_path / "file"
    folder.write_text("")
    with pytest.raises(FileExistsError):
        write_whole(folder / "below", b"")


def test_an_output_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "run").write_text("a file")
    assert output_folder(str(tmp_path / "new" / "er")) == tmp_path / "new" / "er"
    assert output_file(str(tmp_path / "run")) == tmp_path / "run"
    for kind, path, message in (
        (output_folder, tmp_path / "run", "run is a file"),
        (output_folder, tmp_path / "run" / "more", "run is a file"),
        (output_file, tmp_path / "run" / "report.json", "run is a file"),
        (output_file, tmp_path, "is a folder. Name a file"),
    ):
        with pytest.raises(argparse.ArgumentTypeError, match=message):
            kind(str(path))
    assert names_in(tmp_path) == ["run"]

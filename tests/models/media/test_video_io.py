"""Videos, JSON and files that are whole or absent."""

import json
import math
import os
import signal
import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest

from models.files import whole_file
from models.media import video as video_io
from models.media.metrics import psnr


def smooth_video(frames=6, height=32, width=48):
    f, h, w = np.meshgrid(
        np.arange(frames), np.arange(height), np.arange(width), indexing="ij"
    )
    channels = [0.5 + 0.4 * np.sin(0.1 * (h + f) + k + 0.07 * w) for k in range(3)]
    return np.stack(channels, axis=-1).astype(np.float32)


def test_mp4_decodes_to_the_same_video(tmp_path):
    video = smooth_video()
    path = tmp_path / "new" / "video.mp4"
    video_io.write_mp4(path, video, fps=8)
    decoded = video_io.read_mp4(path)
    assert decoded.shape == video.shape
    # Lossy: 4:2:0 colour and H.264. A wrong channel order or range is below 20 dB.
    assert psnr(decoded / 255.0, video) > 30.0
    assert [file.name for file in path.parent.iterdir()] == ["video.mp4"]


@pytest.mark.parametrize("folder", ["a:b", "-x", "pipe:1", "100%d", "it's; *"])
def test_names_of_folders_mean_nothing_to_ffmpeg(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    path = Path(folder) / "video.mp4"
    video_io.write_mp4(path, smooth_video(), fps=8)
    assert [file.name for file in (tmp_path / folder).iterdir()] == ["video.mp4"]
    assert video_io.read_mp4(path).shape == (6, 32, 48, 3)


@pytest.mark.parametrize("fps", [0.01, 1000])
def test_the_slowest_and_the_fastest_video(tmp_path, fps):
    path = tmp_path / "video.mp4"
    video_io.write_mp4(path, smooth_video(), fps=fps)
    assert len(video_io.read_mp4(path)) == 6


def test_the_longest_row(tmp_path):
    path = tmp_path / "video.mp4"
    video_io.write_mp4(path, np.zeros((1, 2, 16_384, 3), np.float32), fps=8)
    assert video_io.read_mp4(path).shape == (1, 2, 16_384, 3)


def test_to_bytes_rounds_and_clips():
    values = np.array([-0.5, 0.0, 0.5 / 255 + 1e-6, 1.0, 7.0], np.float32)
    video = np.broadcast_to(values[None, None, :, None], (1, 1, 5, 3))
    expected = [0, 0, 1, 255, 255]
    np.testing.assert_array_equal(video_io.to_bytes(video)[0, 0, :, 0], expected)


def test_side_by_side():
    left, right = np.zeros((2, 4, 6, 3)), np.ones((2, 4, 6, 3))
    joined = video_io.side_by_side(left, right)
    assert joined.shape == (2, 4, 12, 3)
    assert joined[:, :, :6].max() == 0
    assert joined[:, :, 6:].min() == 1
    with pytest.raises(ValueError, match="they must be equal"):
        video_io.side_by_side(left, np.ones((2, 4, 8, 3)))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_failed_write_leaves_the_old_file_only(tmp_path, error):
    path = tmp_path / "report.json"
    path.write_text("old")

    def write_half():
        with whole_file(path) as temporary:
            temporary.write_text("half of the ne")
            raise error

    with pytest.raises(error):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_interrupted_mp4_leaves_nothing(tmp_path, monkeypatch):
    """An ffmpeg that is half-way through its file when the user presses Ctrl-C."""
    slow_ffmpeg = tmp_path / "ffmpeg"
    slow_ffmpeg.write_text(
        "#!/bin/sh\n"
        'for last; do :; done; echo half > "$last"; kill -INT $PPID; sleep 60'
    )
    slow_ffmpeg.chmod(0o755)
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(slow_ffmpeg))
    # Where the tests run in the background, SIGINT is ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            video_io.write_mp4(tmp_path / "out" / "video.mp4", smooth_video(), fps=8)
    finally:
        signal.signal(signal.SIGINT, before)
    assert list((tmp_path / "out").iterdir()) == []


def test_interrupt_while_ffmpeg_starts_ends_it(tmp_path, monkeypatch):
    """There the child exists, but `subprocess` has not told anybody yet."""
    slow_ffmpeg = tmp_path / "ffmpeg"
    slow_ffmpeg.write_text("#!/bin/sh\nexec sleep 60")
    slow_ffmpeg.chmod(0o755)
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(slow_ffmpeg))
    started = []
    fork = subprocess._fork_exec

    def interrupt(*arguments):
        started.append(fork(*arguments))
        os.kill(os.getpid(), signal.SIGINT)
        return started[0]

    monkeypatch.setattr(subprocess, "_fork_exec", interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            video_io.write_mp4(tmp_path / "out" / "video.mp4", smooth_video(), fps=8)
    finally:
        signal.signal(signal.SIGINT, before)
    with pytest.raises(ProcessLookupError):
        os.kill(started[0], signal.SIGKILL)


def test_failed_ffmpeg_is_told_with_its_words(tmp_path):
    path = tmp_path / "not-a-video.mp4"
    path.write_text("text")
    with pytest.raises(OSError, match=r"failed with status \d+: .*Invalid data"):
        video_io.read_mp4(path)


def test_json_is_strict_and_readable(tmp_path):
    path = tmp_path / "report.json"
    video_io.write_json(path, {"psnr_db": 31.5, "prompt": "ein grüner Ball"})
    assert json.loads(path.read_text(encoding="utf-8"))["prompt"] == "ein grüner Ball"
    with pytest.raises(ValueError, match="not JSON compliant"):
        video_io.write_json(path, {"psnr_db": float("inf")})
    assert json.loads(path.read_text(encoding="utf-8"))["psnr_db"] == 31.5


@pytest.mark.parametrize(
    ("name", "shape", "fps", "message"),
    [
        ("video.avi", (2, 4, 4, 3), 8, r"video\.avi' must end in \.mp4"),
        ("video.mp4", (2, 5, 4, 3), 8, "5 x 4 pixels: both must be even"),
        ("video.mp4", (1, 2, 16_386, 3), 8, "2 x 16386 pixels: an H.264 video has at"),
        ("video.mp4", (1, 16_386, 2, 3), 8, "16386 x 2 pixels: an H.264 video has at"),
        ("video.mp4", (2, 4, 4, 3), 0, r"fps=0 must be in \[0.01, 1000\]"),
        ("video.mp4", (2, 4, 4, 3), 0.009, r"fps=0.009 must be in \[0.01, 1000\]"),
        ("video.mp4", (2, 4, 4, 3), 1001, r"fps=1001 must be in \[0.01, 1000\]"),
        ("video.mp4", (2, 4, 4, 3), math.nan, r"fps=nan must be in \[0.01, 1000\]"),
    ],
    ids=str,
)
def test_bad_mp4_arguments_are_named(tmp_path, name, shape, fps, message):
    with pytest.raises(ValueError, match=message):
        video_io.write_mp4(tmp_path / name, np.zeros(shape, np.float32), fps=fps)
    assert list(tmp_path.iterdir()) == []


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.mp4' is not a file"):
        video_io.read_mp4(tmp_path / "absent.mp4")


def test_missing_extra_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(video_io.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        video_io.MissingExtraError,
        match=r"imageio_ffmpeg, matplotlib, tqdm: run pip install '\.\[video\]' in",
    ):
        video_io.write_mp4(tmp_path / "video.mp4", smooth_video(), fps=8)

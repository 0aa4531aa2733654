"""The command as a process: signals, terminals that know few letters, full disks."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
# Where the tests run in the background, SIGINT is ignored, and under nohup SIGHUP:
# children inherit that.
START = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
sys.argv = ["draft-video", "generate", "a cat"]
import draft_video
"""
# With a command that does only this; `draft_video.main` and all around it are real.
WITH_COMMAND = """
import models.cli.entry
models.cli.entry._run = command
sys.exit(draft_video.main())
"""
WRITE_VIDEO = """
import pathlib
import numpy as np
from models.media.video import write_mp4
def command(_):
    write_mp4(pathlib.Path("out/video.mp4"), np.zeros((2, 32, 48, 3), "f"), fps=8)
"""
# A mutex that is locked twice: no signal ends that wait, like one for XLA.
WAIT_OUTSIDE_PYTHON = """
import ctypes
def command(_):
    mutex = ctypes.create_string_buffer(256)
    lock = ctypes.CDLL(None).pthread_mutex_lock
    lock(mutex)
    print("waiting", flush=True)
    lock(mutex)
"""
STOPPED = [
    pytest.param(signal.SIGINT, 130, "interrupted", id="SIGINT"),
    pytest.param(signal.SIGTERM, 143, "terminated", id="SIGTERM"),
    pytest.param(signal.SIGHUP, 129, "terminated: its terminal has gone", id="SIGHUP"),
]


def start(code, folder, *, before=(), stdout=subprocess.PIPE, **environment):
    paths = os.pathsep.join(map(str, (*before, ROOT)))
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths, **environment},
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(child, seconds=60):
    """Returns the exit status and what is on stderr; the child is gone afterwards."""
    try:
        _, errors = child.communicate(timeout=seconds)
        return child.returncode, errors
    finally:
        child.kill()


def wait_for(path, seconds=60):
    deadline = time.monotonic() + seconds
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline, f"{path} does not appear"
        time.sleep(0.02)
    return path.read_text()


def is_running(process):
    """Whether a process does anything; what waits for its parent's look does not."""
    stat = subprocess.run(
        ["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True
    ).stdout
    return stat.strip() != "" and not stat.startswith("Z")


# ------------------------------------------------------------------------- signals


@pytest.mark.parametrize(("number", "status", "words"), STOPPED)
def test_a_signal_during_imports_ends_the_process_quietly(
    tmp_path, number, status, words
):
    """A package on the way turns every exception into one of its own."""
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax" / "__init__.py").write_text(
        "import time\n"
        "try:\n"
        "    print('importing', flush=True)\n"
        "    time.sleep(60)\n"
        "except BaseException as error:\n"
        "    raise RuntimeError('jax cannot be imported') from error\n"
    )
    child = start(f"{START}sys.exit(draft_video.main())", tmp_path, before=[tmp_path])
    assert child.stdout.readline() == "importing\n"
    child.send_signal(number)
    assert end(child) == (status, f"draft-video: {words}\n")


@pytest.mark.parametrize(("number", "status", "words"), STOPPED)
def test_a_signal_during_writing_leaves_no_file_and_no_ffmpeg(
    tmp_path, number, status, words
):
    slow_ffmpeg = tmp_path / "ffmpeg"
    slow_ffmpeg.write_text(
        "#!/bin/sh\n"
        'for last; do :; done; echo half > "$last"\n'
        f"echo $$ > {tmp_path / 'pid'}\n"
        "exec sleep 60\n"
    )
    slow_ffmpeg.chmod(0o755)
    child = start(
        START + WRITE_VIDEO + WITH_COMMAND,
        tmp_path,
        IMAGEIO_FFMPEG_EXE=str(slow_ffmpeg),
    )
    ffmpeg = int(wait_for(tmp_path / "pid"))
    assert len(list((tmp_path / "out").iterdir())) == 1, "the half file"
    child.send_signal(number)
    assert end(child) == (status, f"draft-video: {words}\n")
    assert list((tmp_path / "out").iterdir()) == []
    deadline = time.monotonic() + 10
    while is_running(ffmpeg):
        assert time.monotonic() < deadline, "ffmpeg goes on"
        time.sleep(0.02)


@pytest.mark.parametrize(("number", "status", "words"), STOPPED[:2])
def test_a_signal_while_xla_works_does_not_wait_for_it(tmp_path, number, status, words):
    grace = "import models.cli.signals\nmodels.cli.signals.GRACE_SECONDS = 0.2\n"
    child = start(START + grace + WAIT_OUTSIDE_PYTHON + WITH_COMMAND, tmp_path)
    assert child.stdout.readline() == "waiting\n"
    child.send_signal(number)
    assert end(child) == (status, f"draft-video: {words}\n")


def test_what_the_parent_ignores_stays_ignored(tmp_path):
    """As under `nohup`, which keeps a run alive when its terminal goes."""
    code = (
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "def command(_):\n"
        "    signal.raise_signal(signal.SIGHUP)\n"
        "    print('alive')\n"
        "    return 0\n"
    )
    child = start(START + code + WITH_COMMAND, tmp_path)
    assert (child.stdout.read(), end(child)) == ("alive\n", (0, ""))


# ------------------------------------------------------------ terminals and streams


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    ],
    ids=["io", "locale"],
)
def test_an_ascii_terminal_gets_paths_and_errors(tmp_path, environment):
    code = (
        "from models.cli.messages import write_line\n"
        "def command(_):\n"
        "    print('outputs/\\u72d7-0/video.mp4')\n"
        "    write_line('note: \\U0001f415')\n"
        "    return 0\n"
    )
    child = start(START + code + WITH_COMMAND, tmp_path, **environment)
    assert child.stdout.read() == "outputs/\\u72d7-0/video.mp4\n"
    assert end(child) == (0, "note: \\U0001f415\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_a_full_disk_below_the_output_is_told(tmp_path):
    code = START + "sys.argv[1:] = ['--version']\nsys.exit(draft_video.main())"
    with open("/dev/full", "w") as full:
        status, errors = end(start(code, tmp_path, stdout=full))
    assert errors == (
        "draft-video: error: the output cannot be printed: [Errno 28] No space left "
        "on device\n"
    )
    assert status == 2


def test_a_reader_that_has_gone_is_no_error(tmp_path):
    """As in `draft-video --help | head -1`."""
    code = START + "sys.argv[1:] = ['--help']\nsys.exit(draft_video.main())"
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as gone:
        assert end(start(code, tmp_path, stdout=gone)) == (0, "")

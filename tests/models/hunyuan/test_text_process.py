"""A process of its own: its answer, its errors, and its end with this process."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from models.checkpoints.memory_map import CheckpointError
from models.hunyuan.text_process import run_worker

ROOT = Path(__file__).parents[3]
ANSWERS = """
import json, pathlib, sys
import numpy as np
from safetensors.numpy import save_file
folder = pathlib.Path(sys.argv[1])
request = json.loads((folder / "request.json").read_text())
arrays = {"x": np.full(3, request["value"], np.float32)}
save_file(arrays, folder / "answer.safetensors")
modules = sorted(name for name in sys.modules if name in ("jax", "models"))
answer = {"got": request, "folder": str(folder), "modules": modules}
(folder / "answer.json").write_text(json.dumps(answer))
"""
FAILS = """
import json, pathlib, sys
kind = sys.argv[0].split("_")[-1].removesuffix(".py")
error = {"kind": kind, "message": "why", "traceback": "where"}
answer = pathlib.Path(sys.argv[1]) / "answer.json"
answer.write_text(json.dumps({"error": error}))
"""
# Hangs, and ends only when its stdin does, as the worker.
HANGS = """
import os, pathlib, sys
pathlib.Path(__file__).with_suffix(".pid").write_text(str(os.getpid()))
while os.read(0, 1):
    pass
"""


@pytest.fixture
def script(tmp_path):
    """Writes a script for the other process."""

    def write(text, name="script.py"):
        file = tmp_path / name
        file.write_text(textwrap.dedent(text))
        return file

    return write


def wait_for(file, seconds=30):
    """Returns the number in a file, once it is there."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if file.exists() and (text := file.read_text()):
            return int(text)
        time.sleep(0.02)
    raise AssertionError(f"{file} was not written")


def has_ended(pid, seconds=10):
    """Whether a process ends in time; a zombie has."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


def test_answers_come_back_and_leave_no_file(script):
    answer, arrays = run_worker({"value": 2.5, "ü": "🐞"}, script=script(ANSWERS))
    assert answer["got"] == {"value": 2.5, "ü": "🐞"}
    assert answer["modules"] == []
    np.testing.assert_array_equal(arrays["x"], np.full(3, 2.5))
    assert not Path(answer["folder"]).exists()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("checkpoint", CheckpointError),
        ("device", ValueError),
        ("import", ImportError),
        ("memory", MemoryError),
        ("other", ChildProcessError),
    ],
)
def test_errors_come_back_with_their_cause(script, kind, expected):
    with pytest.raises(expected, match="why") as error:
        run_worker({}, script=script(FAILS, f"fails_{kind}.py"))
    assert "where" in str(error.value.__cause__)
    hint = "pip install draft-attention-jax[hunyuan]"
    assert (hint in str(error.value)) == (kind == "import")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("raise SystemExit(7)", "ended with status 7 without an answer"),
        ("print('1')\n1 / 0", r"status 1 .*wrote: .* \| ZeroDivisionError"),
        (
            "import os\nos.kill(os.getpid(), 9)",
            "by SIGKILL; perhaps memory ran out, without an answer",
        ),
        (
            "import pathlib, sys\n"
            "pathlib.Path(sys.argv[1], 'answer.json').write_text('{\"a')",
            "status 0 without an answer",
        ),
        (
            "import pathlib, sys\n"
            "pathlib.Path(sys.argv[1], 'answer.json').write_text('{}')",
            "an answer that cannot be read",
        ),
    ],
    ids=["status", "exception", "killed", "cut", "no arrays"],
)
def test_a_process_without_an_answer_is_told(script, text, message):
    with pytest.raises(ChildProcessError, match=message):
        run_worker({}, script=script(text))


def test_an_interpreter_that_is_not_there(script):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run_worker({}, script=script(ANSWERS), python="/nowhere")


def test_ctrl_c_ends_the_process(script):
    # A shell in the background may have had the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    file = script(HANGS)
    main = threading.get_ident()
    pids = []

    def interrupt():
        pids.append(wait_for(file.with_suffix(".pid")))
        signal.pthread_kill(main, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            run_worker({}, script=file)
    finally:
        signal.signal(signal.SIGINT, before)
    thread.join()
    assert has_ended(pids[0])


# The worker itself, without torch: it hangs where it reads its request.
WORKER_HANGS = """
import os, pathlib, runpy, sys
folder = pathlib.Path(sys.argv[1])
(folder / "request.json").unlink()
os.mkfifo(folder / "request.json")
pathlib.Path(__file__).with_suffix(".pid").write_text(str(os.getpid()))
runpy.run_path({worker!r}, run_name="__main__")
"""


@pytest.mark.parametrize("text", [HANGS, WORKER_HANGS], ids=["script", "worker"])
def test_it_ends_when_this_process_is_killed(script, text):
    worker = str(ROOT / "models" / "hunyuan" / "text_worker.py")
    file = script(text.replace("{worker!r}", repr(worker)))
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import pathlib, sys\n"
            "from models.hunyuan.text_process import run_worker\n"
            "run_worker({}, script=pathlib.Path(sys.argv[1]))",
            os.fspath(file),
        ],
        cwd=ROOT,
    )
    try:
        pid = wait_for(file.with_suffix(".pid"))
        assert not has_ended(pid, seconds=0.2)
    finally:
        parent.kill()
        parent.wait()
    assert has_ended(pid)


def test_the_worker_says_that_torch_is_missing(script):
    """Its own error, made without torch."""
    file = script(
        "import runpy, sys\n"
        "sys.modules['torch'] = None\n"
        f"runpy.run_path({str(ROOT / 'models/hunyuan/text_worker.py')!r}, "
        "run_name='__main__')"
    )
    with pytest.raises(ImportError, match=r"torch.*draft-attention-jax\[hunyuan\]"):
        run_worker({}, script=file)

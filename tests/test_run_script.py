"""`./run`, with a command in place of `draft-video`."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def demo(tmp_path):
    """Runs `./run demo` in an environment that is installed; returns its command."""
    (tmp_path / "bin").mkdir()
    for name in ("python", "draft-video"):
        program = tmp_path / "bin" / name
        program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
        program.chmod(0o755)
    (tmp_path / "constraints").write_text("")
    environment = os.environ | {
        "VENV": str(tmp_path),
        "CONSTRAINTS": str(tmp_path / "constraints"),
    }
    stamp = tmp_path / ".installed-video"
    stamp.write_text("")
    later = max((ROOT / "pyproject.toml").stat().st_mtime, stamp.stat().st_mtime) + 5
    os.utime(stamp, (later, later))

    def run(*arguments):
        return subprocess.run(
            [ROOT / "run", "demo", *arguments],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()

    return run


def test_the_demo_can_be_run_again(demo):
    """The same prompt and settings are refused without --overwrite."""
    default = "the camera zooms in on an orange flower"
    assert demo() == ["generate", default, "--compare", "--overwrite"]
    assert demo("a cat", "--seed", "3") == [
        *("generate", "a cat", "--compare", "--overwrite"),
        *("--seed", "3"),
    ]
    assert demo("--seed", "3")[:2] == ["generate", default]

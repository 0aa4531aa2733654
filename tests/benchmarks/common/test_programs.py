"""Programs that `benchmarks.common.programs` runs."""

import math
import sys
import time

import pytest

from benchmarks.common import programs


@pytest.mark.parametrize("limit", [60.0, math.inf])
def test_status_and_output(limit):
    code = "import os, sys; print(os.environ['X'], file=sys.stderr); sys.exit(3)"
    found = programs.run_limited([sys.executable, "-c", code], limit, {"X": "y"})
    assert found == (3, "y\n")


def test_limit_ends_children():
    start = time.monotonic()
    found = programs.run_limited(["sh", "-c", "echo x; sleep 60 & wait"], 0.5, {})
    assert found == (None, "x\n")
    assert time.monotonic() - start < 30

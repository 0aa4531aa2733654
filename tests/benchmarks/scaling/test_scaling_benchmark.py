"""The benchmark of several devices, on simulated ones."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.nightly
def test_programs_of_two_devices_are_timed(tmp_path):
    output = tmp_path / "scaling.json"
    options = ["--shape", "tiny", "--sparsity", "0.5", "--rounds", "1"]
    options += ["--settle", "0", "--block", "0.1", "--output", str(output)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.scaling.run", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    assert set(found["summary"]) == {"layer_2", "layer_explicit_2", "layer_shard_map_2"}
    for name, record in found["programs"].items():
        assert record["collectives"] == [], name
        assert record["relative_error"] < 1e-6, name

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
    options = ["--parts", "layer", "--shape", "tiny", "--sparsity", "0.5"]
    options += ["--rounds", "1"]
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


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_steps_of_whole_models_are_timed(tmp_path):
    """Those of two devices, which compute what one does and hold half the weights."""
    output = tmp_path / "steps.json"
    options = ["--parts", "wan", "hunyuan", "--shape", "tiny", "--wan", "tiny"]
    options += ["--samples", "1", "--sparsity", "0.5", "--output", str(output)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.scaling.run", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    assert set(found["summary"]) == {
        "step_sequence_2",
        "step_guidance_2",
        "hunyuan_step_2",
        "weights_memory_ratio",
        "weights_time_ratio",
    }
    assert 0.5 < found["summary"]["weights_memory_ratio"] < 0.6
    for model, records in found["steps"].items():
        for name, record in records.items():
            # Products in bfloat16: measured 3e-4.
            assert record["relative_error"] < 1e-2, (model, name)
            kinds = [kind.removesuffix("-start") for kind in record["collectives"]]
            assert "all-to-all" in kinds or "sequence=2" not in str(record["mesh"])

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
    for name, record in found["layer"].items():
        assert record["traffic"] == [], name
        assert record["relative_error"] < 1e-6, name


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_steps_of_whole_models_are_timed(tmp_path):
    """Those of two devices, which compute what one does and hold half the weights."""
    output = tmp_path / "steps.json"
    options = ["--parts", "wan", "hunyuan", "gather", "links", "--shape", "tiny"]
    options += ["--wan", "tiny", "--samples", "1", "--sparsity", "0.5"]
    options += ["--rounds", "1", "--settle", "0", "--block", "0.1"]
    options += ["--output", str(output)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.scaling.run", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    assert set(found["summary"]) >= {
        "step_sequence_2",
        "step_guidance_2",
        "hunyuan_step_2",
        "weights_memory_ratio",
        "weights_time_ratio",
        "all_to_all_2_ms",
        "ppermute_2_gb_per_s",
        "gather_layer_ms",
    }
    assert 0.5 < found["summary"]["weights_memory_ratio"] < 0.6
    for model in ("wan", "hunyuan"):
        for name, record in found[model].items():
            # Products in bfloat16: measured 3e-4.
            assert record["relative_error"] < 1e-2, (model, name)
            assert record["masks"]["common_pairs"] > 0.9, (model, name)
            exchanges = "all-to-all" in record["sent"]
            assert exchanges == ("sequence=2" in str(record["mesh"])), (model, name)
    layers = 3
    # Queries, keys, values and output, in both calls; 72 tokens, 8 heads of 24. On a
    # CPU XLA sends float32.
    sent = found["wan"]["step_sequence_2"]["sent"]["all-to-all"]
    assert sent["times"] == 4 * layers * 2
    assert sent["bytes"] == sent["times"] * 36 * 8 * 24 * 4
    assert found["links"]["all-to-all, 2"]["sent_bytes"] == 36 * 8 * 24 * 2 / 2

"""The benchmark of HunyuanVideo's autoencoder, in small."""

import json

import pytest

from benchmarks.hunyuan import vae

FIGURES = {"compile_s": 9.0, "peak_gib": 1.0, "tflops": 2.0, "pflop": 3.0}


def record(dtype, seconds, **changes):
    facts = {"direction": "decode", "dtype": dtype, "size": (768, 1280)}
    return facts | {"total_s": seconds, **FIGURES} | changes


def test_the_summary_is_of_the_fastest_bfloat16_decoding():
    records = [
        record("bfloat16", 5.0, difference={"relative": 0.5, "greatest": 1.0}),
        record("bfloat16", 3.0, difference={"relative": 0.25, "greatest": 1.0}),
        record("bfloat16", 1.0, size=(544, 960)),
        record("bfloat16", 1.0, direction="encode"),
        record("float32", 2.0),
    ]
    assert vae.summarise(records) == {
        "vae_decode_s": 3.0,
        "vae_compile_s": 9.0,
        "vae_peak_gb": 2**30 / 1e9,
        "vae_tflops": 2.0,
        "vae_pflop": 3.0,
        "vae_bf16_difference": 0.25,
    }
    assert vae.summarise(records[4:]) == {}


@pytest.mark.nightly
def test_a_tiny_run_is_recorded(tmp_path, monkeypatch):
    file = tmp_path / "vae.json"
    command = ["vae", "--tiny", "--convolutions", "3d", "--output", str(file)]
    monkeypatch.setattr("sys.argv", command)
    assert vae.main() == 0
    (found,) = json.loads(file.read_text())["records"]
    assert found["finite"]
    # Two tiles each way, and the edges' own shapes.
    assert found["tile_shapes"] == 8
    assert 0 < found["difference"]["relative"] < 0.02

"""The HunyuanVideo benchmark on a tiny model, on any machine."""

import json

import pytest

from benchmarks.hunyuan import run as hunyuan


def run(file, *parts):
    hunyuan.main(
        ["--model", "tiny", "--samples", "1", "--output", str(file), "--parts", *parts]
    )
    return json.loads(file.read_text())


def test_what_a_cut_run_lacks_is_added(tmp_path, monkeypatch):
    file = tmp_path / "results.json"
    first = run(file, "720p")
    assert list(first["parts"]) == ["720p"]
    assert first["parts"]["720p"]["tokens"] == 3 * 5 * 8 + 8
    assert first["parts"]["720p"]["modes"]["0.9"]["kept_density"] < 0.5
    assert first["summary"] == {}

    monkeypatch.setattr(hunyuan, "measure_vae", lambda _: {"vae_decode_s": 2.0})
    document = run(file, "768p", "vae")
    assert document["parts"]["720p"] == first["parts"]["720p"]
    largest = document["parts"]["768p"]
    assert list(largest["modes"]) == list(hunyuan.MODES["768p"])
    densities = {name: m["kept_density"] for name, m in largest["modes"].items()}
    assert densities["dense"] == 1.0 > densities["0.75"] > densities["0.9"]
    assert densities["0.9+layers0,1"] > densities["0.9"]
    assert not {"error"} & largest.keys()
    assert {
        "step_90_bf16_speedup_over_cudnn",
        "step_720p_over_768",
        "video_published",
        "video_10_dense",
    } <= document["summary"].keys()


def test_records_of_another_model_stay(tmp_path):
    file = tmp_path / "results.json"
    file.write_text('{"model": "13b", "parts": {}}')
    with pytest.raises(SystemExit, match="is of model '13b', not 'tiny'"):
        run(file, "720p")
    assert json.loads(file.read_text()) == {"model": "13b", "parts": {}}


def test_parts_of_a_step_sum_to_its_kernels():
    by_class = {
        "matmul": 100.0,
        "self-attention": 300.0,
        "order of work": 4.0,
        "draft": 6.0,
        "norm and rotation": 20.0,
        "copy": 1.0,
        "fusion": 50.0,
    }
    mask = {"kernels_ms": 0.5, "by_class_ms": {"matmul": 0.25, "draft": 0.25}}
    parts = hunyuan.by_part(by_class, mask, num_layers=20)
    assert parts == {
        "attention": 300.0,
        "lists": 4.0,
        "draft": 10.0,
        "linears": 95.0,
        "norm and rotation of q and k": 20.0,
        "copies": 1.0,
        "the rest": 51.0,
    }


def test_a_decoder_that_fails_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(hunyuan, "run_limited", lambda *_: (1, "no memory"))
    record = run(tmp_path / "results.json", "vae")["parts"]["vae"]
    assert record["error"] == "ended with 1: no memory"


def test_linear_layers_in_fp8_are_a_part(tmp_path):
    file = tmp_path / "results.json"
    document = run(file, "768p_float8", "--modes", "0.9")
    part = document["parts"]["768p_float8"]
    assert list(part["modes"]) == ["0.9"]
    assert list(part["default"]["modes"]) == ["0.9", "0.95"]
    assert part["linears"].keys() == {"projection", "mlp in", "mlp out"}
    assert document["summary"].keys() >= {
        "step_90_fp8_s",
        "step_default_90_fp8_s",
        "step_default_95_fp8_s",
        "fp8_linear_alone_speedup",
        "step_90_fp8_speedup_over_cudnn",
        "step_default_90_fp8_speedup_over_cudnn",
    }
    dense_s = part["cudnn"]["median_ms"] / 1e3
    speedup = dense_s / document["summary"]["step_90_fp8_s"]
    assert document["summary"]["step_90_fp8_speedup_over_cudnn"] == pytest.approx(
        speedup
    )

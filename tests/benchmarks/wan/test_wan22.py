"""The benchmark of Wan2.2 on small models, and its figures from a record by hand."""

import json

import pytest

from benchmarks.wan import wan22
from benchmarks.wan.account import kernel_work
from draft_jax import VideoGrid


def test_figures_are_quotients_of_the_records():
    def steps(**medians):
        return {"modes": {name: {"median_ms": ms} for name, ms in medians.items()}}

    dense = {"median_ms": 12.0, "has_cudnn": True}
    failed = {"error": "no memory"}
    parts = {
        "expert": {
            "768x1280, float8": steps(**{"0.75": 6.0, "0.9": 3.0}),
            "768x1280, cudnn": dense,
            "768x1280, default": steps(**{"0.9": 4.0}),
            "720x1280, float8": steps(**{"0.9": 2.0}),
            "720x1280, cudnn": dense,
            "768x1280, bfloat16": steps(**{"0.9": 8.0}),
            "720x1280, bfloat16": failed,
        },
        "fp8_pair": {"peak_gb": 45.0},
        "streamed": {"peak_gb": 44.0, "switch_s": 0.7},
        "ti2v": {
            "environment": {"device": "by hand"},
            "cudnn": dense | {"median_ms": 9.0},
            "float8": steps(**{"0.85": 3.0}),
            "bfloat16": failed,
            "bfloat16, tile 8x16": steps(**{"0.85": 4.5}),
        },
        "held": {
            "cudnn": dense,
            "float8, first frame held": steps(**{"0.85": 4.8}),
        },
        "vae": {
            "float32, 3d": {"seconds": 11.0, "peak_gb": 24.0},
            "float32, 2d": {"seconds": 10.0, "peak_gb": 25.0},
            "bfloat16, 2d": failed,
        },
    }
    assert wan22.summarise(parts) == {
        "expert_step_75_speedup_over_cudnn": 2.0,
        "expert_step_90_speedup_over_cudnn": 4.0,
        "expert_step_90_bfloat16_speedup_over_cudnn": 1.5,
        "expert_step_default_90_speedup_over_cudnn": 3.0,
        "expert_step_90_720p_speedup_over_cudnn": 6.0,
        "peak_fp8_gb": 45.0,
        "peak_bfloat16_gb": 44.0,
        "switch_s": 0.7,
        "ti2v_step_85_fp8_speedup_over_cudnn": 3.0,
        "ti2v_step_85_tile_8x16_speedup_over_cudnn": 2.0,
        "ti2v_step_85_fp8_held_speedup_over_cudnn": 2.5,
        "vae_decode_s": 10.0,
        "vae_peak_gb": 25.0,
    }
    assert wan22.summarise({}) == {}
    for part in ("ti2v", "held"):  # then it is no measure
        parts[part]["cudnn"] = parts[part]["cudnn"] | {"has_cudnn": False}
    assert not [name for name in wan22.summarise(parts) if name.startswith("ti2v")]


@pytest.mark.nightly
@pytest.mark.parametrize("part", wan22.PARTS)
def test_every_part_runs_and_others_stay_in_the_file(part, tmp_path):
    output = tmp_path / "wan22.json"
    output.write_text(json.dumps({"parts": {"earlier": {"seconds": 1.0}}}))
    arguments = ["--tiny", "--no-cudnn", "--samples", "1", "--output", str(output)]
    wan22.main([*arguments, "--parts", part])
    parts = json.loads(output.read_text())["parts"]
    assert set(parts) == {"earlier", part}
    record = parts[part]
    errors = [
        name for name, case in record.items() if "error" in (name, *case_of(case))
    ]
    assert errors == []
    assert "jax" in record["environment"]["versions"]
    if part in ("fp8_pair", "streamed"):  # of 40 steps at a shift of 12, 26 are high
        assert record["switch_before_step"] == 26
        assert len(record["steps_ms"]) == (5 if part == "streamed" else 2)
        assert record["programs"] == 1
    if part == "streamed":
        plain, sending, switching, settled = record["steps_ms"][1:]
        extra = sending + switching - plain - settled
        assert record["switch_s"] == pytest.approx(extra / 1e3)
    if part == "expert":
        assert record["768x1280, float8"]["other_expert_ms"] > 0


def case_of(record):
    return record if isinstance(record, dict) else ()


@pytest.mark.nightly
def test_a_case_that_fails_or_comes_too_late_stops_no_other(monkeypatch):
    options = ["--tiny", "--no-cudnn", "--samples", "1", "--parts"]
    make = wan22.Steps.__init__

    def fail(steps, problem, modes):
        if problem.model.config.linears == "float8":
            raise MemoryError("no memory")
        make(steps, problem, modes)

    monkeypatch.setattr(wan22.Steps, "__init__", fail)
    parts = wan22.main([*options, "ti2v"])["parts"]["ti2v"]
    assert "MemoryError: no memory" in parts["float8"]["error"]
    assert parts["bfloat16"]["modes"]["0.85"]["median_ms"] > 0
    late = wan22.main([*options, "ti2v", "--limit", "0.5"])["parts"]["ti2v"]
    assert "not begun: the limit was 0.5 s" in late["bfloat16"]["error"]


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        (VideoGrid(1, 16, 32), 1.0),
        (VideoGrid(2, 8, 24), 512 * 384 / 384**2),  # keys of 128 and of 64
        # 8 blocks of 128 rows in a frame; keys of 120 and 80, in steps of 16.
        (VideoGrid(31, 22, 40, tile=(6, 20)), 1024 * (6 * 128 + 2 * 80) / 880**2),
    ],
    ids=["whole", "short", "5b"],
)
def test_work_of_the_kernel(grid, expected):
    assert kernel_work(grid) == pytest.approx(expected)


@pytest.mark.nightly
def test_cases_of_the_decoder_stay_when_another_fails(monkeypatch, tmp_path):
    output = tmp_path / "wan22.json"
    arguments = ["--tiny", "--samples", "1", "--parts", "vae", "--output", str(output)]
    wan22.main([*arguments, "--convolution", "2d"])

    def fail(*_):
        raise MemoryError("no memory")

    monkeypatch.setattr(wan22.wan_vae, "time_chunks", fail)
    part = wan22.main([*arguments, "--convolution", "3d"])["parts"]["vae"]
    assert part["bfloat16, 2d"]["seconds"] > 0
    assert "MemoryError" in part["error"]
    assert json.loads(output.read_text())["summary"]["vae_decode_bfloat16_s"] > 0

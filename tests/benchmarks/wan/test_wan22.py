"""The benchmark of Wan2.2 on small models, and its figures from a record by hand."""

import json

import pytest

from benchmarks.wan import wan22


def test_figures_are_quotients_of_the_records():
    def steps(**medians):
        return {"modes": {name: {"median_ms": ms} for name, ms in medians.items()}}

    def case(wide, narrow):
        return {
            "cudnn": {"median_ms": 12.0},
            "bfloat16": steps(**{"0.9": wide}),
            "float8": steps(**{"0.9": narrow}),
        }

    parts = {
        "expert": {"768x1280": case(4.0, 3.0), "720x1280": case(6.0, 2.0)},
        "fp8_pair": {"peak_gb": 45.0},
        "streamed": {"peak_gb": 44.0, "switch_s": 0.7},
        "ti2v": {"cudnn": {"median_ms": 9.0}, "float8": steps(**{"0.85": 3.0})},
        "vae": {"float32": {"seconds": 11.0, "peak_gb": 24.0}},
    }
    assert wan22.summarise(parts) == {
        "expert_step_90_speedup_over_cudnn": 4.0,
        "expert_step_90_bfloat16_speedup_over_cudnn": 3.0,
        "expert_step_90_720p_speedup_over_cudnn": 6.0,
        "expert_step_90_720p_bfloat16_speedup_over_cudnn": 2.0,
        "peak_fp8_gb": 45.0,
        "peak_bfloat16_gb": 44.0,
        "switch_s": 0.7,
        "ti2v_step_85_fp8_speedup_over_cudnn": 3.0,
        "vae_decode_s": 11.0,
        "vae_peak_gb": 24.0,
    }
    assert wan22.summarise({}) == {}


@pytest.mark.nightly
@pytest.mark.parametrize("part", wan22.PARTS)
def test_every_part_runs_and_others_stay_in_the_file(part, tmp_path):
    output = tmp_path / "wan22.json"
    output.write_text(json.dumps({"parts": {"earlier": {"seconds": 1.0}}}))
    arguments = ["--tiny", "--no-cudnn", "--samples", "1", "--output", str(output)]
    wan22.main([*arguments, "--parts", part])
    parts = json.loads(output.read_text())["parts"]
    assert set(parts) == {"earlier", part}
    assert "error" not in parts[part]

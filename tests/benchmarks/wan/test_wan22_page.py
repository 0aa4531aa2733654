"""The page of Wan2.2 has what its record makes, and a record makes tables."""

import json

from benchmarks.wan import wan22, wan22_document

ENVIRONMENT = {
    "device": "NVIDIA H200",
    "gpus": ["NVIDIA H200, 580.1"],
    "date": "2026-01-02T03:04:05",
    "commit": "abc",
    "versions": {"jax": "0.11.2"},
}


def steps(**medians):
    return {"modes": {name: {"median_ms": ms} for name, ms in medians.items()}}


def record_of_all():
    other = {"other_expert_ms": 5500.0}
    small = {"modes": {"0.85": {"median_ms": 500.0, "kept_density": 0.1894}}}
    small["tile"] = [6, 20]
    return {
        "parts": {
            "expert": {
                "environment": ENVIRONMENT,
                "768x1280, float8": steps(**{"0.75": 8000.0, "0.9": 5000.0}) | other,
                "768x1280, cudnn": {"median_ms": 24000.0, "has_cudnn": True},
                "720x1280, float8": {"error": "no memory"},
            },
            "fp8_pair": {"environment": ENVIRONMENT | {"commit": "def"}, "peak_gb": 40},
            "streamed": {"peak_gb": 42.0, "switch_s": 0.5, "switch_before_step": 26},
            "ti2v": {
                "cudnn": {"median_ms": 1000.0, "has_cudnn": True},
                "bfloat16": small,
                "float8, tile 8x16": steps(**{"0.85": 400.0}),
                "float8, default tile 8x16": steps(**{"0.85": 800.0}),
            },
            "held": {
                "cudnn": {"median_ms": 1200.0, "has_cudnn": True},
                "bfloat16, first frame held": small,
            },
            "vae": {
                "float32, 2d": {"seconds": 10.0, "peak_gb": 24.0},
                "bfloat16, 2d": {"seconds": 5.0, "peak_gb": 12.0},
                "bfloat16, 3d": {"error": "no memory"},
            },
        }
    }


def test_the_page_is_what_the_record_makes():
    text = wan22_document.PAGE.read_text()
    assert wan22_document.written(text, wan22_document.read()) == text


def test_a_record_makes_tables():
    text = wan22_document.section(record_of_all())
    words = " ".join(text.split())
    assert "One NVIDIA H200 (2026-01-02, commit abc and def, jax 0.11.2" in words
    row = "| 768x1280, 81 frames | 24.00 | 8.00 (3.00) | 5.00 (4.80) | - | - | - |"
    assert row in text
    assert "| 720x1280, 81 frames | - | - | - | - | - | - |" in text
    assert "in FP8 at 90 %: 5.50 s at 768x1280." in words
    assert "in FP8 take 40.0 GB" in words
    assert "The switch before step 27 of 40 takes 0.50 s" in words
    assert "| 6 x 20 | 18.9% | 1.00 | 0.50 (2.00) | - | - |" in text
    assert "| 8 x 16 | - | 1.00 | - | 0.40 (2.50) | 0.80 (1.25) |" in text
    assert "first frame and tiles of 6 x 20: 0.50 (2.40) in bfloat16." in words
    assert "| float32 | 2D | 10.0 | 24.0 |\n| bfloat16 | 2D | 5.0 | 12.0 |" in text
    assert "no memory" not in text


def test_a_part_alone_makes_its_table():
    part = {"vae": record_of_all()["parts"]["vae"] | {"environment": ENVIRONMENT}}
    text = wan22_document.section({"parts": part})
    assert "| float32 | 2D |" in text
    assert "dense" not in text.replace("the dense bfloat16 step", "")


def test_the_summary_of_the_record_is_that_of_its_parts():
    record = wan22_document.read()
    made = json.loads(json.dumps(wan22.summarise(record["parts"])))
    assert record["summary"] == made

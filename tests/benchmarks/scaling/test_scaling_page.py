"""The page has what its records make, and records make tables."""

import copy

from benchmarks.scaling import document


def test_the_page_is_what_the_records_make():
    records = document.read(document.RECORDS)
    text = document.PAGE.read_text()
    assert document.written(text, records) == text


def test_sizes_are_those_of_the_published_models():
    wan, hunyuan = document.wan_video(), document.hunyuan_video()
    # 21 x 48 x 80 and 33 x 48 x 80 patches: the table of bytes on the page.
    assert (wan.tokens, wan.channels, wan.heads, wan.layers) == (80_640, 5120, 40, 40)
    assert (hunyuan.tokens, hunyuan.channels) == (126_720, 3072)
    assert (hunyuan.heads, hunyuan.layers, hunyuan.rows) == (24, 60, 1)
    assert f"{wan.sent_gb(2, 1):.1f}" == "66.1"
    assert f"{wan.sent_gb(4, 2):.1f}" == "24.8"
    assert f"{hunyuan.sent_gb(8, 1):.1f}" == "20.4"


def step(mesh, seconds):
    masks = {"equal_heads": 1.0, "common_pairs": 0.995}
    return {
        "mesh": mesh,
        "samples_ms": [1e3 * seconds],
        "weights_gb": 28.0,
        "masks": masks,
        "relative_error": 2e-3,
    }


TWO = "sequence=2,guidance=1"


def record_of_all():
    return {
        "environment": {
            "device": "NVIDIA H200",
            "gpus": ["NVIDIA H200"] * 2,
            "date": "2026-01-02T03:04:05",
            "commit": "abc",
            "command": "python -m benchmarks.scaling.run --parts wan --limit 500",
            "versions": {"jax": "0.11.2"},
        },
        "sparsity": 0.9,
        "summary": {"weights_memory_ratio": 0.5, "weights_time_ratio": 1.03},
        "wan": {"one device": step(None, 8.0), "step_sequence_2": step(TWO, 4.33)},
        "hunyuan": {"one device": step(None, 5.0), "hunyuan_step_2": step(TWO, 2.75)},
        "links": {"all-to-all, 2": {"devices": 2, "sent_bytes": 2e8, "ms": 1.0}},
    }


def test_a_record_makes_tables():
    """A step of 8 s, half of which is 4 s and 66.06 GB at 200 GB/s: 0.33 s."""
    text = document.section([record_of_all()])
    words = " ".join(text.split())
    assert "Measured on 2 NVIDIA H200 (2026-01-02, commit abc, jax 0.11.2" in words
    assert f"81 frames | `{TWO}` | abc | 4.33 | 1.85 | 99.50% |" in text
    assert "```\npython -m benchmarks.scaling.run --parts wan\n```\n" in text
    assert "Spread weights take 50% of the memory and 3.0% more time" in words
    assert "Exchanges add 1.00 times their own time" in words
    # Eight devices as 4 x 2: a second, and 24.77 GB at 200 GB/s are 0.124 s.
    assert "| 8 | `sequence=4,guidance=2` | 1.124 | 7.12 | 24.8 |" in text
    assert "No mesh of 24, 32, 48, 64 divides 40 heads." in text
    # 46.71 GB at 200 GB/s beside 2.5 s: 2.734 s, measured 2.75.
    assert "`hunyuan_step_2` -0.6%" in words


def test_the_last_record_of_a_step_counts_beside_one_device_of_its_own():
    first = record_of_all()
    last = copy.deepcopy(first)
    last["environment"]["commit"] = "def"
    last["environment"]["command"] = "python -m benchmarks.scaling.run --steps x"
    last["wan"] = {"one device": step(None, 7.5), "step_sequence_2": step(TWO, 4.0)}
    del last["hunyuan"], last["summary"], last["links"]
    text = document.section([first, last])
    assert "commit abc and def" in " ".join(text.split())
    assert "run --parts wan\npython -m benchmarks.scaling.run --steps x\n```" in text
    assert f"`{TWO}` | def | 4.00 | 1.88 |" in text
    # HunyuanVideo's are those of the first record, 5 s by 2.75 s.
    assert f"`{TWO}` | abc | 2.75 | 1.82 |" in text

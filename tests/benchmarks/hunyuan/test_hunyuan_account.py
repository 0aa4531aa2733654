"""Arithmetic of a HunyuanVideo step, and the figures of a run."""

import pytest

from benchmarks.hunyuan.account import flops_outside_attention
from benchmarks.hunyuan.summary import published_dense_steps, summarise
from models.hunyuan.config import HunyuanConfig


def test_arithmetic_of_a_case_by_hand():
    """10 video and 5 text tokens of width 12, a hidden layer of 48."""
    config = HunyuanConfig(
        dim=12,
        num_heads=2,
        num_double_blocks=3,
        num_single_blocks=4,
        num_refiner_blocks=1,
        rope_channels=(2, 2, 2),
        in_channels=3,
        out_channels=2,
        text_dim=8,
        text_length=5,
        pooled_dim=7,
        freq_dim=6,
    )
    layer = 2 * 15 * (4 * 12 * 12 + 2 * 12 * 48)
    refiner_block = 2 * 5 * (4 * 12 * 12 + 2 * 12 * 48) + 2 * 2 * 5 * 5 * 12
    refiner = 2 * (12 * 24 + 5 * 8 * 12 + 6 * 12 + 12 * 12 + 8 * 12 + 12 * 12)
    conditions = 6 * 12 + 12 * 12 + 7 * 12 + 12 * 12 + 6 * 12 + 12 * 12
    blocks = 3 * 2 * 12 * 6 * 12 + 4 * 12 * 3 * 12 + 12 * 2 * 12
    assert flops_outside_attention(config, 10) == {
        "double blocks": 3 * layer,
        "single blocks": 4 * layer,
        "refiner": refiner_block + refiner,
        "patches and head": 2 * 10 * 4 * (3 + 2) * 12,
        "modulation": 2 * (conditions + blocks),
    }


def test_arithmetic_at_full_size():
    """A step of 126,720 video tokens has 1.73 PFLOP outside of attention."""
    parts = flops_outside_attention(HunyuanConfig.video_13b(), 126_720)
    assert sum(parts.values()) == pytest.approx(1.73e15, rel=5e-3)


def test_dense_steps_of_the_published_rule():
    assert published_dense_steps() == 15


LARGEST = {
    "modes": {
        "dense": {"median_ms": 18e3, "peak_gb": 40.0},
        "0.75": {"median_ms": 8e3, "peak_gb": 41.0},
        "0.9+layers0,1": {"median_ms": 6e3, "peak_gb": 41.0},
        "0.9": {"median_ms": 5e3, "peak_gb": 41.0},
    },
    "cudnn": {"median_ms": 22e3},
    "outside": {"share_of_matmul": 0.85},
    "time_by_part_ms": {"draft": 30.0, "lists": 4.0, "copies": 6.0},
}
PARTS = {
    "768p": LARGEST,
    "720p": {"modes": {"0.9": {"median_ms": 4.7e3}}},
    "544p": {"modes": {"0.9": {"median_ms": 2e3, "over_cudnn": 3.1}}},
    "vae": {"vae_decode_s": 10.0, "vae_peak_gb": 20.0, "environment": {}},
}


def test_figures_by_hand():
    dense_video = 50 * 22 + 10
    expected = {
        "step_dense_s": 18.0,
        "step_75_s": 8.0,
        "step_90_published_s": 6.0,
        "step_90_s": 5.0,
        "step_cudnn_s": 22.0,
        "vae_decode_s": 10.0,
        "vae_peak_gb": 20.0,
        "peak_bf16_gb": 41.0,
        "matmul_share": 0.85,
        "draft_and_reorder_share": 0.008,
        "step_90_bf16_speedup_over_cudnn": 4.4,
        "step_720p_over_768": 0.94,
        "speedup_544p": 3.1,
        "video_cudnn_s": dense_video,
        "video_published_s": 15 * 18 + 35 * 6 + 10,
        "video_published": dense_video / (15 * 18 + 35 * 6 + 10),
        "video_10_dense_s": 5 * 18 + 45 * 5 + 10,
        "video_10_dense": dense_video / (5 * 18 + 45 * 5 + 10),
    }
    assert summarise(PARTS) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("missing", "lost"),
    [
        ("vae", "video_published"),
        ("720p", "step_720p_over_768"),
        ("544p", "speedup_544p"),
        ("768p", "step_720p_over_768"),
    ],
)
def test_figures_without_a_part(missing, lost):
    some = summarise({k: v for k, v in PARTS.items() if k != missing})
    assert lost not in some
    assert some.items() < summarise(PARTS).items()


def test_figures_of_a_cut_part():
    modes = {"0.9": {"median_ms": 5e3}}
    assert summarise({"768p": {"modes": modes, "error": "ended"}}) == {"step_90_s": 5.0}

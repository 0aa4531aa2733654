"""A report of grey frames, whose numbers are known, and what its page is asked."""

import numpy as np

from draft_jax import VideoGrid
from models.diffusion.recording import AttentionRecord, Looks

PROMPT = "a ball </script><script>document.title='broken'</script> & <b>more</b>"
FRAMES, HEIGHT, WIDTH, FPS = 24, 64, 96, 12.0
GRID = VideoGrid(3, 8, 16, tile=(4, 8))  # 3 frames of 2 x 2 tiles
LOOKS = Looks(steps=(2, 3), layers=(0, 5), heads=(0, 1))
PSNR = [20.0 + 0.5 * frame for frame in range(FRAMES - 1)] + [None]


def level_of(frame: int) -> int:
    """The grey of a dense frame; that of a sparse one is as far below white."""
    return 30 + 8 * frame


def grey_video(*, inverted=False):
    levels = np.array([level_of(frame) for frame in range(FRAMES)])
    levels = 255 - levels if inverted else levels
    shape = (FRAMES, HEIGHT, WIDTH, 3)
    return np.broadcast_to(levels[:, None, None, None] / 255, shape).astype(np.float32)


def record(*, frames=3):
    rng = np.random.default_rng(0)
    shape = (2, 2, 2, 12, 12)
    masks = rng.random(shape) < 0.3
    masks |= np.eye(12, dtype=bool)
    return masks, AttentionRecord(
        looks=LOOKS,
        levels=rng.integers(1, 256, shape, np.uint8),
        peaks=np.full(shape[:3], 0.25, np.float32),
        masks=np.packbits(masks, axis=-1),
        dense=np.array([[False, True], [False, True]]),
        timesteps=(750.0, 500.0),
        grid=GRID,
        video_frames=frames,
        of_steps=4,
        of_layers=8,
        of_heads=2,
        time_ms=120.0,
    )


def run_of(seed):
    kept = np.full((4, 8), 1.0 if seed == 0 else 0.25)
    return {
        "time_ms_per_step": [100.0, 110.0, 120.0, 130.0],
        "time_ms_median_step": 115.0,
        "time_ms_all_steps": 460.0,
        "compile_ms": 1000.0,
        "decode_ms": 50.0,
        "timesteps": [1000.0, 900.0, 750.0, 500.0],
        "dense_steps": 4,
        "kept_share": float(kept.mean()),
        "kept_share_per_layer": kept.mean(0).tolist(),
        "kept_share_per_step_and_layer": kept.tolist(),
    }


def report_of(**entries):
    sampling = {"frames": FRAMES, "height": HEIGHT, "width": WIDTH, "num_steps": 4}
    return {
        "prompt": PROMPT,
        "command": f"draft-video generate '{PROMPT}'",
        "date": "2026-11-29T12:00:00+00:00",
        "family": "small",
        "model": None,
        "sampling": sampling | {"seed": 0},
        "draft": {"sparsity": 0.75, "selection": "percentile"},
        "schedule": {"dense_fraction": 0.25},
        "hardware": {"processor": "x"},
        "versions": {"jax": "0.12"},
        "fps": FPS,
    } | entries


def compared():
    return report_of(
        psnr_db=25.0,
        psnr_db_per_frame=PSNR,
        ssim=0.9,
        speed_up_of_sparse_steps=1.5,
        speed_up_of_all_steps=1.2,
        dense=run_of(0),
        sparse=run_of(1) | {"work_per_step": ["dense", "sparse", "skipped", "sparse"]},
    )


def open_report(browser, path):
    browser.open(path.as_uri())
    browser.wait_for("window.report !== undefined")
    browser.wait_for(
        "!report.players || report.players.shown.every((v) => v.readyState >= 2)"
    )


def said(browser):
    return browser.evaluate("document.querySelector('.said').textContent")

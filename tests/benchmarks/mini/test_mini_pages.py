"""Records of new weights from a run's folders, and the pages that they make."""

import json

import pytest

from benchmarks.mini import document, pictures, record

SHORT, SMALL, LARGE = (9, 16, 24), (25, 16, 24), (25, 32, 48)
TURNS = ((SHORT,), (SMALL,), (SMALL, SMALL, LARGE))
# Step, seconds, and which sizes were logged there; 200 lies in two stages.
LOGGED = (
    (50, 5.0, (SHORT,)),
    (100, 10.0, (SHORT,)),
    (150, 16.0, (SHORT, SMALL)),
    (200, 24.0, (SMALL,)),
    (250, 34.0, (SMALL, LARGE)),
    (300, 46.0, (SMALL, LARGE)),
)


def turn(size):
    frames, height, width = size
    batch = {SHORT: 8, SMALL: 4, LARGE: 2}[size]
    return {"frames": frames, "height": height, "width": width, "batch": batch}


def log_of(logged=LOGGED, **changes):
    return {
        "device": "NVIDIA H200",
        "devices": 2,
        "versions": {"jax": "0.11.2"},
        "config": {
            "optimizer": {"kind": "muon", "learning_rate": 0.002, "warmup_steps": 400}
        },
        "stages": [
            {"share": 0.3, "turns": [turn(size) for size in turns]} for turns in TURNS
        ],
        "steps": 310,
        "seconds": 48.0,
        "videos": 1500,
        "skipped": 1,
        "starts": [0, 150],
        "losses": [
            {"step": step, "seconds": seconds, "size": list(size), "loss": step / 3}
            for step, seconds, sizes in logged
            for size in sizes
        ],
    } | changes


def trial(method, sparsity, means=None, frames=None):
    return {
        "method": method,
        "sparsity": sparsity,
        "draft_tile": [2, 4] if method == "sub_tiles" else None,
        "sub_tile": means,
        "mean_frames": frames,
    }


def quality(trial, db):
    return {
        "trial": trial,
        "work_of_sparse_steps": 0.125,
        "config": {"sparsity": 0.75},
        "psnr_db_mean": db,
        "psnr_db_min": db - 5,
        "ssim_mean": 0.5,
    }


def report(rows, *, prompts=4, attention=(), size=(24, 16)):
    return {
        "device": "NVIDIA H200",
        "jax": "0.11.2",
        "prompts": ["a cat"] * prompts,
        "size": list(size),
        "tile": [4, 8],
        "num_steps": 16,
        "dense_fraction": 0.25,
        "attention": list(attention),
        "quality": rows,
    }


ATTENTION = {
    "step": 2,
    "timestep": 954.5,
    "top_10_percent": [0.2, 0.4],
    "kept_at_sparsity_0.75": [0.6, 0.8],
    "kept_at_sparsity_0.9": [0.1, 0.3],
}
FOUND = {
    "prompts": 64,
    "colour": 0.9062,
    "motion": 0.75,
    "motion_of_calm_prompts": None,
    "direction": 0.5,
    "prompts_with_direction": 20,
}


@pytest.fixture
def folders(tmp_path):
    files = {
        "run/log.json": log_of(),
        "codec/log.json": log_of(((200, 1.0, (SHORT,)), (250, 2.0, (SHORT,)))),
        "codec/codec_report.json": {
            "videos": 64,
            "psnr_db_mean": 33.04,
            "psnr_db_min": 27.4,
            "psnr_db": {"procedural": 34.7, "clips": 29.9},
        },
        "measured/faithfulness/faithfulness.json": {
            "device": "NVIDIA H200",
            "sampling": {"num_steps": 16, "frames": 25},
            "dense_fraction": 0.25,
            "dense": FOUND,
            "sparse_0.9": FOUND | {"colour": 0.875},
        },
        "measured/few/evaluation.json": report(
            [quality(trial("percentile", 0.9), 1.0)], prompts=1, attention=[ATTENTION]
        ),
        "measured/large/evaluation.json": report([], size=(48, 32)),
        "measured/paper/evaluation.json": report(
            [quality(trial("percentile", s), 10 / s) for s in (0.75, 0.9)]
        ),
        "measured/ours/evaluation.json": report(
            [
                quality(trial("spread", 0.9, [2, 2], 8), 18.04),
                quality(trial("default", 0.9, [2, 2], 8), 20.04),
                quality(trial("default", 0.9, [2, 2], 4), 21.0),
                quality(trial("sub_tiles", 0.9), 15.0),
                quality(trial("percentile", 0.9), 99.0),
            ]
        ),
    }
    for name, content in files.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))
    (tmp_path / "run" / "commands.txt").write_text("train --a\n\ntrain --b\n")
    for folder, count in (("run", 2), ("measured", 1)):
        gpus = "NVIDIA H200, 580.1\n" * count
        (tmp_path / folder / "gpus.txt").write_text(gpus)
    return tmp_path


def test_stages_have_the_steps_and_seconds_of_their_sizes():
    found = record.stages(log_of())
    assert [row["steps"] for row in found] == [100, 100, 110]
    assert [row["seconds"] for row in found] == [10.0, 14.0, 24.0]


def test_stages_of_equal_sizes_are_told_apart_by_what_lies_between():
    """And the short interval after a new start, of one size alone, tells nothing."""
    turns = ((SMALL, LARGE), (SHORT, SMALL), (SMALL, LARGE))
    log = log_of(
        (
            (50, 5.0, (SMALL, LARGE)),
            (100, 10.0, (SMALL,)),
            (150, 17.0, (SHORT, SMALL)),
            (200, 25.0, (SMALL, LARGE)),
        ),
        stages=[{"share": 1.0, "turns": [turn(size) for size in own]} for own in turns],
        starts=[0, 99],
        steps=200,
        seconds=25.0,
    )
    found = record.stages(log)
    assert [row["steps"] for row in found] == [50, 100, 50]
    assert [row["seconds"] for row in found] == [5.0, 12.0, 8.0]


def test_last_losses_are_means_by_size():
    log = log_of(((50, 1.0, (SHORT,)), (600, 2.0, (SMALL,)), (900, 3.0, (SMALL,))))
    assert record.last_losses(log["losses"]) == [{"size": list(SMALL), "loss": 250.0}]


def test_a_training_makes_a_record_and_a_section(folders, tmp_path):
    made = record.training_record(
        *(folders / name for name in ("run", "codec", "measured")),
        commit="abc",
        codec_commit="def",
    )
    assert made["commands"] == ["train --a", "train --b"]
    assert [entry["step"] for entry in made["codec"]["losses"]] == [200]
    text = document.training_section(made)
    words = " ".join(text.split())
    assert "trained on 2 NVIDIA H200" in words
    assert "310 steps, 1,500 videos, 0.8 minutes of stepping, which are 1.6" in words
    assert "GPU minutes, in 2 runs. The optimizer was Muon for" in words
    assert (
        "with a rate of 0.002 at its peak after 400 steps. It started afresh" in words
    )
    assert "at step 150. 1 step was skipped" in words
    assert "on one NVIDIA H200 (commit def): 310 steps" in words
    small, large = (
        "4 videos of 25 x 16 x 24, 78 tokens",
        "2 videos of 25 x 32 x 48, 312",
    )
    assert f"| {small} | 100 | 140 ms |" in text
    assert f"| 2 of 3: {small}; 1 of 3: {large} tokens | 110 | 218 ms |" in text
    assert "held-out videos to 33.0 dB in the mean (34.7 for scenes" in words
    assert "| dense | 90.6 % | 75.0 % | - | 50.0 % |" in text
    assert "| the default at sparsity 0.9 | 87.5 % | 75.0 % |" in text
    assert "| 2 | 954 | 20 | 40 | 30 | 70 | 20 |" in text
    pictures.draw_losses(tmp_path / "loss.png", made["training"])
    pictures.draw_attention(tmp_path / "attention.png", made["attention"])
    assert (tmp_path / "attention.png").stat().st_size > 1000


def test_reports_of_a_size_make_one_table(folders):
    made = record.means_record(folders / "measured", commit="abc")
    assert list(made["sizes"]) == ["16x24"]  # the other has attention alone
    assert len(made["sizes"]["16x24"]["quality"]) == 6
    assert "config" not in made["sizes"]["16x24"]["quality"][0]
    text = document.means_section(made)
    head = "| method | sparsity 0.9 | sparsity 0.75 |\n| --- | --- | --- |\n"
    paper = (
        "| the paper's (`DraftConfig.paper()`) | 0.12: {} | 0.12: 13.3 (8.3), 0.500 |"
    )
    assert head + paper.format("99.0 (94.0), 0.500") in text
    assert "| `row_topk`, drafts of 2 x 4 | 0.12: 15.0 (10.0), 0.500 | - |" in text
    means = "spread, means of 2 x 2 over {} frames"
    assert f"| {means.format(8)} | 0.12: 18.0 (13.0)" in text
    assert f"| **{means.format(8)}, correction** | 0.12: 20.0 (15.0)" in text
    assert f"| {means.format(4)}, correction | 0.12: 21.0 (16.0)" in text
    assert "The default is in bold." in " ".join(text.split())


def test_a_table_without_the_default_has_nothing_in_bold(folders):
    made = record.means_record(folders / "measured", commit="abc")
    for size in made["sizes"].values():
        size["quality"] = [
            row for row in size["quality"] if row["trial"]["method"] != "default"
        ]
    text = document.means_section(made)
    assert "The default" not in text
    assert "| **" not in text


@pytest.mark.parametrize("page", document.PAGES, ids=lambda page: page.name)
def test_pages_are_what_the_records_make(page):
    assert document.written(page) == page.read_text()

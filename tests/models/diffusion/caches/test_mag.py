"""MagCache's list of skipped steps against the published loop over calls."""

import json

import numpy as np
import pytest

from draft_jax import AttentionPlan, DraftConfig
from models.diffusion.caches import (
    MagCache,
    MagRatios,
    RatiosError,
    published_ratios,
    read_ratios,
    write_ratios,
)
from models.diffusion.schedulers import FlowEuler, FlowUniPC
from tests.published_caches import magcache_interpolation, magcache_skips

NAMES = (
    "wan2.1-t2v-14b",
    "wan2.1-t2v-1.3b",
    "wan2.1-i2v-14b-480p",
    "wan2.1-i2v-14b-720p",
    "wan2.2-ti2v-5b-text",
    "wan2.2-ti2v-5b-image",
    "hunyuanvideo-720p",
    "hunyuanvideo-540p",
)
# Threshold, most skips and retention of the authors' scripts and READMEs.
SETTINGS = ((0.12, 2, 0.2), (0.12, 4, 0.2), (0.24, 6, 0.2), (0.06, 2, 0.2))


@pytest.mark.parametrize("num_steps", [50, 40, 25, 15], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_skipped_steps_are_those_of_the_published_loop(name, num_steps):
    ratios = published_ratios(name)
    branches = [magcache_interpolation(b, num_steps) for b in ratios.values]
    np.testing.assert_array_equal(ratios.at(num_steps), branches)
    for threshold, most, retention in SETTINGS:
        rule = MagCache(
            ratios=ratios, threshold=threshold, max_skips=most, retention=retention
        )
        expected = magcache_skips(
            branches, threshold, most, retention, inclusive=name.startswith("hunyuan")
        )
        assert (expected == expected[:, :1]).all()  # branches choose the same steps
        got = rule.skippable(num_steps)
        np.testing.assert_array_equal(got, expected[:, 0])


@pytest.mark.parametrize(
    ("name", "settings", "computed"),
    [
        (
            "wan2.1-t2v-14b",
            (0.12, 2),
            [*range(10), 12, 15, 18, 21, 24, 27, 30, 33, 36, 39, 42, 44, 46, 48, 49],
        ),
        (
            "wan2.1-t2v-1.3b",
            (0.12, 4),
            [*range(10), 14, 19, 24, 29, 34, 38, 41, 44, 46, 48, 49],
        ),
        ("wan2.1-t2v-14b", (0.24, 6), [*range(10), 16, 23, 30, 36, 41, 44, 47, 49]),
        (
            "wan2.1-i2v-14b-480p",
            (0.24, 6),
            [*range(8), 14, 20, 25, 30, 34, 37, 39],
        ),
    ],
)
def test_computed_steps_of_recommended_settings(name, settings, computed):
    """Simulated from the published lists, apart from this code and its tests."""
    threshold, most = settings
    ratios = published_ratios(name)
    rule = MagCache(ratios=ratios, threshold=threshold, max_skips=most)
    np.testing.assert_array_equal(
        np.flatnonzero(~rule.skippable(ratios.num_steps)), computed
    )


def ratios_of(*branches, **fields):
    return MagRatios(values=branches, model="a model", source="a test", **fields)


def test_counters_by_hand():
    """Errors 0.1, 0.1 + 0.19: the second exceeds 0.2, and the sums start anew."""
    ratios = ratios_of((1.0,) + (0.9,) * 7)
    rule = MagCache(ratios=ratios, threshold=0.2, max_skips=9, retention=0.0)
    expected = [False, True, False, True, False, True, False, True]
    np.testing.assert_array_equal(rule.skippable(8), expected)


def test_a_step_is_skipped_where_both_branches_would():
    good, bad = (1.0,) * 6, (1.0, 1.0, 2.0, 1.0, 1.0, 1.0)
    rule = MagCache(ratios=ratios_of(good, bad), max_skips=9, retention=0.0)
    np.testing.assert_array_equal(rule.skippable(6), [0, 1, 0, 1, 1, 1])


def test_a_start_amid_a_step_is_rounded_up():
    """0.3 of 10 calls are 3: the step of calls 2 and 3 is computed."""
    rule = MagCache(ratios=ratios_of((1.0,) * 5, (1.0,) * 5), retention=0.3)
    np.testing.assert_array_equal(rule.skippable(5), [0, 0, 1, 1, 0])


def test_experts_start_anew():
    """Two of six steps are retained, of each expert; sums do not cross the switch."""
    rule = MagCache(ratios=ratios_of((1.0,) * 12), max_skips=9, retention=1 / 3)
    switched = rule.skippable(12, expert_starts=(0, 6))
    np.testing.assert_array_equal(switched, [0, 0, 1, 1, 1, 1] * 2)
    np.testing.assert_array_equal(rule.skippable(12), [0] * 4 + [1] * 8)


def test_first_step_is_always_computed():
    rule = MagCache(ratios=ratios_of((1.0,)), retention=0.0)
    np.testing.assert_array_equal(rule.skippable(4), [0, 1, 1, 0])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"threshold": 0.0}, "threshold=0.0 must be a positive"),
        ({"threshold": float("nan")}, "threshold=nan must be"),
        ({"max_skips": 0}, "max_skips=0 must be an integer >= 1"),
        ({"retention": 1.5}, r"retention=1.5 must be in \[0, 1\]"),
    ],
)
def test_bad_constants(fields, message):
    with pytest.raises(ValueError, match=message):
        MagCache(ratios=ratios_of((1.0,)), **fields)


@pytest.mark.parametrize(
    ("branches", "message"),
    [
        ((), "one or two branches"),
        (((1.0,), (1.0, 1.0)), r"\[1, 2\] steps"),
        (((1.0, -0.5),), "-0.5; expected positive"),
        (((float("nan"),),), "nan; expected positive"),
    ],
)
def test_bad_ratios(branches, message):
    with pytest.raises(ValueError, match=message):
        ratios_of(*branches)


def test_unknown_published_list():
    with pytest.raises(ValueError, match=r"name='wan3' must be one of wan2\.1"):
        published_ratios("wan3")


def test_notes_on_another_run():
    rule = MagCache(ratios=ratios_of((1.0,) * 4, shift=5.0))
    assert rule.notes(FlowUniPC(num_steps=4, shift=5.0), AttentionPlan.dense()) == []
    sparse = AttentionPlan.draft(DraftConfig.paper(sparsity=0.9))
    (note,) = rule.notes(FlowEuler(num_steps=8, shift=3.0), sparse)
    for words in (
        "of 4 steps, and the nearest ones are taken for 8",
        "of shift 5, not 3",
        "belong to dense attention, not percentile sparse (90 %)",
        "draft-video calibrate",
    ):
        assert words in note
    (note,) = rule.notes(FlowUniPC(num_steps=4, shift=5.0), sparse)
    assert "steps" not in note
    assert "shift" not in note


def test_ratios_are_written_and_read(tmp_path):
    ratios = ratios_of((1.0, 0.5), (1.0, 0.25), shift=3.0, num_layers=8)
    path = tmp_path / "ratios.json"
    write_ratios(path, ratios, {"prompt": "a red ball"})
    assert read_ratios(path) == ratios
    assert json.loads(path.read_text())["prompt"] == "a red ball"


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"format": "another"}',
        '{"format": "draft-video magnitude ratios, 1", "ratios": {"values": [["x"]]}}',
        '{"format": "draft-video magnitude ratios, 1", "ratios": {"values": [[1.0]]}}',
    ],
)
def test_damaged_files_of_ratios(tmp_path, content):
    path = tmp_path / "ratios.json"
    path.write_text(content)
    with pytest.raises(RatiosError, match=r"ratios\.json holds no ratios .*calibrate"):
        read_ratios(path)

"""`--cache` and `draft-video calibrate`, from arguments to files."""

import dataclasses
import json

import numpy as np
import pytest

from models.cli import main
from models.cli.cache_options import CacheRequest, parse_cache
from models.cli.caching import cache_from, describe_cache
from models.cli.parser import build_parser
from models.diffusion.caches import (
    EasyCache,
    MagCache,
    MagRatios,
    published_ratios,
    write_ratios,
)
from models.diffusion.sampling import Sampling
from models.hunyuan.config import HunyuanConfig
from models.hunyuan.loading import HunyuanInfo
from models.mini.family import describe_mini
from models.wan.config import WanConfig
from models.wan.loading import WanInfo
from tests import tiny_model

PROMPT = "a red ball"
SMALL = ("--size", "48x32", "--frames", "3", "--steps", "6")
RATIOS = MagRatios(
    values=((1.0,) + (0.99,) * 5,) * 2, model="shipped", source="a test", num_layers=3
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    return str(tiny_model.save_checkpoint(folder))


def parse(*options):
    return build_parser().parse_args(["generate", PROMPT, *options])


def wan_info(config):
    """The settings that ratios are chosen by: sizes alone are read."""
    fields = dict.fromkeys(field.name for field in dataclasses.fields(WanInfo))
    return _bare(WanInfo, fields | {"config": config})


def hunyuan_info(config):
    return _bare(HunyuanInfo, {"config": config})


def _bare(kind, fields):
    info = object.__new__(kind)
    for name, value in fields.items():
        object.__setattr__(info, name, value)
    return info


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("easy", CacheRequest("easy")),
        ("easy:0.1", CacheRequest("easy", (("threshold", 0.1),))),
        (
            "mag:0.24,6,0.1",
            CacheRequest(
                "mag", (("threshold", 0.24), ("max_skips", 6), ("retention", 0.1))
            ),
        ),
    ],
)
def test_rules_and_values(text, expected):
    assert parse_cache(text) == expected
    assert str(expected) == text


def test_help_shows_the_defaults_of_the_rules(capsys):
    easy, mag = EasyCache(), MagCache(ratios=RATIOS)
    assert main(["generate", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"({easy.threshold:g},{easy.first_steps} if left out)" in shown
    assert f"({mag.threshold:g},{mag.max_skips},{mag.retention:g})" in shown


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("fast", "'fast' must be one of easy, mag"),
        ("easy:0.1,2,3", "the values of easy are threshold, first_steps"),
        ("mag:much", "the values of mag are threshold, max_skips, retention"),
        ("mag:0.1,2.5", "numbers with commas between"),
        ("mag:", "numbers with commas between"),
    ],
)
def test_bad_rules_are_told_in_one_line(capsys, text, words):
    assert main(["generate", PROMPT, "--cache", text]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--cache", "easy:0"), "--cache easy:0: threshold=0.0 must be a positive"),
        (("--cache", "mag:0.1,0"), "--cache mag:0.1,0: no ratios are published"),
        (("--cache-ratios", "a.json"), "--cache-ratios a.json fits --cache mag only"),
        (
            ("--cache", "easy", "--cache-ratios", "a.json"),
            "--cache-ratios a.json fits --cache mag only",
        ),
        (("--cache", "mag", "--cache-ratios", "no/file.json"), "no/file.json"),
    ],
)
def test_caches_that_cannot_be_are_refused_before_any_work(
    checkpoint, tmp_path, capsys, options, words
):
    command = ["generate", PROMPT, "--checkpoint", checkpoint, *SMALL, *options]
    assert main([*command, "--output", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert not (tmp_path / "out").exists()


def test_constants_reach_the_rule(tmp_path):
    file = tmp_path / "ratios.json"
    write_ratios(file, RATIOS, {})
    info, sampling = describe_mini(None), Sampling()
    easy = cache_from(parse("--cache", "easy:0.1,4"), info, sampling)
    assert easy == EasyCache(threshold=0.1, first_steps=4)
    given = parse("--cache", "mag:0.2,3,0.4", "--cache-ratios", str(file))
    mag = cache_from(given, info, sampling)
    assert mag == MagCache(ratios=RATIOS, threshold=0.2, max_skips=3, retention=0.4)
    assert cache_from(parse(), info, sampling) is None
    assert describe_cache(given, mag, Sampling(num_steps=6)) == [
        "cache: MagCache skips 3 of 6 steps, by ratios of shipped"
    ]
    elsewhere = parse("--checkpoint", "another", "--cache-ratios", str(file))
    note = describe_cache(elsewhere, mag, sampling)[-1]
    assert note == "cache: the ratios are of another checkpoint than another"


@pytest.mark.parametrize(
    ("info", "size", "name"),
    [
        (wan_info(WanConfig.t2v_1_3b()), (480, 832), "wan2.1-t2v-1.3b"),
        (wan_info(WanConfig.t2v_14b(tile=(4, 8))), (720, 1280), "wan2.1-t2v-14b"),
        (wan_info(WanConfig.i2v_14b()), (832, 480), "wan2.1-i2v-14b-480p"),
        (wan_info(WanConfig.i2v_14b()), (720, 1280), "wan2.1-i2v-14b-720p"),
        (hunyuan_info(HunyuanConfig.video_13b()), (544, 960), "hunyuanvideo-540p"),
        (hunyuan_info(HunyuanConfig.video_13b()), (720, 1280), "hunyuanvideo-720p"),
        (wan_info(WanConfig.ti2v_5b()), (704, 1280), "wan2.2-ti2v-5b-text"),
        (wan_info(WanConfig.mini()), (480, 832), None),
        (wan_info(WanConfig.t2v_14b(num_layers=39)), (720, 1280), None),
        (hunyuan_info(HunyuanConfig.custom_13b()), (720, 1280), None),
    ],
    ids=lambda value: str(value) if isinstance(value, str | tuple) else "",
)
def test_published_ratios_are_those_of_the_models_sizes(info, size, name):
    sampling = Sampling(height=size[0], width=size[1])
    expected = None if name is None else published_ratios(name)
    assert info.mag_ratios(sampling, from_image=False) == expected


@pytest.mark.nightly
def test_calibrated_ratios_are_taken_and_the_report_tells_the_work(
    checkpoint, tmp_path, capsys
):
    ratios = tmp_path / "ratios.json"
    options = [PROMPT, "--checkpoint", checkpoint, *SMALL]
    assert main(["calibrate", *options, "--output", str(ratios)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == str(ratios)
    assert any(line.startswith("--cache mag:0.12,2 skips ") for line in printed)
    written = json.loads(ratios.read_text())
    assert np.shape(written["ratios"]["values"]) == (2, 6)
    assert written["ratios"]["num_layers"] == 3
    assert written["prompt"] == PROMPT
    assert main(["calibrate", *options, "--output", str(ratios)]) == 2  # it exists
    cache = ["--cache", "mag:9,2,0.4", "--cache-ratios", str(ratios)]
    folder = tmp_path / "run"
    assert main(["generate", *options, *cache, "--output", str(folder)]) == 0
    assert "cache: MagCache skips 3 of 6 steps" in capsys.readouterr().out
    report = json.loads((folder / "report.json").read_text())
    skipped = [work == "skipped" for work in report["work_per_step"]]
    assert skipped == [False, False, True, True, False, True]
    assert report["cache"]["threshold"] == 9
    assert report["skipped_steps"] == 3
    kept = np.array(report["kept_share_per_step_and_layer"])
    np.testing.assert_array_equal((kept == 0).all(1), skipped)


@pytest.mark.nightly
def test_comparison_leaves_the_dense_run_whole(checkpoint, tmp_path):
    command = ["generate", PROMPT, "--checkpoint", checkpoint, *SMALL, "--compare"]
    cache = ["--cache", "easy:9,2", "--output", str(tmp_path)]
    assert main([*command, *cache]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["dense"]["work_per_step"] == ["dense"] * 6
    assert report["sparse"]["skipped_steps"] == report["skipped_steps"] == 3


@pytest.mark.nightly
def test_dense_runs_with_a_cache_have_the_picture(checkpoint, tmp_path):
    command = ["generate", PROMPT, "--checkpoint", checkpoint, *SMALL, "--dense"]
    cache = ["--cache", "easy:9,2", "--output", str(tmp_path)]
    assert main([*command, *cache]) == 0
    assert (tmp_path / "kept_share.png").exists()

"""Detectors of colour, motion and direction, on rendered scenes and on drawn tracks."""

import functools

import jax
import numpy as np
import pytest

from models.mini.captions import COLOURS
from models.mini.faithfulness import Finding, Track, classify, detect
from models.mini.prompt_scores import find_all, score
from models.mini.prompts import KINDS, held_out_prompts, read_prompt
from models.mini.renderer import device_sources, render_procedural
from models.mini.scenes import draw_procedural, is_held_out
from tests.synthetic_sources import make_sources

SCENES, BATCH = 72, 12


@pytest.mark.nightly
def test_detectors_are_right_on_rendered_scenes():
    scenes = read_scenes(SCENES)
    prompts = [prompt for prompt, _ in scenes]
    sources = device_sources(make_sources())
    render = jax.jit(functools.partial(render_procedural, height=96, width=128))
    findings = []
    for start in range(0, SCENES, BATCH):
        rows = [arrays for _, arrays in scenes[start : start + BATCH]]
        stacked = {
            name: np.stack([row[name] for row in rows]).astype(
                np.int32 if rows[0][name].dtype.kind == "i" else np.float32
            )
            for name in rows[0]
        }
        findings += find_all(np.asarray(render(stacked, sources)))
    shares = score(prompts, findings)
    wrong = [
        (prompt.text, seen)
        for prompt, seen in zip(prompts, findings, strict=True)
        if (prompt.colour, prompt.kind) != (seen.colour, seen.kind)
    ]
    assert {prompt.kind for prompt in prompts} == set(KINDS.values())
    assert shares["colour"] >= 0.95, wrong
    assert shares["motion"] >= 0.95, wrong
    assert shares["direction"] >= 0.95, wrong


def read_scenes(count):
    """Scenes whose captions detectors are made for, as equal in kinds as they come."""
    rng, scenes = np.random.default_rng(5), []
    most = dict.fromkeys(KINDS.values(), -(-count // len(set(KINDS.values()))) + 2)
    while len(scenes) < count:
        caption, arrays = draw_procedural(rng, 25)
        prompt = read_prompt(caption)
        if prompt is not None and most[prompt.kind]:
            most[prompt.kind] -= 1
            scenes.append((prompt, arrays))
    return scenes


def test_held_out_prompts_are_read_back_and_balanced():
    prompts = held_out_prompts(64)
    assert len({prompt.text for prompt in prompts}) == 64
    for prompt in prompts:
        assert is_held_out(prompt.colour, prompt.shape, prompt.motion)
        assert read_prompt(prompt.text) == prompt
    for group in (COLOURS, set(KINDS.values())):
        counts = [
            sum(name in (prompt.colour, prompt.kind) for prompt in prompts)
            for name in group
        ]
        assert min(counts) >= 5
    assert 16 <= sum(prompt.calm for prompt in prompts) <= 48
    assert held_out_prompts(8) == prompts[:8]
    with pytest.raises(ValueError, match=r"count=10000 must be from 1 to"):
        held_out_prompts(10_000)


TIME = np.linspace(0.0, 1.0, 25)
STILL = np.full(25, 0.5)


@pytest.mark.parametrize(
    ("x", "y", "area", "expected"),
    [
        (STILL, STILL, STILL, ("rest", None)),
        (0.2 + TIME, STILL, STILL, ("travel", 1)),
        (1.1 - TIME, 0.8 - abs(np.sin(9 * TIME)) / 3, STILL, ("bounce", -1)),
        (STILL, 0.8 - abs(np.sin(9 * TIME)) / 3, STILL, ("bounce", None)),
        (STILL, 0.1 + TIME**2 * 0.8, STILL, ("fall", None)),
        (STILL, 0.9 - TIME * 0.8, STILL, ("rise", None)),
        (STILL, STILL, 0.01 + 0.1 * TIME**2, ("grow", None)),
        (STILL, STILL, 0.11 - 0.1 * TIME, ("shrink", None)),
        (
            0.6 + 0.25 * np.cos(6.5 * TIME),
            0.5 + 0.25 * np.sin(6.5 * TIME),
            STILL,
            ("circle", None),
        ),
    ],
    ids=["rest", "right", "bounce_left", "bounce", "fall", "rise", "grow", "shrink",
         "circle"],
)  # fmt: skip
def test_tracks_are_told_apart(x, y, area, expected):
    assert classify(Track(frame=np.arange(25.0), x=x, y=y, area=area)) == expected


def test_an_even_video_shows_nothing():
    video = np.full((5, 24, 32, 3), 0.4, np.float32)
    assert detect(video) == Finding(colour=None, kind=None, way=None)


def test_scores_count_what_is_right():
    prompts = held_out_prompts(4)
    right = [Finding(colour=p.colour, kind=p.kind, way=p.way) for p in prompts]
    assert score(prompts, right)["motion"] == score(prompts, right)["colour"] == 1.0
    wrong = [Finding(colour=None, kind=p.kind, way=None) for p in prompts]
    with_way = sum(p.way is not None for p in prompts)
    found = score(prompts, wrong)
    assert (found["colour"], found["motion"]) == (0.0, 1 - with_way / 4)
    assert found["prompts_with_direction"] == with_way > 0

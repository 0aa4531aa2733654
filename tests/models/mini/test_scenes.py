"""Scenes and captions: vocabulary, determinism, and where things are."""

import itertools

import numpy as np
import pytest

from models.mini import scenes
from models.mini.captions import (
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    SHAPES,
    SIZES,
    WAYS,
)
from models.mini.scenes import (
    ASPECT,
    DURATION,
    FRAME_RATE,
    Mix,
    all_captions,
    draw_clip,
    draw_picture,
    draw_procedural,
    is_held_out,
    move,
    sample_batch,
)
from models.mini.sources import CLIP_PARTS, PICTURES
from models.mini.text import Vocabulary, split_words

DRAWS = 1500


@pytest.fixture(scope="module")
def procedural() -> list:
    rng = np.random.default_rng(1)
    return [draw_procedural(rng, 25) for _ in range(DRAWS)]


def test_vocabulary_has_every_word_and_captions_fit(procedural):
    rng = np.random.default_rng(2)
    captions = [caption for caption, _ in procedural]
    for draw in (draw_picture, draw_clip):
        captions += [draw(rng, 25)[0] for _ in range(300)]
    vocabulary = Vocabulary.from_captions(all_captions())
    _, lengths, unknown = vocabulary.encode(captions)
    assert not [words for words in unknown if words]
    assert max(len(split_words(caption)) for caption in captions) <= 32
    assert min(lengths) >= 1


def test_every_kind_of_thing_appears(procedural):
    text = " ".join(caption for caption, _ in procedural)
    phrases = [*COLOURS, *filter(None, SIZES), *WAYS.values()]
    phrases += [nouns[0] for nouns in SHAPES.values()]
    phrases += [said[0].replace(" {way}", "") for said in MOTIONS.values()]
    assert not [phrase for phrase in phrases if phrase not in text]
    backgrounds = {int(arrays["background"]) for _, arrays in procedural}
    assert backgrounds == set(range(len(BACKGROUNDS)))


def test_equal_seeds_equal_batches():
    mix = Mix(procedural=5, pictures=3, clips=2)
    first, second = (sample_batch((7, 3), mix, 8) for _ in range(2))
    other = sample_batch((7, 4), mix, 8)
    assert first[0] == second[0] != other[0]
    assert len(first[0]) == 10
    for ours, theirs, count in zip(first[1:], second[1:], (5, 3, 2), strict=True):
        for name, values in ours.items():
            np.testing.assert_array_equal(values, theirs[name])
            assert len(values) == count
            assert values.dtype in (np.float32, np.int32)


@pytest.mark.parametrize("batch", [1, 4, 32, 96])
def test_mix_adds_up(batch):
    mix = Mix.of(batch)
    assert mix.procedural + mix.pictures + mix.clips == batch
    shares = np.array([mix.procedural, mix.pictures, mix.clips]) / batch
    assert np.abs(shares - (0.70, 0.22, 0.08)).max() < 0.5 / batch + 0.5 / batch


def test_captions_say_which_way_things_move(procedural):
    seen = {-1: 0, 1: 0}
    for caption, arrays in procedural:
        if " and " in caption or "stripes" in caption:
            continue
        for way, phrase in WAYS.items():
            if phrase in caption:
                x = arrays["x"][0]
                assert np.sign(x[-1] - x[0]) == way, caption
                seen[way] += 1
    assert min(seen.values()) > 50


@pytest.mark.parametrize(
    ("words", "check"),
    [
        ("falls down", lambda a: (np.diff(a["y"][0]) >= -1e-6).all()),
        ("floats up", lambda a: (np.diff(a["y"][0]) < 0).all()),
        ("grows", lambda a: (np.diff(a["radius"][0]) > 0).all()),
        ("shrinks", lambda a: (np.diff(a["radius"][0]) < 0).all()),
        ("rests", lambda a: np.ptp(a["x"][0]) == np.ptp(a["y"][0]) == 0),
        ("moves in a circle", lambda a: abs(np.ptp(a["x"][0])) > 0.05),
    ],
)
def test_motion_is_what_the_caption_says(procedural, words, check):
    found = [
        (caption, arrays)
        for caption, arrays in procedural
        if words in caption and " and " not in caption
    ]
    assert found
    assert not [caption for caption, arrays in found if not check(arrays)]


def test_adverbs_change_the_speed(procedural):
    travelled = {"slowly": [], "quickly": [], "": []}
    for caption, arrays in procedural:
        if " and " not in caption and ("slides" in caption or "moves to" in caption):
            words = [word for word in travelled if word in caption.split()] or [""]
            travelled[words[0]].append(np.ptp(arrays["x"][0]))
    slow, usual, quick = (np.mean(travelled[w]) for w in ("slowly", "", "quickly"))
    # Spans that start from the same draws: their means are those of the speeds.
    assert slow < 0.7 * usual
    assert quick > 1.3 * usual


def test_held_out_combinations_are_never_drawn(monkeypatch):
    motions = []

    def note(rng, motion, *rest):
        motions.append(motion)
        return move(rng, motion, *rest)

    monkeypatch.setattr(scenes, "move", note)
    names = {tuple(np.float64(colour)): name for name, colour in COLOURS.items()}
    count = 0
    for seed in range(300):
        motions.clear()
        _, arrays = draw_procedural(np.random.default_rng(seed), 4)
        parts = zip(motions, arrays["shape"], arrays["colour"], strict=False)
        for motion, shape, colour in parts:
            drawn = names[tuple(np.float64(colour))], list(SHAPES)[shape], motion
            assert not is_held_out(*drawn), drawn
            count += 1
    assert count > 200
    every = list(itertools.product(COLOURS, SHAPES, MOTIONS))
    assert 0.08 < np.mean([is_held_out(*each) for each in every]) < 0.17


def test_wide_frames_are_filled():
    rng = np.random.default_rng(3)
    drawn = [draw_procedural(rng, 9, 2.0)[1]["x"][0] for _ in range(300)]
    ends = np.concatenate([x[x > -5] for x in drawn])
    assert ends.max() > 1.8


def test_rolling_turns_as_far_as_it_travels(procedural):
    found = 0
    for caption, arrays in procedural:
        if "rolls" in caption and " and " not in caption:
            x, angle, radius = (arrays[name][0] for name in ("x", "angle", "radius"))
            np.testing.assert_allclose(
                np.diff(angle) * radius[1:], np.diff(x), atol=1e-6
            )
            found += 1
    assert found > 5


def test_objects_are_in_the_frame_at_some_time(procedural):
    found = 0
    for caption, arrays in procedural:
        for x, y, colour in zip(
            arrays["x"], arrays["y"], arrays["colour"], strict=True
        ):
            if colour.any():
                inside = (x > 0) & (x < ASPECT) & (y > 0) & (y < 1)
                assert inside.any(), caption
                found += 1
    assert found > DRAWS // 2


def test_colours_are_those_named(procedural):
    found = 0
    for caption, arrays in procedural:
        first = caption.split(" and ")[0]
        named = [name for name in COLOURS if f" {name} " in first.split(" in front")[0]]
        on_place = ("background", "stripes", "sea", "grass", "meadow", "sky")
        if len(named) == 1 and not any(word in first for word in on_place):
            shown = arrays["colour"][0]
            if shown.any() and "wall" not in caption:
                np.testing.assert_allclose(shown, COLOURS[named[0]], err_msg=caption)
                found += 1
    assert found > 20


@pytest.mark.parametrize("frames", [2, 8, 25])
def test_short_videos_are_parts_of_long_ones(frames):
    for _, arrays in (
        draw_procedural(np.random.default_rng(s), frames) for s in range(50)
    ):
        times = arrays["times"]
        assert len(times) == frames
        assert times[0] >= 0.0
        assert times[-1] <= DURATION
        np.testing.assert_allclose(np.diff(times), 1 / FRAME_RATE)


def test_pictures_and_clips_stay_within_their_sources():
    rng = np.random.default_rng(5)
    for _ in range(200):
        caption, arrays = draw_picture(rng, 25)
        assert 0 <= arrays["picture"].min() <= arrays["picture"].max() < len(PICTURES)
        is_cut = "then a cut to" in caption
        assert (len(set(arrays["picture"])) == 2) == is_cut
        if "zooms in" in caption or "zoom into" in caption:
            assert (np.diff(arrays["path"][:, 2]) >= 0).all()
        _, arrays = draw_clip(rng, 25)
        assert 0 <= arrays["frame"].min() <= arrays["frame"].max() < 132
        assert (np.diff(arrays["frame"]) >= 0).all()
    assert max(last for _, last, _ in CLIP_PARTS) == 132

"""Draws scenes and their captions at random, on the host, in plain NumPy.

Only parameters are made here, a few hundred numbers per video; the pixels are
rendered where the model trains. Nothing here imports JAX, so worker processes
start fast.

Lengths are in frame heights, y grows downwards, x runs from 0 to the frame's aspect,
width over height; times are seconds.
"""

import dataclasses
import zlib
from typing import Any

import numpy as np

from models.mini.captions import (
    BACKGROUND_IDS,
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    PLAIN_SHAPES,
    ROUND_SHAPES,
    SHAPE_IDS,
    SHAPES,
    SHOTS,
    SIZES,
    STEADY_MOTIONS,
    WAYS,
    Background,
    all_phrases,
)
from models.mini.sources import CLIP_PARTS, CLIP_RATE, PICTURES

ASPECT = 4.0 / 3.0  # of the demo's frames
FRAME_RATE = 12.0
FULL_FRAMES = 25
DURATION = (FULL_FRAMES - 1) / FRAME_RATE
NUM_OBJECTS = 2
# What an adverb does to the time of a motion; the empty one is the usual tempo.
TEMPO_SPEEDS: dict[str, float] = {"slowly": 0.5, "": 1.0, "quickly": 1.6}
# One of so many colours, shapes and motions together is never trained upon.
HELD_OUT_ONE_OF = 8

Arrays = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mix:
    """The number of videos of each kind in a batch."""

    procedural: int
    pictures: int
    clips: int

    @classmethod
    def of(cls, batch: int) -> "Mix":
        """Returns the mix that models are trained with: about 70, 22 and 8 %."""
        pictures, clips = round(batch * 0.22), round(batch * 0.08)
        return cls(procedural=batch - pictures - clips, pictures=pictures, clips=clips)


def all_captions() -> list[str]:
    """Returns phrases that together hold every word a caption can have."""
    subjects = [subject for picture in PICTURES for subject in picture.subjects]
    clips = [caption for *_, captions in CLIP_PARTS for caption in captions]
    return all_phrases() + subjects + clips


def sample_batch(
    seed: tuple[int, ...], mix: Mix, frames: int, aspect: float = ASPECT
) -> tuple[list[str], Arrays, Arrays, Arrays]:
    """Draws one batch.

    Args:
      seed: Any integers; equal seeds give equal batches.
      mix: Videos of each kind.
      frames: Frames of each video; fewer than 25 are a part of a longer motion.
      aspect: Width of the frames over their height.

    Returns:
      captions of all videos, procedural ones first, then pictures, then clips;
      and the parameters of each kind, float32 or int32 arrays with a leading axis.
    """
    rng = np.random.default_rng(seed)
    drawn = [
        [draw(rng, frames, aspect) for _ in range(count)]
        for draw, count in (
            (draw_procedural, mix.procedural),
            (draw_picture, mix.pictures),
            (draw_clip, mix.clips),
        )
    ]
    captions = [caption for group in drawn for caption, _ in group]
    stacked = [_stack([arrays for _, arrays in group]) for group in drawn]
    return captions, stacked[0], stacked[1], stacked[2]


def _stack(rows: list[Arrays]) -> Arrays:
    stacked = {}
    for name in rows[0] if rows else ():
        values = np.stack([row[name] for row in rows])
        kind = np.int32 if values.dtype.kind == "i" else np.float32
        stacked[name] = values.astype(kind)
    return stacked


def _pick(rng: np.random.Generator, choices):
    return choices[int(rng.integers(len(choices)))]


def _times(rng: np.random.Generator, frames: int) -> np.ndarray:
    start = int(rng.integers(max(FULL_FRAMES - frames, 0) + 1))
    return (start + np.arange(frames)) / FRAME_RATE


def is_held_out(colour: str, shape: str, motion: str) -> bool:
    """Returns whether training never sees this motion of this shape in this colour.

    Such prompts show whether a model joins what it has learned apart.
    """
    # crc32, because Python's own hash changes from run to run.
    key = f"{colour}, {shape}, {motion}".encode()
    return zlib.crc32(key) % HELD_OUT_ONE_OF == 0


def draw_procedural(
    rng: np.random.Generator, frames: int, aspect: float = ASPECT
) -> tuple[str, Arrays]:
    """Draws a scene of moving objects in front of a background."""
    times = _times(rng, frames)
    background = _pick(rng, BACKGROUNDS)
    first, second = rng.choice(list(COLOURS), 2, replace=False)
    horizon = rng.uniform(0.5, 0.62)
    count = int(rng.choice([0, 1, 2], p=[0.14, 0.66, 0.2]))
    if background.name == "plain":
        count = max(count, 1)
    objects = []
    for slot in range(count):
        # Two objects share the width, so that both can be seen.
        span = (
            (0.0, aspect)
            if count == 1
            else (aspect / 2 * slot, aspect / 2 * (slot + 1))
        )
        objects.append(
            _draw_object(rng, background, horizon, times, span, count, first)
        )
    place = _pick(rng, background.places).format(a=first, b=second)
    if objects:
        caption = " and ".join(phrase for phrase, _ in objects)
        if rng.random() > 0.08:
            caption = f"{caption} {place}"
    else:
        caption = _pick(rng, background.alone).format(a=first, b=second)
    arrays = [arrays for _, arrays in objects]
    arrays += [_no_object(frames)] * (NUM_OBJECTS - count)
    merged = {name: np.stack([each[name] for each in arrays]) for name in arrays[0]}
    return caption, merged | {
        "background": np.int32(BACKGROUND_IDS[background.name]),
        "colour_a": np.array(COLOURS[first]),
        "colour_b": np.array(COLOURS[second]),
        "horizon": np.array(horizon),
        "times": times,
        "random": rng.uniform(0.0, 1.0, 4),
    }


def _draw_object(
    rng: np.random.Generator,
    background: Background,
    horizon: float,
    times: np.ndarray,
    span: tuple[float, float],
    count: int,
    backdrop: str,
) -> tuple[str, Arrays]:
    # An object on a plain background of its own colour could not be seen.
    hidden = backdrop if background.name in ("plain", "stripes") else ""
    colours = [name for name in COLOURS if name != hidden]
    while True:
        shape, motion = _draw_shape(rng, background)
        colour = _pick(rng, colours)
        if not is_held_out(colour, shape, motion):
            break
    tempo = "" if motion in STEADY_MOTIONS else str(rng.choice(list(TEMPO_SPEEDS)))
    size = str(rng.choice(list(SIZES), p=[0.2, 0.5, 0.3]))
    radius = rng.uniform(*SIZES[size]) * (1.0 if count == 1 else 0.8)
    if shape in ("horse", "car", "boat", "balloon"):
        radius = min(radius * 1.15, 0.26)
    if background.has_ground:
        ground = rng.uniform(max(horizon + 0.12, 2 * radius + 0.05), 0.93)
    elif motion == "sail":
        ground = horizon + 0.16
    else:
        ground = rng.uniform(0.8, 0.93)
    way = int(rng.choice([-1, 1]))
    # About the middle, so that parts of a video show what their caption says.
    moved = DURATION / 2 + (times - DURATION / 2) * TEMPO_SPEEDS[tempo]
    x, y, angle, scale = move(rng, motion, moved, radius, ground, span, way)
    phrase = _pick(rng, MOTIONS[motion]).format(way=WAYS[way])
    phrase = f"{phrase} {tempo}".strip()
    noun = _pick(rng, SHAPES[shape])
    words = [size, colour if rng.random() > 0.06 else "", noun]
    noun_phrase = " ".join(word for word in words if word)
    article = "an" if noun_phrase[0] in "aeiou" else "a"
    return f"{article} {noun_phrase} {phrase}", {
        "shape": np.int32(SHAPE_IDS[shape]),
        "colour": np.array(COLOURS[colour]),
        "x": x,
        "y": y,
        "angle": angle,
        "radius": radius * scale,
        "ground": np.array(ground if background.has_ground else -1.0),
        "way": np.array(float(way)),
    }


def _draw_shape(rng: np.random.Generator, background: Background) -> tuple[str, str]:
    """Draws a shape and a motion that make sense in front of the background."""
    special = rng.random()
    if background.has_ground and special < 0.14:
        return "horse", "gallop"
    if background.has_ground and special < 0.28:
        return "car", "drive"
    if background.name in ("sea", "sunset") and special < 0.4:
        return "boat", "sail"
    if background.has_sky and special > 0.88:
        return "balloon", str(rng.choice(["rise", "slide"]))
    shape = _pick(rng, PLAIN_SHAPES)
    motions = [
        "bounce",
        "bounce_way",
        "slide",
        "fall",
        "grow",
        "shrink",
        "rest",
        "spin",
    ]
    if shape in ROUND_SHAPES and background.has_ground:
        motions += ["roll", "roll"]
    if not background.has_ground:
        motions += ["rise", "circle", "circle", "swing", "spin"]
    if shape in ("ball", "ring"):  # their turning cannot be seen
        motions = [motion for motion in motions if motion != "spin"]
    return shape, str(rng.choice(motions))


def _no_object(frames: int) -> Arrays:
    still = np.zeros(frames)
    return {
        "shape": np.int32(0),
        "colour": np.zeros(3),
        "x": still - 9.0,
        "y": still - 9.0,
        "angle": still,
        "radius": still + 0.1,
        "ground": np.array(-1.0),
        "way": np.array(1.0),
    }


def move(
    rng: np.random.Generator,
    motion: str,
    times: np.ndarray,
    radius: float,
    ground: float,
    span: tuple[float, float],
    way: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns centre x and y, angle, and size factor at each time.

    Args:
      rng: Draws what the motion leaves open, such as its height.
      motion: A key of `MOTIONS`.
      times: Seconds, from 0 to `DURATION` at the usual tempo.
      radius: Radius of the object.
      ground: Height that it rests on.
      span: Left and right end of its part of the frame.
      way: -1 for the left, 1 for the right.
    """
    left, right = span
    low, high = min(left + radius, right - radius), max(left + radius, right - radius)
    low, high = (low, high) if left + radius <= right - radius else (high, high)
    middle = rng.uniform(low + 0.25 * (high - low), high - 0.25 * (high - low))
    still = np.zeros_like(times)
    x, y, angle, scale = still + middle, still + ground - radius, still, still + 1.0
    share = times / DURATION
    travel = (high - low) * rng.uniform(0.75, 1.05) + 0.1
    crossing = (low + high) / 2 + way * travel * (share - 0.5)
    if motion in ("bounce", "bounce_way"):
        period, phase = rng.uniform(0.7, 1.1), rng.uniform()
        height = rng.uniform(0.25, max(ground - 2 * radius - 0.02, 0.26))
        y = y - height * np.abs(np.sin(np.pi * (times / period + phase)))
        x = crossing if motion == "bounce_way" else x
    elif motion in ("roll", "slide", "drive"):
        x = crossing
        angle = way * travel * share / radius if motion == "roll" else angle
    elif motion == "gallop":
        beat = 2 * np.pi * times * rng.uniform(1.8, 2.4)
        x, y = crossing, y - 0.035 * np.abs(np.sin(beat))
        angle = 0.09 * np.sin(2 * beat)
    elif motion == "sail":
        beat = np.pi * times * rng.uniform(0.8, 1.2)
        x, y = crossing, y + 0.012 * np.sin(2 * beat)
        angle = 0.07 * np.sin(beat)
    elif motion == "fall":
        start = rng.uniform(-0.2, 0.1)
        y = np.minimum(start + 0.6 * np.maximum(times, 0) ** 2, ground - radius)
    elif motion == "rise":
        y = 1.0 - radius * 0.5 - share * rng.uniform(0.65, 0.95)
        x = x + 0.03 * np.sin(2.5 * times)
    elif motion == "circle":
        orbit = min(0.45 - radius / 2, (right - left) / 2 - radius, 0.28)
        turn = way * 2 * np.pi * (times * rng.uniform(0.4, 0.6) + rng.uniform())
        x, y = middle + orbit * np.cos(turn), 0.5 + orbit * np.sin(turn)
    elif motion == "spin":
        angle = way * times * rng.uniform(2.5, 4.5)
    elif motion in ("grow", "shrink"):
        ramp = np.clip(0.35 + 0.75 * share, 0.15, 1.3)
        scale = ramp if motion == "grow" else 1.45 - ramp
        y = ground - radius * scale if ground > 0 else y
    elif motion == "swing":
        swing = 0.8 * np.sin(2 * np.pi * times * rng.uniform(0.45, 0.6))
        length = 0.6
        x, y = middle + length * np.sin(swing), -0.05 + length * np.cos(swing)
        angle = -swing
    return x, y, angle, scale


def _subject(rng: np.random.Generator, picture: int) -> str:
    subjects = PICTURES[picture].subjects
    # The usual name gets half of the captions.
    return subjects[0] if rng.random() < 0.5 else _pick(rng, subjects)


def draw_picture(
    rng: np.random.Generator, frames: int, aspect: float = ASPECT
) -> tuple[str, Arrays]:
    """Draws a camera move over one picture, or a cut between two.

    The window is given by its centre, as shares of the picture, and its zoom; at
    zoom 1 it is the largest window of the frame's aspect, whatever that is.
    """
    del aspect
    picture, other = (int(i) for i in rng.choice(len(PICTURES), 2, replace=False))
    kinds = ["in", "out", "left", "right", "up", "down", "still", "cut"]
    move = str(rng.choice(kinds, p=[0.2, 0.14, 0.1, 0.1, 0.05, 0.05, 0.3, 0.06]))
    focus = np.array(PICTURES[picture].focus)
    centre = focus + rng.normal(0.0, 0.04, 2)
    zoom = rng.uniform(1.0, 1.25)
    start = np.array([*centre, zoom])
    end = start.copy()
    if move == "in":
        end[2] = zoom * rng.uniform(1.35, 1.7)
    elif move == "out":
        start[2] = zoom * rng.uniform(1.35, 1.7)
    elif move in ("left", "right", "up", "down"):
        axis = 0 if move in ("left", "right") else 1
        sign = 1.0 if move in ("right", "down") else -1.0
        start[2] = end[2] = rng.uniform(1.35, 1.6)
        start[axis] = focus[axis] - sign * rng.uniform(0.12, 0.22)
        end[axis] = focus[axis] + sign * rng.uniform(0.12, 0.22)
    else:
        end[:2] += rng.normal(0.0, 0.01, 2)
    subject = _subject(rng, picture)
    other_subject = _subject(rng, other)
    caption = _pick(rng, SHOTS[move]).format(subject=subject, other=other_subject)
    times = _times(rng, frames)
    share = (times / DURATION)[:, None]
    share = share * share * (3.0 - 2.0 * share)  # eases in and out
    path = start * (1.0 - share) + end * share
    cut = rng.uniform(0.7, 1.3) if move == "cut" else np.inf
    after = times >= cut
    path[after] = [*PICTURES[other].focus, rng.uniform(1.0, 1.25)]
    shown = np.where(after, other, picture).astype(np.int32)
    return caption, {"picture": shown, "path": path}


def draw_clip(
    rng: np.random.Generator, frames: int, aspect: float = ASPECT
) -> tuple[str, Arrays]:
    """Draws a part of the footage, cropped, at about its own speed."""
    del aspect
    first, last, captions = _pick(rng, CLIP_PARTS)
    speed = rng.uniform(0.85, 1.1) * CLIP_RATE / FRAME_RATE
    length = speed * (frames - 1)
    start = rng.uniform(first, max(last - 1 - length, first))
    index = np.minimum(np.round(start + speed * np.arange(frames)), last - 1)
    centre = np.array([rng.uniform(0.36, 0.46), rng.uniform(0.48, 0.55)])
    drift = rng.normal(0.0, 0.02, 2) * np.linspace(0.0, 1.0, frames)[:, None]
    zoom = np.full((frames, 1), rng.uniform(1.0, 1.2))
    path = np.concatenate([centre + drift, zoom], axis=1)
    return _pick(rng, captions), {"frame": index.astype(np.int32), "path": path}

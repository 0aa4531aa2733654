"""Prompts whose colour, motion and direction can be told from a video.

They follow the grammar of the scenes, one object each, in front of backgrounds that
are even along rows, which detection needs. `held_out_prompts` has those alone that no
training draws; see `is_held_out`.
"""

import dataclasses
import itertools
from typing import Literal

import numpy as np

from models.mini.captions import (
    ADVERBS,
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    SHAPES,
    STEADY_MOTIONS,
    WAYS,
)
from models.mini.scenes import is_held_out
from models.mini.text import split_words

# What a detector tells apart; motions of the grammar that look alike are one kind.
Kind = Literal["rest", "grow", "shrink", "travel", "bounce", "rise", "fall", "circle"]
KINDS: dict[str, Kind] = {
    "rest": "rest",
    "grow": "grow",
    "shrink": "shrink",
    "slide": "travel",
    "bounce": "bounce",
    "bounce_way": "bounce",
    "rise": "rise",
    "fall": "fall",
    "circle": "circle",
}
TRAVELLING = ("slide", "bounce_way")  # to one of `WAYS`
# Striped balls and balloons are half white; bars are thin.
SHAPES_TOLD = ("ball", "box", "triangle", "star", "ring", "heart", "diamond", "cross")
PLACES = ("plain", "snow")
ON_PLAIN = ("rise", "circle")  # motions without ground


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt, and what its video has to show.

    Attributes:
      text: The prompt.
      colour: A name of `COLOURS`.
      shape: A name of `SHAPES`.
      motion: A name of `MOTIONS`.
      way: -1 for the left, 1 for the right, None for motions without a direction.
      tempo: "slowly", "quickly" or "".
    """

    text: str
    colour: str
    shape: str
    motion: str
    way: int | None
    tempo: str

    @property
    def kind(self) -> Kind:
        """The kind of motion that a detector has to find."""
        return KINDS[self.motion]

    @property
    def calm(self) -> bool:
        """Whether little changes from frame to frame."""
        return self.tempo == "slowly" or self.motion in STEADY_MOTIONS


def held_out_prompts(count: int, *, seed: int = 0) -> list[Prompt]:
    """Returns prompts of colours, shapes and motions that no training joins.

    Colours and motions take turns, so that every prefix has about as many of each.

    Args:
      count: Number of prompts.
      seed: Of places, sizes and words.

    Raises:
      ValueError: There are not so many.
    """
    rng = np.random.default_rng(seed)
    by_motion = {
        motion: [
            (colour, shape)
            for colour, shape in itertools.product(COLOURS, SHAPES_TOLD)
            if is_held_out(colour, shape, motion)
        ]
        for motion in KINDS
    }
    for pairs in by_motion.values():
        rng.shuffle(pairs)
    motions = itertools.cycle(KINDS)
    prompts: list[Prompt] = []
    uses = dict.fromkeys(COLOURS, 0)
    left = sum(map(len, by_motion.values()))
    if not 0 < count <= left:
        raise ValueError(f"{count=} must be from 1 to {left}, the held-out prompts")
    while len(prompts) < count:
        motion = next(motions)
        pairs = by_motion[motion]
        if not pairs:
            continue
        colour, shape = min(pairs, key=lambda pair: uses[pair[0]])
        pairs.remove((colour, shape))
        uses[colour] += 1
        prompts.append(_make_prompt(rng, colour, shape, motion))
    return prompts


def _make_prompt(
    rng: np.random.Generator, colour: str, shape: str, motion: str
) -> Prompt:
    tempo = _choose(rng, tempos_told(motion))
    way = int(rng.choice([-1, 1])) if motion in TRAVELLING else None
    name = "plain" if motion in ON_PLAIN else _choose(rng, _places_for(colour))
    (background,) = (each for each in BACKGROUNDS if each.name == name)
    backdrop = _choose(rng, [each for each in COLOURS if _differ(each, colour)])
    place = background.places[0].format(a=backdrop)
    phrase = MOTIONS[motion][0].format(way="" if way is None else WAYS[way])
    words = f"a {colour} {SHAPES[shape][0]} {phrase} {tempo} {place}".split()
    if words[1][0] in "aeiou":
        words[0] = "an"
    return Prompt(
        text=" ".join(words),
        colour=colour,
        shape=shape,
        motion=motion,
        way=way,
        tempo=tempo,
    )


def _choose(rng: np.random.Generator, choices: list[str]) -> str:
    return choices[int(rng.integers(len(choices)))]


def _places_for(colour: str) -> list[str]:
    """Returns places in front of which an object of this colour stands out."""
    return [place for place in PLACES if (place, colour) != ("snow", "white")]


def _differ(first: str, second: str) -> bool:
    difference = np.subtract(COLOURS[first], COLOURS[second])
    return float(np.linalg.norm(difference)) > 0.5


def read_prompt(text: str) -> Prompt | None:
    """Reads a caption of a scene back; None unless detectors can tell its object.

    Args:
      text: A caption of `draw_procedural`.
    """
    words = split_words(text)
    joined = " ".join(words)
    if " and " in joined or {"big", "striped", "beach"} & set(words):
        return None
    shape = next((s for s in SHAPES_TOLD for n in SHAPES[s] if n in words), None)
    found = [
        (motion, way)
        for motion in KINDS
        for said in MOTIONS[motion]
        for way in ((-1, 1) if motion in TRAVELLING else (None,))
        if f" {said.format(way='' if way is None else WAYS[way])} " in f" {joined} "
    ]
    before = words[: words.index(_noun(shape, words))] if shape else []
    colours = [word for word in before if word in COLOURS]
    if shape is None or not found or len(colours) != 1:
        return None
    motion, way = max(found, key=lambda each: each[1] is not None)
    tempo = next((word for word in words if word in ADVERBS), "")
    after = words[words.index(_noun(shape, words)) :]
    if not _stands_out(colours[0], after) or tempo not in tempos_told(motion):
        return None
    return Prompt(
        text=text,
        colour=colours[0],
        shape=shape,
        motion=motion,
        way=way,
        tempo=tempo,
    )


def _stands_out(colour: str, words: list[str]) -> bool:
    """Returns whether an object is told from the place that words of a caption name."""
    for name in _places_for(colour):
        (background,) = (each for each in BACKGROUNDS if each.name == name)
        for place in background.places:
            if all(word in words for word in place.format(a="", b="").split()):
                backdrops = [word for word in words if word in COLOURS]
                return all(_differ(backdrop, colour) for backdrop in backdrops)
    return False


def tempos_told(motion: str) -> list[str]:
    """Returns the tempos at which a motion is told from others.

    A video shows half of a slow circle, which is none.
    """
    if motion in STEADY_MOTIONS:
        return [""]
    return [
        "",
        *(tempo for tempo in ADVERBS if (motion, tempo) != ("circle", "slowly")),
    ]


def _noun(shape: str, words: list[str]) -> str:
    return next(noun for noun in SHAPES[shape] if noun in words)

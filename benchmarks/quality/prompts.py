"""Prompts of the lab, of calm and of fast motion, in words of the model that ships.

Figures are reported on `REPORTING`; whatever is chosen (a method's constants, the split
of a budget, a schedule) is chosen on `TUNING`. No prompt is in both, and none is a
sample prompt of `models.mini.captions`, on which means were first tried.
"""

from typing import Literal, NamedTuple

Motion = Literal["calm", "fast"]


class Prompt(NamedTuple):
    """A prompt, and how much moves in its video."""

    text: str
    motion: Motion


_CALM = (
    "a purple ball rests on green grass",
    "a big orange box is on a checkerboard floor",
    "clouds drift over a green meadow",
    "the moon shines at night",
    "a white boat is on the blue sea",
    "a small green triangle rests in the snow",
    "a red heart grows on a white background",
    "a slow zoom into a temple",
    "a close view of a cup of coffee",
    "sand dunes in the desert",
    "a yellow diamond rests in front of a brick wall",
    "a brown horse is in the snow",
    "white clouds in the blue sky",
    "the sun sets over the sea",
    "a blue cross is in front of red and yellow stripes",
    "pine trees in the forest",
)
_FAST = (
    "a blue ball bounces to the right on green grass",
    "a small red star falls in front of a brick wall",
    "a green wheel rolls to the left on a gravel road",
    "a black horse gallops to the left in the desert",
    "an orange car drives to the right on a gravel road",
    "a yellow box jumps up and down on a checkerboard floor",
    "a white ring spins in front of blue and pink stripes",
    "a purple triangle slides to the right in front of a forest",
    "a beach ball bounces in the snow",
    "a pink diamond falls down in the blue sky",
    "a red boat sails to the right on the blue sea",
    "a white cross moves in a circle at night",
    "a brown bar swings from side to side at sunset",
    "the camera pans left over a rocket",
    "a big blue star turns around on a yellow background",
    "a green balloon floats up in a cloudy sky",
)
_CALM_TUNING = (
    "a green ball rests on the sand",
    "the camera zooms out from a flower",
    "snow falls on white hills",
    "a pink star is on a black background",
)
_FAST_TUNING = (
    "a white ball bounces to the left in the snow",
    "a red car drives to the left on a gravel road",
    "an orange triangle spins in front of a forest",
    "a brown horse runs to the right on green grass",
)


def _alternating(calm: tuple[str, ...], fast: tuple[str, ...]) -> tuple[Prompt, ...]:
    """Returns both kinds in turns, so that the first few have both."""
    pairs = zip(calm, fast, strict=True)
    return tuple(
        prompt for c, f in pairs for prompt in (Prompt(c, "calm"), Prompt(f, "fast"))
    )


REPORTING = _alternating(_CALM, _FAST)
TUNING = _alternating(_CALM_TUNING, _FAST_TUNING)

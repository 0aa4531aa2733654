"""The contents of procedural scenes, and the words that say it."""

import dataclasses

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.13, 0.11),
    "orange": (0.96, 0.52, 0.08),
    "yellow": (0.97, 0.85, 0.15),
    "green": (0.16, 0.62, 0.21),
    "blue": (0.13, 0.35, 0.88),
    "purple": (0.53, 0.2, 0.72),
    "pink": (0.97, 0.5, 0.71),
    "white": (0.95, 0.95, 0.95),
    "black": (0.08, 0.08, 0.09),
    "brown": (0.48, 0.28, 0.13),
}
SIZES: dict[str, tuple[float, float]] = {  # radius in frame heights
    "small": (0.1, 0.125),
    "": (0.15, 0.19),
    "big": (0.23, 0.28),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Background:
    """A kind of scene; its index in `BACKGROUNDS` is its id in the renderer.

    Attributes:
      name: For the code.
      places: Phrases after an object's motion; {a} and {b} are colours.
      alone: Captions of the scene without objects.
      has_ground: Objects rest on it and throw a shadow.
      has_sky: Balloons fly in it.
    """

    name: str
    places: tuple[str, ...]
    alone: tuple[str, ...]
    has_ground: bool = False
    has_sky: bool = True


BACKGROUNDS = (
    Background(
        name="meadow",
        places=("on green grass", "in a green meadow"),
        alone=("green hills under a cloudy sky", "clouds drift over a green meadow"),
        has_ground=True,
    ),
    Background(
        name="desert",
        places=("in the desert", "on the sand"),
        alone=("sand dunes in the desert", "the sun shines on the desert"),
        has_ground=True,
    ),
    Background(
        name="snow",
        places=("in the snow", "in falling snow"),
        alone=("snow falls on white hills", "snow falls in winter"),
        has_ground=True,
    ),
    Background(
        name="sea",
        places=("over the sea", "on the blue sea"),
        alone=("waves roll over the blue sea", "waves on the sea"),
    ),
    Background(
        name="sunset",
        places=("at sunset", "over the sea at sunset"),
        alone=("the sun sets over the sea", "a sunset over the sea"),
    ),
    Background(
        name="night",
        places=("at night", "under a starry sky"),
        alone=("stars twinkle in the night sky", "the moon shines at night"),
        has_ground=True,
    ),
    Background(
        name="brick",
        places=("in front of a brick wall",),
        alone=("a red brick wall",),
        has_sky=False,
    ),
    Background(
        name="checkerboard",
        places=("on a checkerboard floor",),
        alone=("a checkerboard floor",),
        has_ground=True,
        has_sky=False,
    ),
    Background(
        name="stripes",
        places=("in front of {a} and {b} stripes",),
        alone=("{a} and {b} stripes",),
        has_sky=False,
    ),
    Background(
        name="plain",
        places=("on a {a} background",),
        alone=("a {a} background",),
        has_sky=False,
    ),
    Background(
        name="sky",
        places=("in the blue sky", "in a cloudy sky"),
        alone=("clouds drift across a blue sky", "white clouds in the blue sky"),
    ),
    Background(
        name="road",
        places=("on a gravel road",),
        alone=("a gravel road under a blue sky",),
        has_ground=True,
    ),
    Background(
        name="forest",
        places=("in front of a forest", "in the forest"),
        alone=("a forest of dark pine trees", "pine trees in the forest"),
        has_ground=True,
    ),
)
BACKGROUND_IDS = {each.name: index for index, each in enumerate(BACKGROUNDS)}

# The index of a shape here is its id in the renderer.
SHAPES: dict[str, tuple[str, ...]] = {
    "ball": ("ball", "ball", "sphere"),
    "striped ball": ("striped ball", "beach ball"),
    "box": ("box", "square", "cube"),
    "triangle": ("triangle",),
    "star": ("star",),
    "ring": ("ring", "ring", "wheel"),
    "heart": ("heart",),
    "diamond": ("diamond",),
    "cross": ("cross",),
    "bar": ("bar",),
    "horse": ("horse",),
    "car": ("car",),
    "boat": ("boat", "sailing boat"),
    "balloon": ("balloon", "hot air balloon"),
}
SHAPE_IDS = {name: index for index, name in enumerate(SHAPES)}
ROUND_SHAPES = ("ball", "striped ball", "ring")
PLAIN_SHAPES = tuple(SHAPES)[:10]

# {way} is "to the left" or "to the right".
MOTIONS: dict[str, tuple[str, ...]] = {
    "bounce": ("bounces", "jumps up and down"),
    "bounce_way": ("bounces {way}",),
    "roll": ("rolls {way}",),
    "slide": ("slides {way}", "moves {way}"),
    "fall": ("falls down", "falls"),
    "rise": ("floats up", "rises"),
    "circle": ("moves in a circle", "circles around"),
    "spin": ("spins", "turns around"),
    "grow": ("grows",),
    "shrink": ("shrinks",),
    "swing": ("swings from side to side",),
    "rest": ("rests", "is"),
    "gallop": ("gallops {way}", "runs {way}"),
    "drive": ("drives {way}",),
    "sail": ("sails {way}",),
}
WAYS = {-1: "to the left", 1: "to the right"}
# Motions of one tempo. Adverbs of `scenes.TEMPO_SPEEDS` tell that of the others.
STEADY_MOTIONS = ("rest", "grow", "shrink")
ADVERBS = ("slowly", "quickly")

# Camera moves over a picture; {subject} stands for what it shows.
SHOTS: dict[str, tuple[str, ...]] = {
    "in": ("a slow zoom into {subject}", "the camera zooms in on {subject}"),
    "out": ("the camera zooms out from {subject}", "a slow zoom out from {subject}"),
    "left": ("the camera pans left over {subject}",),
    "right": ("the camera pans right over {subject}",),
    "up": ("the camera pans up over {subject}",),
    "down": ("the camera pans down over {subject}",),
    "still": ("{subject}", "a close view of {subject}"),
    "cut": ("{subject} then a cut to {other}",),
}
JOINING_WORDS = ("and", "a", "an", "the")

# What samples and evaluations show: each kind of object, motion, shot and scene.
SAMPLE_PROMPTS = (
    "a red ball bounces on green grass",
    "a cat",
    "waves roll over the blue sea",
    "a blue car drives to the left in the desert",
    "a yellow star spins in front of a brick wall",
    "a white horse runs to the right in the snow",
    "the camera zooms in on an orange flower",
    "a green box rests and a red ball bounces on a checkerboard floor",
    "a purple hot air balloon floats up in the blue sky",
    "an astronaut",
    "a big grey rabbit yawns",
    "a boat sails to the left over the sea at sunset",
    "a pink heart grows on a black background",
    "a striped ball rolls to the right on a gravel road",
    "stars twinkle in the night sky",
    "a raccoon",
)


def all_phrases() -> list[str]:
    """Returns every phrase that a caption can be built from, for the vocabulary."""
    phrases = [*COLOURS, *SIZES, *WAYS.values(), *ADVERBS, *JOINING_WORDS]
    for background in BACKGROUNDS:
        phrases += [*background.places, *background.alone]
    for group in (SHAPES, MOTIONS, SHOTS):
        phrases += [phrase for choices in group.values() for phrase in choices]
    plain = [
        phrase.format(a="", b="", way="", subject="", other="") for phrase in phrases
    ]
    return plain

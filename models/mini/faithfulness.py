"""Detectors: the colour of a video's object, its kind of motion, and its direction.

Plain image analysis, without learning. The background is taken to be even along rows,
as those of `models.mini.prompts` are; what differs from it in one of the colours, and
lies close together, is the object. The track of its place and area tells the motion.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from models.mini.captions import COLOURS
from models.mini.prompts import Kind

DIFFERENCE = 0.16  # of an object's colour from the background, in RGB from 0 to 1
LIGHTS = np.linspace(0.45, 1.15, 8)  # light on an object, as factors of its colour
POLISHES = 3


class Track(NamedTuple):
    """The object in each frame in which it is seen."""

    frame: Float[np.ndarray, " S"]
    x: Float[np.ndarray, " S"]  # of its middle, in frame heights
    y: Float[np.ndarray, " S"]
    area: Float[np.ndarray, " S"]  # in frame heights squared


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """What is seen in a video.

    Attributes:
      colour: A name of `COLOURS`; None if no object is seen.
      kind: Its kind of motion; None likewise.
      way: -1 for the left, 1 for the right, None if it does not travel.
    """

    colour: str | None
    kind: Kind | None
    way: int | None


def detect(video: Float[np.ndarray, "T Y X 3"]) -> Finding:
    """Looks for the object of a video.

    Args:
      video: Pixels in [0, 1].
    """
    different = differs_from_background(video)
    nearest = nearest_colours(video)
    colour, mask = _most_compact(different, nearest)
    if colour is None:
        return Finding(colour=None, kind=None, way=None)
    track = follow(mask)
    if len(track.x) < 4:
        return Finding(colour=colour, kind=None, way=None)
    kind, way = classify(track)
    return Finding(colour=colour, kind=kind, way=way)


def differs_from_background(
    video: Float[np.ndarray, "T Y X 3"],
) -> Bool[np.ndarray, "T Y X"]:
    """Returns where a video differs from what is even along its rows and columns.

    Source: Tukey, Exploratory Data Analysis, 1977, for the median polish.
    """
    rest = video.astype(np.float32)
    for _ in range(POLISHES):
        rest = rest - np.median(rest, axis=(0, 2), keepdims=True)
        rest = rest - np.median(rest, axis=(0, 1), keepdims=True)
    return np.linalg.norm(rest, axis=-1) > DIFFERENCE


def nearest_colours(
    video: Float[np.ndarray, "T Y X 3"],
) -> np.ndarray:
    """Returns the index in `COLOURS` that each pixel comes closest to in some light."""
    names = np.array(list(COLOURS.values()), np.float32)
    lit = names[:, None] * LIGHTS[None, :, None].astype(np.float32)
    flat = video.reshape(-1, 3).astype(np.float32)
    table = lit.reshape(-1, 3)
    # The squared distance without the pixel's own square, which is the same for all.
    scores = np.square(table).sum(-1)[None] - 2.0 * flat @ table.T
    return (scores.argmin(-1) // len(LIGHTS)).reshape(video.shape[:-1])


def _most_compact(
    different: Bool[np.ndarray, "T Y X"], nearest: np.ndarray
) -> tuple[str | None, Bool[np.ndarray, "T Y X"]]:
    """Returns the colour whose pixels lie most and closest together, and these."""
    best, best_score, best_mask = None, 0.0, different
    for index, name in enumerate(COLOURS):
        mask = different & (nearest == index)
        score = 0.0
        for frame in mask:
            rows, columns = np.nonzero(frame)
            if len(rows) < 12:
                continue
            height = frame.shape[0]
            away = np.hypot(rows - np.median(rows), columns - np.median(columns))
            score += float((away < 0.25 * height).mean() * (away < 0.25 * height).sum())
        if score > best_score:
            best, best_score, best_mask = name, score, mask
    return best, best_mask


def follow(mask: Bool[np.ndarray, "T Y X"]) -> Track:
    """Returns the middle and the area of the largest part of a mask by frame."""
    height = mask.shape[1]
    found = []
    for number, frame in enumerate(mask):
        rows, columns = np.nonzero(frame)
        if len(rows) < 12:
            continue
        for _ in range(2):  # leaves stray pixels out
            away = np.hypot(rows - np.median(rows), columns - np.median(columns))
            near = away < 0.3 * height
            rows, columns = rows[near], columns[near]
        x, y = (part.mean() / height for part in (columns, rows))
        found.append((number, x, y, len(rows) / height**2))
    values = np.array(found, np.float64).reshape(-1, 4)
    return Track(*values.T)


def classify(track: Track) -> tuple[Kind, int | None]:
    """Returns the kind of motion of a track, and its direction if it travels."""
    x, y, area = track.x, track.y, track.area
    width, height = np.ptp(x), np.ptp(y)
    ends = max(len(area) // 5, 1)
    growth = np.log(np.median(area[-ends:]) / np.median(area[:ends]))
    across = np.median(x[-ends:]) - np.median(x[:ends])
    down = np.median(y[-ends:]) - np.median(y[:ends])
    way = int(np.sign(across))
    if _turns(x, y) > 0.6:
        return "circle", None
    if abs(across) > 0.2 and abs(across) > 0.6 * width:
        return ("bounce" if height > 0.1 else "travel"), way
    if abs(growth) > 0.8 and width < 0.2 and height < 0.25:
        return ("grow" if growth > 0 else "shrink"), None
    if height < 0.08:
        return "rest", None
    if abs(down) > 0.75 * height:
        return ("fall" if down > 0 else "rise"), None
    return "bounce", None


def _turns(x: Float[np.ndarray, " S"], y: Float[np.ndarray, " S"]) -> float:
    """Returns how often a track goes around its middle, if it is a circle."""
    width, height = np.ptp(x), np.ptp(y)
    if min(width, height) < 0.15 or not 0.5 < width / height < 2.0:
        return 0.0
    from_middle = np.stack([x - (x.min() + x.max()) / 2, y - (y.min() + y.max()) / 2])
    radius = np.linalg.norm(from_middle, axis=0)
    if radius.min() < 0.5 * radius.max():
        return 0.0
    angle = np.unwrap(np.arctan2(from_middle[1], from_middle[0]))
    return float(abs(angle[-1] - angle[0]) / (2 * np.pi))

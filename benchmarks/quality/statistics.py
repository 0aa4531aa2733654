"""Means over clips with their intervals, and curves between measured points.

Clips of two methods are paired: they have the same prompt and noise, so a difference is
taken of each clip first, and its interval is far narrower than that of either mean.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax.scipy.special import betainc
from jaxtyping import Float

CONFIDENCE = 0.95


def mean_and_interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Returns a mean and the half-width of its 95 % interval, Student's.

    Of one value the half-width is NaN: it can't be told.
    """
    values = np.asarray(values, np.float64)
    count = len(values)
    if count < 2:
        return float(values.mean()), float("nan")
    error = values.std(ddof=1) / np.sqrt(count)
    return float(values.mean()), float(t_quantile(count - 1) * error)


def t_quantile(degrees: int, confidence: float = CONFIDENCE) -> float:
    """Returns how many standard errors an interval of Student's t reaches."""
    low, high = 0.0, 1000.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        outside = betainc(
            0.5 * degrees, 0.5, jnp.float32(degrees / (degrees + middle**2))
        )
        low, high = (middle, high) if outside > 1 - confidence else (low, middle)
    return 0.5 * (low + high)


def interpolate(
    place: float, places: Sequence[float], values: Float[np.ndarray, "points clips"]
) -> Float[np.ndarray, " clips"] | None:
    """Returns values of each clip between measured points, straight lines.

    Args:
      place: Where, such as a time.
      places: Where each point is, in any order.
      values: Of each point and clip.

    Returns:
      None where the place lies outside the measured ones: nothing is extrapolated.
    """
    order = np.argsort(places)
    known = np.asarray(places, np.float64)[order]
    tolerance = 1e-9 * abs(known).max()
    if not known[0] - tolerance <= place <= known[-1] + tolerance:
        return None
    return np.array([np.interp(place, known, clip[order]) for clip in values.T])


def first_reaching(
    level: float, places: Sequence[float], means: Sequence[float]
) -> float | None:
    """Returns the least place where a curve of means has a level, or its first place.

    None where no measured point has it.
    """
    order = np.argsort(places)
    known, curve = np.asarray(places)[order], np.asarray(means)[order]
    reached = np.flatnonzero(curve >= level)
    if not len(reached):
        return None
    at = reached[0]
    if at == 0:
        return float(known[0])
    before = curve[at - 1]
    share = (level - before) / (curve[at] - before)
    return float(known[at - 1] + share * (known[at] - known[at - 1]))

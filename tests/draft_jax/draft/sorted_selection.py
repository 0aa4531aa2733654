"""Selection by sorting in NumPy: the ranking's independent reference.

A stable sort of the negated scores puts ties in index order, which is the documented
order. NaN counts as minus infinity.
"""

import numpy as np

MASS_UNITS = 2.0**30


def ranked(scores, forced):
    """Scores to rank: forced pairs before all others, infinity included."""
    scores = np.where(np.isnan(scores), -np.inf, scores).astype(np.float64)
    return np.stack([np.where(forced, 1, 0) * np.ones_like(scores), scores])


def order_of(scores, forced):
    """Indices of the last axis, best first."""
    is_forced, values = ranked(scores, forced)
    return np.lexsort((-values, -is_forced), axis=-1)


def keep(order, count):
    """True for the first `count` indices of each row's order."""
    place = np.arange(order.shape[-1]) < np.asarray(count)[..., None]
    kept = np.zeros(order.shape, bool)
    np.put_along_axis(kept, order, np.broadcast_to(place, order.shape), axis=-1)
    return kept


def percentile(scores, forced, budget):
    order = order_of(scores.reshape(*scores.shape[:-2], -1), forced.ravel())
    kept = keep(order, max(budget, forced.sum())).reshape(scores.shape)
    best = keep(order_of(scores, forced), 1)
    return kept | (best & ~kept.any(-1, keepdims=True))


def row_topk(scores, forced, budget):
    count = np.maximum(budget, forced.sum(-1))
    return keep(order_of(scores, forced), count)


def top_p(scores, forced, budget, mass):
    order = order_of(scores, forced)
    units = np.rint(np.clip(np.nan_to_num(scores), 0, 1) * MASS_UNITS).astype(np.int64)
    held = np.cumsum(np.take_along_axis(units, order, -1), -1)
    held_before = np.pad(held, [(0, 0)] * (held.ndim - 1) + [(1, 0)])[..., :-1]
    wanted = round(mass * MASS_UNITS)
    count = (held_before < wanted).sum(-1)
    least = np.maximum(forced.sum(-1), 1)
    return keep(order, np.clip(count, least, np.maximum(budget, least)))

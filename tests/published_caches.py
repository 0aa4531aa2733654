"""The loops of published step caches, written anew in NumPy from their formulae."""

import numpy as np


def magcache_interpolation(values, target):
    """Published rule: index round(i * (length - 1) / (target - 1)), half to even."""
    if target == 1:
        return [values[-1]]
    scale = (len(values) - 1) / (target - 1)
    return [values[int(np.round(i * scale))] for i in range(target)]


def magcache_skips(branches, threshold, most, retention, *, inclusive):
    """The published loop: calls alternate between branches, each with its counters."""
    calls = [value for step in zip(*branches, strict=True) for value in step]
    width = len(branches)
    ratio, error, count = [1.0] * width, [0.0] * width, [0] * width
    skips = []
    for call, value in enumerate(calls):
        skip, branch = False, call % width
        if call >= int(len(calls) * retention):
            ratio[branch] *= value
            count[branch] += 1
            error[branch] += abs(1 - ratio[branch])
            below = error[branch] < threshold
            below = below or (inclusive and error[branch] == threshold)
            if below and count[branch] <= most:
                skip = True
            else:
                ratio[branch], error[branch], count[branch] = 1.0, 0.0, 0
        skips.append(skip)
    return np.array(skips).reshape(-1, width)


def easycache_run(velocities, move, x, *, num_steps, threshold, first_steps):
    """EasyCache's loop over prompts and negative prompts.

    Args:
      velocities: Of latents and the step's number: prompts and negative prompts.
      move: Of latents, both velocities and the step's number: the next latents.
      x: The first latents.

    Returns:
      Which steps are skipped, both velocities of each, and the last latents.
    """
    error, rate = 0.0, None
    x_last = x_full = v_full = caches = None
    skipped, found = [], []
    for step in range(num_steps):
        compute = True
        if step < first_steps or step == num_steps - 1:
            error = 0.0
        elif rate is not None:
            moved = np.abs(x - x_last).mean()
            error += rate * (moved / np.abs(v_full).mean())
            compute = not error < threshold
            error = 0.0 if compute else error
        x_last = x
        if compute:
            both = velocities(x, step)
            if v_full is not None:
                rate = np.abs(both[0] - v_full).mean() / np.abs(x - x_full).mean()
            x_full, v_full, caches = x, both[0], both - x
        else:
            both = x + caches
        skipped.append(not compute)
        found.append(both)
        x = move(x, both, step)
    return np.array(skipped), np.stack(found), x

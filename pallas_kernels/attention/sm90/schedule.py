"""The order in which CTAs take query blocks."""

import jax.numpy as jnp
from jaxtyping import Array, Int


def launch_order(
    counts: Int[Array, "L R"], num_ctas_at_once: int, num_behind: int = 0
) -> Int[Array, " L*R"]:
    """Orders query blocks as CTAs take them, `num_ctas_at_once` at a time.

    CTAs share K and V in L2, which holds less than one head's: so they should walk
    the same head's keys, and be at about the same place in their lists.

    - Rows that keep every block come first, of all heads: they take many times as long
      as others, and would be what the GPU ends with.
    - The others follow head by head, longest lists first: a CTA that starts late has
      less to do, so those of a head draw level.
    - A head does not end with a full wave of CTAs: the rest of the wave goes to the
      shortest lists of the next head, which end at the same time. So both heads' other
      waves begin together.

    Args:
      counts: Length of each query block's list, for each batch item and head.
      num_ctas_at_once: How many CTAs the GPU runs at a time.
      num_behind: Blocks that are walked behind every list that is not full.

    Returns:
      Query blocks, counted list by list.
    """
    num_blocks = counts.shape[1]
    is_full = counts == num_blocks
    num_others = num_blocks - is_full.sum(1, dtype=jnp.int32)
    # How many other lists could run in the time of those before each head's.
    entries = counts.sum(dtype=jnp.float32, where=~is_full)
    length = entries / jnp.maximum(num_others.sum(), 1)
    length = jnp.maximum(length + num_behind, 1.0)
    time_of_full = is_full.sum(dtype=jnp.float32) * num_blocks / length
    waiting = time_of_full.astype(jnp.int32)
    before = waiting + jnp.cumsum(num_others) - num_others
    shared = jnp.minimum(-before % num_ctas_at_once, num_others)

    # The head that each place in the order belongs to, and the rank of its row among
    # the head's full rows, or among the others.
    place = jnp.arange(counts.size, dtype=jnp.int32)
    num_full = num_blocks - num_others
    head_of_full, full = _divide(place, num_full)
    head_of_other, other = _divide(place - num_full.sum(), num_others)
    # Longest first, but for the shortest, which share a wave with the head before.
    skipped, first = shared[head_of_other], num_full[head_of_other]
    other += jnp.where(other < skipped, num_blocks, first) - skipped

    is_for_full = place < num_full.sum()
    head = jnp.where(is_for_full, head_of_full, head_of_other)
    by_length = jnp.argsort(-counts, axis=1, stable=True).astype(jnp.int32)
    rows = by_length[head, jnp.where(is_for_full, full, other)]
    return head * num_blocks + rows


def _divide(place: Int[Array, " P"], sizes: Int[Array, " L"]):
    """Returns the group of each place, and the place in it; groups are in a row."""
    ends = jnp.cumsum(sizes)
    group = (ends <= place[:, None]).sum(1, dtype=jnp.int32)
    group = jnp.minimum(group, len(sizes) - 1)  # places past the end are not used
    return group, place - (ends - sizes)[group]

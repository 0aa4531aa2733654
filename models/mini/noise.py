"""Reading textures between pixels, and smooth noise, for the renderer."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

Plane = Float[Array, "Y X"]


def sample_picture(
    pictures: UInt8[Array, "n rows columns 3"],
    index: Int[Array, ""],
    rows: Plane,
    columns: Plane,
    size: Float[Array, "2"],
) -> Float[Array, "Y X 3"]:
    """Samples a picture bilinearly in [0, 1]; its edge is repeated outside."""
    rows = jnp.clip(rows, 0.0, size[0] - 1.0)
    columns = jnp.clip(columns, 0.0, size[1] - 1.0)
    row, column = (
        jnp.floor(rows).astype(jnp.int32),
        jnp.floor(columns).astype(jnp.int32),
    )
    last_row, last_column = size[0].astype(jnp.int32) - 1, size[1].astype(jnp.int32) - 1
    down, right = (rows - row)[..., None], (columns - column)[..., None]
    below, beside = jnp.minimum(row + 1, last_row), jnp.minimum(column + 1, last_column)

    def read(r, c):
        return pictures[index, r, c].astype(jnp.float32)

    top = read(row, column) * (1 - right) + read(row, beside) * right
    bottom = read(below, column) * (1 - right) + read(below, beside) * right
    return (top * (1 - down) + bottom * down) / 255.0


def sample_grey(
    textures: UInt8[Array, "n side side"], index: int, u: Plane, v: Plane
) -> Plane:
    """Samples a repeating texture bilinearly in [0, 1]; u, v run 0 to 1 over it."""
    side = textures.shape[-1]
    rows, columns = v * side, u * side
    row, column = jnp.floor(rows), jnp.floor(columns)
    down, right = rows - row, columns - column
    row, column = row.astype(jnp.int32), column.astype(jnp.int32)

    def read(r, c):
        return textures[index, r % side, c % side].astype(jnp.float32)

    top = read(row, column) * (1 - right) + read(row, column + 1) * right
    bottom = read(row + 1, column) * (1 - right) + read(row + 1, column + 1) * right
    return (top * (1 - down) + bottom * down) / 255.0


def random_at(i: Array, j: Array) -> Array:
    """Returns a number in [0, 1) that looks random for each pair of integers."""
    return jnp.modf(jnp.abs(jnp.sin(i * 127.1 + j * 311.7) * 4375.85))[0]


def noise(x: Array, y: Array) -> Array:
    """Returns smooth noise in [0, 1] with features of size 1."""
    i, j = jnp.floor(x), jnp.floor(y)
    right, down = x - i, y - j
    right = right * right * (3 - 2 * right)
    down = down * down * (3 - 2 * down)
    top = random_at(i, j) * (1 - right) + random_at(i + 1, j) * right
    bottom = random_at(i, j + 1) * (1 - right) + random_at(i + 1, j + 1) * right
    return top * (1 - down) + bottom * down


def cloud_noise(x: Array, y: Array) -> Array:
    """Returns three octaves of `noise`, in [0, 1]."""
    return (
        4 * noise(x, y)
        + 2 * noise(2 * x + 17, 2 * y + 5)
        + noise(4 * x + 3, 4 * y + 29)
    ) / 7


def smooth_step(low: float, high: float, value: Array) -> Array:
    """Returns 0 below `low`, 1 above `high`, and rises smoothly between."""
    share = jnp.clip((value - low) / (high - low), 0.0, 1.0)
    return share * share * (3 - 2 * share)


def blend(below: Array, above: Array, share: Array) -> Array:
    """Lays `above` over `below` by `share`; colours lie on the last axis."""
    return below + (above - below) * share[..., None]

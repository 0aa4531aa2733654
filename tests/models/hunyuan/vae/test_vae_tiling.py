"""How tiles are cut and blended, against the published loops in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.hunyuan.vae.tiling import HunyuanTiling, run_tiles
from tests.cases import mostly_nightly

BLEND = {"rtol": 0, "atol": 2e-6}  # values of size 3; measured on CPU: 4.8e-7


def blend(a, b, most, axis):
    """Position after position, in place, as `blend_v`, `blend_h` and `blend_t` do."""
    a, b = np.moveaxis(a, axis, 0), np.moveaxis(b, axis, 0)
    shared = min(len(a), len(b), most)
    for x in range(shared):
        b[x] = a[len(a) - shared + x] * (1 - x / shared) + b[x] * (x / shared)


def published_space(run, source, tiles, results):
    _, _, height, width, _ = source.shape
    if height <= tiles.size[1] and width <= tiles.size[2]:
        return run(source)
    rows = []
    for y in range(0, height, tiles.step[1]):
        row = []
        for x in range(0, width, tiles.step[2]):
            end_y, end_x = y + tiles.size[1], x + tiles.size[2]
            row.append(run(source[:, :, y:end_y, x:end_x]))
        rows.append(row)
    lines = []
    for i, row in enumerate(rows):
        line = []
        for j, tile in enumerate(row):
            if i:
                blend(rows[i - 1][j], tile, results.size[1] - results.step[1], 2)
            if j:
                blend(row[j - 1], tile, results.size[2] - results.step[2], 3)
            line.append(tile[:, :, : results.step[1], : results.step[2]])
        lines.append(np.concatenate(line, 3))
    return np.concatenate(lines, 2)


def published(run, source, tiles, results):
    """Frames of the whole, and how many each tile in time gave."""
    frames = source.shape[1]
    if frames <= tiles.size[0]:
        return published_space(run, source, tiles, results), [None]
    row = []
    for start in range(0, frames, tiles.step[0]):
        tile = source[:, start : start + tiles.size[0] + 1]
        tile = published_space(run, tile, tiles, results)
        row.append(tile[:, 1:] if start else tile)
    kept = []
    for i, tile in enumerate(row):
        if i:
            blend(row[i - 1], tile, results.size[0] - results.step[0], 1)
        kept.append(tile[:, : results.step[0] + (i == 0)])
    return np.concatenate(kept, 1), [part.shape[1] for part in kept]


def grow(source):
    """A stand-in for a decoder, in NumPy: stride 2, tiles that do not agree."""
    x = np.asarray(source, np.float64)
    x = x.repeat(2, 1)[:, 1:].repeat(2, 2).repeat(2, 3)
    return (x + x.mean()).astype(np.float32)


def shrink(source):
    """A stand-in for an encoder, likewise."""
    x = np.asarray(source, np.float64)[:, ::2, ::2, ::2]
    return (x - 2 * x.mean()).astype(np.float32)


SHAPES = [
    (3, 4, 4),  # one tile
    (3, 4, 5),  # rows that fit are cut for columns that do not
    (3, 11, 4),
    (7, 5, 9),
    (4, 4, 4),
    (9, 3, 3),  # the last tile in time has its dropped frame only
    (10, 7, 3),
    (11, 8, 8),
]

# The original's ratio; tiles that reach beyond the next one; tiles that share nothing.
STEPS = [(6, 6, 6), (4, 2, 6), (8, 8, 8)]


@pytest.mark.parametrize("direction", ["decode", "encode"])
@pytest.mark.parametrize("step", mostly_nightly(STEPS, (STEPS[0],)), ids=str)
@pytest.mark.parametrize("shape", mostly_nightly(SHAPES, SHAPES[4:7]), ids=str)
def test_tiles_are_blended_as_published(shape, step, direction):
    pixels = HunyuanTiling(size=(8, 8, 8), step=step)
    latents = pixels.divided((2, 2, 2))
    frames, rows, columns = shape
    if direction == "decode":
        run, sizes = grow, (latents, pixels)
    else:
        run, sizes = shrink, (pixels, latents)
        frames, rows, columns = 2 * frames - 1, 2 * rows, 2 * columns
    source = np.random.default_rng(0).normal(size=(1, frames, rows, columns, 2))
    source = source.astype(np.float32)
    expected, counts = published(run, source, *sizes)
    for given in (source, jnp.asarray(source)):
        got = list(run_tiles(lambda tile: jnp.asarray(run(tile)), given, *sizes))
        np.testing.assert_allclose(np.concatenate(got, 1), expected, **BLEND)
        if counts != [None]:
            assert [part.shape[1] for part in got] == [n for n in counts if n]


def test_the_original_cuts_129_frames_in_three():
    """Tiles of 17, 17 and 9 latent frames give 49, 48 and 32 frames."""
    pixels = HunyuanTiling.original()
    seen = []

    def run(tile):
        seen.append(tile.shape[1])
        return jnp.zeros((1, 4 * tile.shape[1] - 3, 8, 8, 1))

    latents = np.zeros((1, 33, 1, 1, 1), np.float32)
    parts = run_tiles(run, latents, pixels.divided((4, 8, 8)), pixels)
    assert [part.shape[1] for part in parts] == [49, 48, 32]
    assert seen == [17, 17, 9]


def test_published_sizes():
    original, diffusers = HunyuanTiling.original(), HunyuanTiling.diffusers()
    assert (original.size, original.step) == ((64, 256, 256), (48, 192, 192))
    assert (diffusers.size, diffusers.step) == ((16, 256, 256), (12, 192, 192))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": (64, 256)}, r"size=\(64, 256\) must be three positive integers"),
        ({"step": (0, 192, 192)}, r"step=\(0, 192, 192\) must be three"),
        ({"step": (48, 320, 192)}, "must be at most"),
    ],
    ids=str,
)
def test_tiles_that_cannot_be(options, message, without_jaxtyping):
    with pytest.raises(ValueError, match=message):
        HunyuanTiling(**options)


def test_sizes_are_multiples_of_the_stride():
    with pytest.raises(ValueError, match=r"tiling.step=\(48, 192, 188\) must be mult"):
        HunyuanTiling(step=(48, 192, 188)).divided((4, 8, 8))


def test_tiles_of_one_shape_share_a_program():
    """However many there are, edges have their own: two shapes in each direction."""
    traced = []

    @jax.jit
    def run(tile):
        traced.append(tile.shape)
        return tile

    tiles = HunyuanTiling(size=(4, 4, 4), step=(3, 3, 3))
    source = jnp.zeros((1, 14, 14, 14, 1))
    list(run_tiles(run, source, tiles, tiles))
    assert len(traced) == len(set(traced)) == 8

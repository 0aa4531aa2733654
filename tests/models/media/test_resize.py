"""PyTorch's bicubic resize; squares are compared with torch in test_clip_image_encoder.

Its matrices are hand-worked here, and other shapes go through loops over the taps.
"""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from models.media.resize import bicubic_weights, resize_bicubic, resize_lanczos
from tests.tolerances import BICUBIC


def test_weights_of_a_hand_worked_case():
    # Halving: every centre lies between two samples, at distances 1.5, .5, .5, 1.5.
    outer, inner = -0.09375, 0.59375
    expected = [
        [outer + inner, inner, outer, 0],  # the first sample is repeated
        [0, outer, inner, outer + inner],
    ]
    np.testing.assert_array_equal(bicubic_weights(4, 2), expected)


def cubic(distance):
    """Keys' kernel with a = -3/4, expanded by hand."""
    x = abs(distance)
    if x <= 1:
        return 1.25 * x**3 - 2.25 * x**2 + 1
    return -0.75 * x**3 + 3.75 * x**2 - 6 * x + 3 if x < 2 else 0.0


def resize_by_loops(image, height, width):
    """Sixteen taps for every pixel, in float64."""
    rows, columns, _ = image.shape
    result = np.zeros((height, width, 3))
    for y, x in np.ndindex(height, width):
        centre_y = (y + 0.5) * rows / height - 0.5
        centre_x = (x + 0.5) * columns / width - 0.5
        top, left = int(np.floor(centre_y)), int(np.floor(centre_x))
        for i, j in itertools.product(
            range(top - 1, top + 3), range(left - 1, left + 3)
        ):
            pixel = image[min(max(i, 0), rows - 1), min(max(j, 0), columns - 1)]
            result[y, x] += cubic(centre_y - i) * cubic(centre_x - j) * pixel
    return result


@pytest.mark.parametrize(
    ("shape", "size"), [((9, 14), (16, 32)), ((20, 11), (8, 24)), ((6, 6), (6, 6))]
)
def test_resize_of_any_shape(shape, size):
    image = np.random.default_rng(0).uniform(-1, 1, (*shape, 3)).astype(np.float32)
    got = resize_bicubic(jnp.asarray(image)[None], *size)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got[0], resize_by_loops(image, *size), **BICUBIC)


@pytest.mark.nightly
@pytest.mark.parametrize("size", [(9, 14), (40, 25), (20, 60)], ids=str)
def test_lanczos_is_that_of_pillow(size):
    image = np.random.default_rng(0).uniform(-1, 1, (20, 31, 3)).astype(np.float32)
    height, width = size
    expected = np.stack(
        [
            Image.fromarray(image[..., colour]).resize((width, height), Image.LANCZOS)
            for colour in range(3)
        ],
        axis=-1,
    ).clip(-1, 1)
    got = resize_lanczos(jnp.asarray(image[None]), height, width)[0]
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)

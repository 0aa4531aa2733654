"""The renderer: things land where they are asked to, in the colours asked for."""

import functools
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.mini.captions import BACKGROUND_IDS, COLOURS, SHAPE_IDS
from models.mini.noise import sample_grey, sample_picture
from models.mini.renderer import (
    device_sources,
    pixel_grid,
    render_batch,
    render_clips,
    render_pictures,
    render_procedural,
)
from models.mini.scenes import Mix, sample_batch
from models.mini.sources import WINDOW, Sources, read_wheel
from tests.synthetic_sources import make_sources

pytestmark = pytest.mark.nightly

HEIGHT, WIDTH = 48, 64


@pytest.fixture(scope="module")
def sources() -> dict:
    return device_sources(make_sources())


@pytest.fixture(scope="module")
def render(sources):
    """Renders one procedural scene; one compilation serves all tests."""
    compiled = jax.jit(functools.partial(render_procedural, height=HEIGHT, width=WIDTH))
    return lambda scene: np.asarray(
        compiled(jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], scene), sources)
    )[0]


def scene(background="plain", *, shape="ball", x=0.6, y=0.5, radius=0.2, **changes):
    """Two frames of an object that does not move, and no second object."""
    fields = {
        "background": np.int32(BACKGROUND_IDS[background]),
        "colour_a": np.float32(COLOURS["black"]),
        "colour_b": np.float32(COLOURS["white"]),
        "horizon": np.float32(0.55),
        "times": np.float32([0.0, 1.0]),
        "random": np.float32([0.3, 0.6, 0.2, 0.8]),
        "shape": np.int32([SHAPE_IDS[shape], 0]),
        "colour": np.float32([COLOURS["red"], (0, 0, 0)]),
        "x": np.float32([[x, x], [-9, -9]]),
        "y": np.float32([[y, y], [-9, -9]]),
        "angle": np.zeros((2, 2), np.float32),
        "radius": np.float32([[radius] * 2, [0.1, 0.1]]),
        "ground": np.float32([-1, -1]),
        "way": np.float32([1, 1]),
    }
    return fields | changes


def redness(video: np.ndarray) -> np.ndarray:
    return video[..., 0] - 0.5 * (video[..., 1] + video[..., 2])


@pytest.mark.parametrize("shape", list(SHAPE_IDS))
@pytest.mark.parametrize("centre", [(0.4, 0.35), (0.95, 0.6)], ids=str)
def test_objects_land_where_asked(render, shape, centre):
    x, y = centre
    without = render(scene(x=-9.0))
    frame = render(scene(shape=shape, x=x, y=y))[0]
    changed = np.abs(frame - without[0]).max(-1) > 0.05
    rows, columns = np.nonzero(changed)
    assert changed.any()
    if shape != "horse":  # the synthetic silhouette is no horse, only a texture
        assert abs(rows.mean() / HEIGHT - y) < 0.09
        assert abs(columns.mean() / HEIGHT - x) < 0.05
    # Nothing is drawn further away than this (the corner of the silhouette).
    grid_x, grid_y = (np.asarray(part) for part in pixel_grid(HEIGHT, WIDTH))
    assert np.hypot(grid_x - x, grid_y - y)[changed].max() < 1.45 * 0.2


def test_ball_has_the_area_and_colour_of_a_disc(render):
    frame = render(scene(radius=0.25))[0]
    red = redness(frame) > 0.15
    area = red.sum() / HEIGHT**2  # in frame heights squared
    assert area == pytest.approx(np.pi * 0.25**2, rel=0.12)


def test_second_object_is_drawn_over_the_first(render):
    both = scene()
    both["x"][1], both["y"][1], both["radius"][1] = 0.6, 0.5, 0.2
    both["colour"][1] = COLOURS["blue"]
    middle = render(both)[0, HEIGHT // 2, int(0.6 * HEIGHT)]
    assert middle[2] > middle[0]


def test_ground_makes_a_shadow(render):
    lit = render(scene("checkerboard"))[0]
    shaded = render(scene("checkerboard", ground=np.float32([0.8, -1])))[0]
    darker = lit.mean(-1) - shaded.mean(-1)
    assert darker.min() >= -1e-6
    assert np.nonzero(darker > 0.05)[0].mean() / HEIGHT == pytest.approx(0.8, abs=0.05)


@pytest.mark.parametrize("background", list(BACKGROUND_IDS))
def test_backgrounds_are_finite_and_in_range(render, background):
    for horizon in (0.5, 0.62):
        video = render(scene(background, x=-9.0, horizon=np.float32(horizon)))
        assert np.isfinite(video).all()
        assert video.min() >= 0.0
        assert video.max() <= 1.0
        if background != "plain":
            assert video[0].std() > 0.05
    moving = {"meadow", "snow", "sea", "sunset", "night", "stripes", "sky", "road"}
    assert (np.abs(video[0] - video[1]).max() > 0.02) == (background in moving)


def test_desert_is_finite_where_its_ripples_had_a_pole(render):
    """0.4 + y - edge was 0 for some rows: one such pixel made training fail."""
    for horizon in np.linspace(0.5, 0.62, 40):
        video = render(scene("desert", x=-9.0, horizon=np.float32(horizon)))
        assert np.isfinite(video).all()


def test_batch_keeps_the_order_of_kinds(sources):
    """Without procedural scenes, which take long to compile; training has them."""
    _, *scenes = sample_batch((0,), Mix(procedural=0, pictures=2, clips=1), 4)
    assert scenes[0] == {}
    size = {"height": 16, "width": 24}
    video = jax.jit(functools.partial(render_batch, **size))(*scenes, sources)
    assert video.shape == (3, 4, 16, 24, 3)
    assert float(video.min()) >= -1.0
    assert float(video.max()) <= 1.0
    alone = render_one(scenes[1], sources, **size)
    np.testing.assert_allclose(video[:2], 2 * np.asarray(alone) - 1, atol=1e-5)
    alone = jax.jit(functools.partial(render_clips, **size))(scenes[2], sources)
    np.testing.assert_allclose(video[2], 2 * np.asarray(alone[0]) - 1, atol=1e-5)


render_one = jax.jit(render_pictures, static_argnames=("height", "width"))


def test_picture_at_zoom_one_is_the_picture(sources):
    scenes = {
        "picture": jnp.asarray([[3]], jnp.int32),
        "path": jnp.asarray([[[0.5, 0.5, 1.0]]], jnp.float32),
    }
    rows, columns = WINDOW
    video = render_one(scenes, sources, height=rows, width=columns)
    expected = np.asarray(sources["pictures"][3], np.float32) / 255
    np.testing.assert_allclose(video[0, 0], expected, atol=1e-5)


def test_window_never_leaves_the_picture(sources):
    scenes = {
        "picture": jnp.zeros((1, 2), jnp.int32),
        "path": jnp.asarray([[[-5.0, -5.0, 2.0], [5.0, 5.0, 2.0]]], jnp.float32),
    }
    rows, columns = WINDOW[0] // 2, WINDOW[1] // 2
    video = np.asarray(render_pictures(scenes, sources, height=rows, width=columns))
    picture = np.asarray(sources["pictures"][0], np.float32) / 255
    np.testing.assert_allclose(video[0, 0], picture[:rows, :columns], atol=1e-5)
    np.testing.assert_allclose(video[0, 1], picture[rows:, columns:], atol=1e-5)


def test_bilinear_reading_matches_loops():
    rng = np.random.default_rng(0)
    texture = rng.integers(0, 256, (2, 6, 6), np.uint8)
    picture = rng.integers(0, 256, (2, 5, 7, 3), np.uint8)
    points = rng.uniform(-0.5, 4.5, (2, 3, 4)).astype(np.float32)
    grey = sample_grey(
        jnp.asarray(texture), 1, jnp.asarray(points[0] / 6), jnp.asarray(points[1] / 6)
    )
    colour = sample_picture(
        jnp.asarray(picture),
        jnp.int32(1),
        jnp.asarray(points[1]),
        jnp.asarray(points[0]),
        jnp.float32([5, 7]),
    )
    for place in np.ndindex(3, 4):
        u, v = points[0][place], points[1][place]
        i, j = int(np.floor(v)), int(np.floor(u))
        corners = [(i + a, j + b, (1 - abs(v - i - a)) * (1 - abs(u - j - b)))
                   for a in (0, 1) for b in (0, 1)]  # fmt: skip
        wrapped = sum(w * texture[1, r % 6, c % 6] for r, c, w in corners) / 255
        np.testing.assert_allclose(grey[place], wrapped, atol=1e-4)
        r, c = np.clip(v, 0, 4), np.clip(u, 0, 6)
        i, j = int(r), int(c)
        clipped = sum(
            (1 - abs(r - i - a)) * (1 - abs(c - j - b))
            * picture[1, min(i + a, 4), min(j + b, 6)].astype(float)
            for a in (0, 1) for b in (0, 1)
        ) / 255  # fmt: skip
        np.testing.assert_allclose(colour[place], clipped, atol=1e-4)


def test_pixel_grid_covers_the_frame():
    x, y = pixel_grid(4, 8)
    np.testing.assert_allclose(y[:, 0], [0.125, 0.375, 0.625, 0.875])
    np.testing.assert_allclose(x[0, [0, -1]], [0.125, 1.875], rtol=1e-6)


def test_sources_survive_saving(tmp_path):
    made = make_sources(3)
    made.save(tmp_path / "sources.npz")
    loaded = Sources.load(tmp_path / "sources.npz")
    for name, value in vars(made).items():
        if name != "clip":  # JPEG; random blocks are the worst that it can get
            np.testing.assert_array_equal(getattr(loaded, name), value)
    assert loaded.clip.shape == made.clip.shape
    error = loaded.clip.astype(float) - made.clip
    assert np.sqrt(np.square(error).mean()) < 8.0


def test_reading_wheels(tmp_path):
    with zipfile.ZipFile(tmp_path / "some_package-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("data/file.txt", "text")
    assert read_wheel(tmp_path, "some_package-1.0", "data/file.txt") == b"text"
    with pytest.raises(FileNotFoundError, match=r"has no wheel other-2\.0-\*\.whl"):
        read_wheel(tmp_path, "other-2.0", "file")

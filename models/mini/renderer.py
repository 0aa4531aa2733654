"""Renders the scenes of `models.mini.scenes` in JAX, where the model trains.

Everything is a function of pixel position and time, so XLA fuses it; textures,
pictures and footage stay on the device and are read bilinearly.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from draft_jax.pytree import register_named_tuple
from models.mini.backgrounds import draw_background
from models.mini.noise import sample_picture
from models.mini.shapes import draw_object
from models.mini.sources import Sources
from models.mini.stages import VideoSize

AnyArray = Array | np.ndarray
Scenes = Mapping[str, AnyArray]
Video = Float[Array, "B T Y X 3"]


@register_named_tuple
class SceneBatch(NamedTuple):
    """Parameters of `sample_batch`; a kind without videos is empty."""

    procedural: dict[str, AnyArray]  # moving objects
    pictures: dict[str, AnyArray]  # camera moves over pictures
    clips: dict[str, AnyArray]  # cuts from footage


def device_sources(sources: Sources) -> dict[str, Array]:
    """Puts the arrays of `sources` on the default device, uint8."""
    return {name: jnp.asarray(getattr(sources, name)) for name in vars(sources)}


def render_batch(
    procedural: Scenes,
    pictures: Scenes,
    clips: Scenes,
    sources: dict[str, Array],
    *,
    height: int,
    width: int,
) -> Video:
    """Renders a batch of `sample_batch`, in its order.

    Args:
      procedural: Parameters of moving objects; a kind without videos is empty.
      pictures: Parameters of camera moves over pictures.
      clips: Parameters of cuts from footage.
      sources: From `device_sources`.
      height: Rows of pixels.
      width: Columns of pixels.

    Returns:
      float32 videos in [-1, 1].
    """
    kinds = (
        (procedural, render_procedural),
        (pictures, render_pictures),
        (clips, render_clips),
    )
    videos = [
        render(scenes, sources, height=height, width=width)
        for scenes, render in kinds
        if scenes
    ]
    return jnp.concatenate(videos) * 2.0 - 1.0


def render_scenes(
    scenes: SceneBatch, sources: dict[str, Array], size: VideoSize
) -> Video:
    """Renders a batch at a size of a training; see `render_batch`."""
    return render_batch(*scenes, sources, height=size.height, width=size.width)


def pixel_grid(height: int, width: int) -> tuple[Array, Array]:
    """Returns x and y of the centres of square pixels in frame heights."""
    x = (jnp.arange(width) + 0.5) / height
    y = (jnp.arange(height) + 0.5) / height
    grid_x, grid_y = jnp.meshgrid(x, y)
    return grid_x, grid_y


def render_procedural(
    scenes: Scenes, sources: dict[str, Array], *, height: int, width: int
) -> Video:
    """Renders objects over a background, in [0, 1]."""
    x, y = pixel_grid(height, width)
    moving = ("x", "y", "angle", "radius")

    def render_frame(scene, time, frame):
        image = draw_background(scene, time, x, y, sources["textures"])
        for slot in range(scene["shape"].shape[0]):
            thing = {
                name: scene[name][slot] for name in ("shape", "colour", "ground", "way")
            } | {name: scene[name][slot, frame] for name in moving}
            image = draw_object(image, thing, x, y, 1.0 / height, sources["silhouette"])
        return jnp.clip(image, 0.0, 1.0)

    def render(scene):
        frames = jnp.arange(scene["times"].shape[0])
        in_time = jax.vmap(render_frame, in_axes=(None, 0, 0))
        return in_time(scene, scene["times"], frames)

    return jax.vmap(render)(scenes)


def render_pictures(
    scenes: Scenes, sources: dict[str, Array], *, height: int, width: int
) -> Video:
    """Renders camera moves over the pictures, in [0, 1]."""

    def render_frame(picture, view):
        size = sources["sizes"][picture]
        rows, columns = _window(view, size, height, width)
        return sample_picture(sources["pictures"], picture, rows, columns, size)

    return jax.vmap(jax.vmap(render_frame))(scenes["picture"], scenes["path"])


def render_clips(
    scenes: Scenes, sources: dict[str, Array], *, height: int, width: int
) -> Video:
    """Renders crops of the footage, in [0, 1]."""
    size = jnp.asarray(sources["clip"].shape[1:3], jnp.float32)

    def render_frame(frame, view):
        rows, columns = _window(view, size, height, width)
        return sample_picture(sources["clip"], frame, rows, columns, size)

    return jax.vmap(jax.vmap(render_frame))(scenes["frame"], scenes["path"])


def _window(view, size, height: int, width: int):
    """Returns rows and columns of a picture under each output pixel.

    The window is pushed back inside the picture where it would look past the edge.
    """
    centre_x, centre_y, zoom = view[0], view[1], jnp.maximum(view[2], 1.0)
    aspect = width / height
    window_rows = jnp.minimum(size[0], size[1] / aspect) / zoom
    window_columns = window_rows * aspect
    top = jnp.clip(centre_y * size[0] - window_rows / 2, 0.0, size[0] - window_rows)
    left = jnp.clip(
        centre_x * size[1] - window_columns / 2, 0.0, size[1] - window_columns
    )
    rows = top + (jnp.arange(height) + 0.5) / height * window_rows - 0.5
    columns = left + (jnp.arange(width) + 0.5) / width * window_columns - 0.5
    return rows[:, None] + jnp.zeros(width), columns[None, :] + jnp.zeros((height, 1))

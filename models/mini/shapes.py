"""Moving objects of procedural scenes; `SHAPES` in captions.py numbers them.

A shape has a frame of its own: centre 0, radius 1, y down. At each point it gives its
colour and the distance to its outline, negative inside. Distances need to be right near
the outline only.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from models.mini.noise import blend, smooth_step

Thing = dict[str, Array]


def draw_object(
    image: Array, thing: Thing, x: Array, y: Array, pixel: float, silhouette: Array
) -> Array:
    """Draws an object, and its shadow where there is ground, over an image."""
    image = _draw_shadow(image, thing, x, y)
    radius = thing["radius"]
    u, v = (x - thing["x"]) / radius, (y - thing["y"]) / radius
    cosine, sine = jnp.cos(thing["angle"]), jnp.sin(thing["angle"])
    turned = (u * cosine + v * sine, v * cosine - u * sine)
    shapes = (
        _ball, _striped_ball, _box, _triangle, _star, _ring, _heart,
        _diamond, _cross, _bar, _horse, _car, _boat, _balloon,
    )  # fmt: skip
    branches = [
        lambda thing, flat, turned, shape=shape: shape(thing, flat, turned, silhouette)
        for shape in shapes
    ]
    colour, distance = jax.lax.switch(thing["shape"], branches, thing, (u, v), turned)
    cover = jnp.clip(0.5 - distance * radius / pixel, 0.0, 1.0)
    return blend(image, jnp.clip(colour, 0.0, 1.0), cover)


def _draw_shadow(image: Array, thing: Thing, x: Array, y: Array) -> Array:
    ground, radius = thing["ground"], thing["radius"]
    lift = jnp.maximum(ground - thing["y"] - radius, 0.0)
    spread = radius * (0.9 + 0.5 * lift)
    distance = jnp.hypot((x - thing["x"]) / spread, (y - ground) / (0.22 * spread))
    dark = 0.45 * (1 - smooth_step(0.55, 1.15, distance)) * jnp.clip(1 - lift, 0.2, 1)
    return image * (1 - dark * (ground > 0))[..., None]


def _flat(thing: Thing, v: Array, distance: Array) -> tuple[Array, Array]:
    """Paints one colour, lighter above, with a darker rim."""
    rim = 0.72 + 0.28 * smooth_step(0.03, 0.13, -distance)
    light = (1.02 - 0.18 * v) * rim
    return thing["colour"] * light[..., None], distance


def _sphere_light(flat) -> tuple[Array, Array]:
    """Returns light and highlight of a sphere lit from the upper left."""
    u, v = flat
    depth = jnp.sqrt(jnp.clip(1 - u * u - v * v, 0.0, 1.0))
    facing = -0.45 * u - 0.55 * v + 0.7 * depth
    highlight = jnp.exp(-((jnp.hypot(u + 0.36, v + 0.42) / 0.17) ** 2))
    return 0.42 + 0.68 * jnp.clip(facing, 0.0, 1.0), highlight


def _ball(thing, flat, turned, silhouette):
    light, highlight = _sphere_light(flat)
    colour = thing["colour"] * light[..., None] + 0.55 * highlight[..., None]
    return colour, jnp.hypot(*flat) - 1


def _striped_ball(thing, flat, turned, silhouette):
    light, highlight = _sphere_light(flat)
    angle = jnp.arctan2(turned[1], turned[0])
    share = jnp.clip(0.5 + 3.0 * jnp.sin(3 * angle), 0.0, 1.0)
    base = jnp.zeros((*light.shape, 3)) + jnp.array([0.96, 0.96, 0.93])
    stripes = blend(base, thing["colour"], share)
    colour = stripes * light[..., None] + 0.4 * highlight[..., None]
    return colour, jnp.hypot(*flat) - 1


def _rectangle(u, v, half_u: float, half_v: float, corner: float = 0.08) -> Array:
    du, dv = jnp.abs(u) - half_u + corner, jnp.abs(v) - half_v + corner
    outside = jnp.hypot(jnp.maximum(du, 0), jnp.maximum(dv, 0))
    return outside + jnp.minimum(jnp.maximum(du, dv), 0) - corner


def _box(thing, flat, turned, silhouette):
    u, v = turned
    distance = _rectangle(u, v, 0.86, 0.86)
    colour, _ = _flat(thing, flat[1], distance)
    frame = jnp.abs(_rectangle(u, v, 0.62, 0.62)) - 0.04
    return colour * (1 - 0.2 * (1 - smooth_step(0.0, 0.05, frame)))[..., None], distance


def _polygon(u, v, corners: int, turn: float) -> Array:
    """Returns the distance to a regular polygon with corners on the unit circle."""
    sector = 2 * jnp.pi / corners
    angle = jnp.arctan2(v, u) + turn
    folded = jnp.abs((angle % sector) - sector / 2)
    return jnp.hypot(u, v) * jnp.cos(folded) - jnp.cos(sector / 2)


def _triangle(thing, flat, turned, silhouette):
    u, v = turned
    distance = _polygon(u, v - 0.25, 3, jnp.pi / 2) * 0.9
    return _flat(thing, flat[1], distance - 0.1)


def _star(thing, flat, turned, silhouette):
    u, v = turned
    sector = 2 * jnp.pi / 5
    angle = jnp.arctan2(v, u) + jnp.pi / 2
    folded = jnp.abs(((angle + sector / 2) % sector) - sector / 2)
    p, q = jnp.hypot(u, v) * jnp.cos(folded), jnp.hypot(u, v) * jnp.sin(folded)
    # The line from the tip (1, 0) to the inner corner at radius 0.45.
    inner_p, inner_q = 0.45 * jnp.cos(sector / 2), 0.45 * jnp.sin(sector / 2)
    length = jnp.hypot(inner_p - 1, inner_q)
    distance = ((p - 1) * inner_q - q * (inner_p - 1)) / length
    return _flat(thing, flat[1], distance - 0.04)


def _ring(thing, flat, turned, silhouette):
    distance = jnp.abs(jnp.hypot(*flat) - 0.74) - 0.25
    spokes = jnp.minimum(jnp.abs(turned[0]), jnp.abs(turned[1])) - 0.06
    spokes = jnp.maximum(spokes, jnp.hypot(*flat) - 0.8)
    return _flat(thing, flat[1], jnp.minimum(distance, spokes))


def _heart(thing, flat, turned, silhouette):
    u, v = jnp.abs(turned[0]), 0.35 - turned[1]
    upper = jnp.hypot(u - 0.42, v - 0.3) - 0.52
    lower = jnp.maximum((u * 0.78 - v * 0.62) - 0.46, v - 0.4)
    lower = jnp.maximum(lower, -v - 1.3)
    return _flat(thing, flat[1], jnp.minimum(upper, lower))


def _diamond(thing, flat, turned, silhouette):
    distance = (jnp.abs(turned[0]) * 1.35 + jnp.abs(turned[1]) - 1) * 0.6
    return _flat(thing, flat[1], distance)


def _cross(thing, flat, turned, silhouette):
    u, v = turned
    arms = jnp.minimum(_rectangle(u, v, 0.95, 0.32), _rectangle(u, v, 0.32, 0.95))
    return _flat(thing, flat[1], arms)


def _bar(thing, flat, turned, silhouette):
    u, v = turned
    return _flat(thing, flat[1], _rectangle(u, v, 1.0, 0.3))


def _horse(thing, flat, turned, silhouette):
    side = silhouette.shape[0]
    # The picture looks to the right; the outline is where it crosses one half.
    column = (turned[0] * thing["way"] * 0.5 + 0.5) * side - 0.5
    row = (turned[1] * 0.5 + 0.5) * side - 0.5
    i, j = jnp.floor(row), jnp.floor(column)
    down, right = row - i, column - j
    i, j = i.astype(jnp.int32), j.astype(jnp.int32)

    def read(r, c):
        inside = (r >= 0) & (r < side) & (c >= 0) & (c < side)
        r, c = jnp.clip(r, 0, side - 1), jnp.clip(c, 0, side - 1)
        return silhouette[r, c].astype(jnp.float32) / 255 * inside

    top = read(i, j) * (1 - right) + read(i, j + 1) * right
    bottom = read(i + 1, j) * (1 - right) + read(i + 1, j + 1) * right
    # Steep enough that nothing is left of a small horse's colour far outside it.
    distance = (0.5 - (top * (1 - down) + bottom * down)) * 0.3
    colour = thing["colour"] * (1.05 - 0.25 * flat[1])[..., None]
    return colour, distance


def _paint(colour: Array, part: Array, distance: Array) -> Array:
    """Paints a part in its own colour over the rest."""
    return blend(colour, part, 1 - smooth_step(-0.02, 0.03, distance))


def _car(thing, flat, turned, silhouette):
    u, v = turned[0] * thing["way"], turned[1]
    body = _rectangle(u, v - 0.35, 1.05, 0.32, 0.18)
    cabin = _rectangle(u + 0.1, v + 0.15, 0.62, 0.38, 0.25)
    window = _rectangle(jnp.abs(u + 0.1) - 0.27, v + 0.12, 0.2, 0.2, 0.06)
    wheel = jnp.hypot(jnp.abs(u) - 0.58, v - 0.7) - 0.29
    shell = jnp.minimum(body, cabin)
    colour, _ = _flat(thing, flat[1], shell)
    colour = _paint(colour, jnp.array([0.7, 0.85, 0.95]), window)
    lamp = jnp.hypot(u - 0.92, v - 0.28) - 0.1
    colour = _paint(colour, jnp.array([1.0, 0.95, 0.6]), lamp)
    colour = _paint(colour, jnp.array([0.1, 0.1, 0.11]), wheel)
    colour = _paint(colour, jnp.array([0.75, 0.75, 0.78]), wheel + 0.17)
    return colour, jnp.minimum(shell, wheel)


def _boat(thing, flat, turned, silhouette):
    u, v = turned[0] * thing["way"], turned[1]
    side = (jnp.abs(u) + 0.45 * (v - 0.55) - 0.95) * 0.9
    hull = jnp.maximum(side, jnp.abs(v - 0.75) - 0.25)
    mast = _rectangle(u, v + 0.2, 0.05, 0.8, 0.02)
    sail = jnp.maximum(0.1 - u, v - 0.35)
    sail = jnp.maximum(sail, (u * 0.8 - v * 0.6) - 0.62)
    jib = jnp.maximum(u + 0.1, jnp.maximum(v - 0.35, (-u * 0.85 - v * 0.5) - 0.45))
    sails = jnp.minimum(sail, jib)
    colour, _ = _flat(thing, flat[1], hull)
    colour = _paint(colour, jnp.array([0.97, 0.96, 0.92]), sails)
    colour = _paint(colour, jnp.array([0.35, 0.22, 0.12]), mast)
    return colour, jnp.minimum(jnp.minimum(hull, mast), sails)


def _balloon(thing, flat, turned, silhouette):
    u, v = turned
    bag = jnp.hypot(u, jnp.where(v + 0.25 > 0, 0.8, 1.0) * (v + 0.25)) - 0.75
    basket = _rectangle(u, v - 0.87, 0.2, 0.14, 0.03)
    rope = jnp.maximum(
        jnp.abs(jnp.abs(u) - 0.25 + 0.12 * v) - 0.03, jnp.abs(v - 0.65) - 0.2
    )
    light, highlight = _sphere_light((u / 0.75, (v + 0.25) / 0.85))
    share = jnp.clip(
        0.5 + 3 * jnp.sin(9 * u / jnp.sqrt(jnp.clip(1.1 - v * v, 0.3, 2))), 0, 1
    )
    pale = thing["colour"] + 0.5 * (1 - thing["colour"])
    colour = blend(pale + jnp.zeros((*u.shape, 3)), thing["colour"], share)
    colour = colour * light[..., None] + 0.2 * highlight[..., None]
    dark = jnp.array([0.4, 0.25, 0.12])
    colour = _paint(colour, dark, jnp.minimum(basket, rope))
    return colour, jnp.minimum(bag, jnp.minimum(basket, rope))

"""The backgrounds of procedural scenes; `BACKGROUNDS` in captions.py numbers them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from models.mini.noise import (
    blend,
    cloud_noise,
    noise,
    random_at,
    sample_grey,
    smooth_step,
)

Scene = dict[str, Array]
EDGE = 0.008  # width of a soft edge, in frame heights: under one pixel of 96


def draw_background(scene: Scene, time, x, y, textures) -> Array:
    """Draws the scene without its objects, colours in [0, 1]."""
    painters = (
        _meadow, _desert, _snow, _sea, _sunset, _night, _brick,
        _checkerboard, _stripes, _plain, _sky, _road, _forest,
    )  # fmt: skip
    branches = [
        lambda scene, time, paint=paint: paint(scene, time, x, y, textures)
        for paint in painters
    ]
    return jax.lax.switch(scene["background"], branches, scene, time)


def _colour(red: float, green: float, blue: float) -> Array:
    return jnp.array([red, green, blue], jnp.float32)


def _ramp(top: Array, bottom: Array, share: Array) -> Array:
    return top + (bottom - top) * jnp.clip(share, 0.0, 1.0)[..., None]


def _cloudy(
    scene: Scene, time, x, y, top: Array, bottom: Array, amount: float
) -> Array:
    """Draws a sky that grows paler downwards, with drifting clouds."""
    sky = _ramp(top, bottom, y / scene["horizon"])
    shift = scene["random"][0] * 40
    clouds = cloud_noise(x * 2.2 + shift + 0.25 * time, y * 4.5 + shift)
    cover = smooth_step(0.62 - amount, 0.92 - amount, clouds)
    return blend(sky, _colour(1.0, 1.0, 1.0), 0.9 * cover)


def _hills(scene: Scene, x, height: float, row: int) -> Array:
    """Returns the upper edge of a row of hills."""
    phase = scene["random"][row] * 6.3
    wave = jnp.sin(3.1 * x + phase) + 0.5 * jnp.sin(6.7 * x + 2 * phase)
    return scene["horizon"] - height + 0.03 * wave


def _disc(x, y, centre_x, centre_y, radius: float) -> Array:
    distance = jnp.hypot(x - centre_x, y - centre_y)
    return 1 - smooth_step(radius - EDGE, radius + EDGE, distance)


def _textured(scene: Scene, x, y, textures, index: int, colour: Array) -> Array:
    """Draws ground of a colour, with the grain of a real surface."""
    u, v = x * 0.55 + scene["random"][2], y * 0.75 + scene["random"][3]
    grain = sample_grey(textures, index, u, v) - 0.5
    depth = (y - scene["horizon"]) / (1 - scene["horizon"])
    light = 0.8 + 0.3 * depth + 0.55 * grain * jnp.clip(0.3 + depth, 0, 1)
    return colour * light[..., None]


def _below(edge: Array, y) -> Array:
    return smooth_step(-EDGE, EDGE, y - edge)


def _meadow(scene: Scene, time, x, y, textures) -> Array:
    sky = _cloudy(
        scene, time, x, y, _colour(0.25, 0.52, 0.9), _colour(0.75, 0.88, 0.98), 0.12
    )
    far = blend(sky, _colour(0.3, 0.52, 0.38), _below(_hills(scene, x, 0.05, 1), y))
    grass = _textured(scene, x, y, textures, 0, _colour(0.3, 0.66, 0.16))
    return blend(far, grass, _below(scene["horizon"], y))


def _desert(scene: Scene, time, x, y, textures) -> Array:
    sky = _ramp(_colour(0.35, 0.6, 0.9), _colour(0.99, 0.9, 0.72), y / scene["horizon"])
    sun_x = 0.2 + scene["random"][0]
    sky = blend(sky, _colour(1.0, 0.97, 0.8), _disc(x, y, sun_x, 0.2, 0.08))
    image = sky
    for row, (lift, shade) in enumerate(((0.08, 0.8), (0.0, 0.9), (-0.14, 1.0))):
        edge = _hills(scene, x * 0.7 + row, lift, row + 1)
        depth = jnp.maximum(y - edge, -0.2)  # above the edge nothing is drawn
        ripples = 0.05 * jnp.sin(90 * depth / (0.4 + depth) + 6 * x)
        light = shade + ripples + 0.12 * jnp.sin(3 * x + row)
        sand = _colour(0.93, 0.74, 0.42) * light[..., None]
        image = blend(image, sand, _below(edge, y))
    return image


def _snow(scene: Scene, time, x, y, textures) -> Array:
    sky = _ramp(
        _colour(0.55, 0.66, 0.8), _colour(0.8, 0.86, 0.93), y / scene["horizon"]
    )
    far = blend(sky, _colour(0.75, 0.82, 0.92), _below(_hills(scene, x, 0.09, 1), y))
    ground = _ramp(_colour(0.86, 0.9, 0.97), _colour(0.98, 0.98, 1.0), 2 * y - 1)
    image = blend(far, ground, _below(_hills(scene, x, 0.0, 2), y))
    for layer, (cell, speed, radius) in enumerate(
        ((0.13, 0.3, 0.2), (0.2, 0.45, 0.17))
    ):
        u = x / cell + 0.4 * jnp.sin(time + layer)
        v = (y - speed * time) / cell + scene["random"][0] * 20
        i, j = jnp.floor(u), jnp.floor(v)
        offset_x = 0.3 + 0.4 * random_at(i + 7 * layer, j)
        offset_y = 0.3 + 0.4 * random_at(i, j + 11)
        flake = jnp.hypot(u - i - offset_x, v - j - offset_y)
        image = blend(
            image, _colour(1.0, 1.0, 1.0), 1 - smooth_step(radius - 0.1, radius, flake)
        )
    return image


def _waves(scene: Scene, time, x, y) -> Array:
    """Returns the light of waves, about 0; rows stand closer in the distance."""
    depth = jnp.maximum(y - scene["horizon"], 0.0) + 0.05
    phase = 6.3 * scene["random"][1]
    rows = jnp.sin(
        5.5 / depth + 3.5 * time + 1.5 * jnp.sin(2 * x / depth * 0.3 + phase)
    )
    chop = noise(x / depth * 0.9 + time, 3.0 / depth + 1.5 * time)
    return (0.5 * rows + chop - 0.5) * jnp.clip(4 * depth, 0.25, 1.0)


def _sea(scene: Scene, time, x, y, textures) -> Array:
    sky = _cloudy(
        scene, time, x, y, _colour(0.3, 0.6, 0.93), _colour(0.8, 0.92, 0.98), 0.06
    )
    depth = (y - scene["horizon"]) / (1 - scene["horizon"])
    water = _ramp(_colour(0.1, 0.38, 0.66), _colour(0.04, 0.24, 0.5), depth)
    light = _waves(scene, time, x, y)
    water = water + 0.2 * light[..., None] * _colour(0.7, 0.9, 1.0)
    return blend(sky, water, _below(scene["horizon"], y))


def _sunset(scene: Scene, time, x, y, textures) -> Array:
    horizon = scene["horizon"]
    sky = _ramp(_colour(0.3, 0.18, 0.48), _colour(0.99, 0.5, 0.2), (y / horizon) ** 1.5)
    sun_x = 0.4 + 0.55 * scene["random"][0]
    sun_y = horizon - 0.17 + 0.06 * time
    glow = jnp.exp(-4.0 * jnp.hypot(x - sun_x, y - sun_y))
    sky = sky + 0.35 * glow[..., None] * _colour(1.0, 0.7, 0.3)
    sky = blend(sky, _colour(1.0, 0.92, 0.6), _disc(x, y, sun_x, sun_y, 0.12))
    depth = (y - horizon) / (1 - horizon)
    water = _ramp(_colour(0.72, 0.33, 0.28), _colour(0.2, 0.1, 0.3), depth)
    light = _waves(scene, time, x, y)
    path = jnp.exp(-(((x - sun_x) / (0.1 + 0.15 * depth)) ** 2))
    shine = jnp.clip(0.35 + light, 0.0, 1.0) * path
    water = (
        water
        + (0.1 * light + 0.0)[..., None]
        + 0.7 * shine[..., None] * _colour(1.0, 0.65, 0.3)
    )
    return blend(sky, water, _below(horizon, y))


def _night(scene: Scene, time, x, y, textures) -> Array:
    sky = _ramp(
        _colour(0.02, 0.03, 0.12), _colour(0.1, 0.14, 0.32), y / scene["horizon"]
    )
    u, v = x / 0.11, y / 0.11 + 30 * scene["random"][1]
    i, j = jnp.floor(u), jnp.floor(v)
    star_x, star_y = 0.25 + 0.5 * random_at(i, j), 0.25 + 0.5 * random_at(j, i + 3)
    near = jnp.hypot(u - i - star_x, v - j - star_y)
    twinkle = 0.6 + 0.4 * jnp.sin(5 * time + 40 * random_at(i + 5, j))
    star = jnp.exp(-((near / 0.09) ** 2)) * twinkle * (random_at(i, j + 9) > 0.35)
    sky = sky + 0.9 * star[..., None]
    moon_x = 0.2 + 0.95 * scene["random"][0]
    moon = _disc(x, y, moon_x, 0.2, 0.1)
    craters = 0.9 + 0.1 * noise(x * 25, y * 25)
    sky = blend(sky, _colour(0.96, 0.94, 0.82) * craters[..., None], moon)
    ground = _ramp(_colour(0.06, 0.12, 0.12), _colour(0.12, 0.2, 0.16), 2 * y - 1)
    return blend(sky, ground, _below(_hills(scene, x, 0.02, 2), y))


def _brick(scene: Scene, time, x, y, textures) -> Array:
    height = 0.115
    v = y / height + scene["random"][0]
    row = jnp.floor(v)
    u = x / (2.1 * height) + 0.5 * (row % 2) + scene["random"][1]
    column = jnp.floor(u)
    inside_x = jnp.minimum(u - column, 1 - u + column) * 2.1
    inside = jnp.minimum(inside_x, jnp.minimum(v - row, 1 - v + row))
    shade = 0.8 + 0.3 * random_at(row + 40 * scene["random"][2], column)
    bricks = _colour(0.66, 0.27, 0.19) * shade[..., None]
    return blend(
        _colour(0.78, 0.74, 0.7) + 0 * bricks, bricks, smooth_step(0.04, 0.12, inside)
    )


def _checkerboard(scene: Scene, time, x, y, textures) -> Array:
    wall = _ramp(
        _colour(0.6, 0.68, 0.78), _colour(0.86, 0.89, 0.93), y / scene["horizon"]
    )
    depth = jnp.maximum(y - scene["horizon"], 0.0) + 0.07
    u = (x - 0.667) / depth * 0.55 + 8 + scene["random"][0]
    v = 0.5 / depth + scene["random"][1]
    soft = 0.03 + 0.012 / depth
    wave_u = jnp.sin(jnp.pi * u) / (soft * 6)
    wave_v = jnp.sin(jnp.pi * v) / (soft * 6)
    share = 0.5 + 0.5 * jnp.clip(wave_u, -1, 1) * jnp.clip(wave_v, -1, 1)
    floor = blend(_colour(0.12, 0.12, 0.14) + 0 * wall, _colour(0.93, 0.93, 0.9), share)
    return blend(wall, floor, _below(scene["horizon"], y))


def _stripes(scene: Scene, time, x, y, textures) -> Array:
    turn = jnp.floor(scene["random"][0] * 4) * jnp.pi / 4
    place = x * jnp.cos(turn) + y * jnp.sin(turn)
    wave = jnp.sin(2 * jnp.pi * (place / 0.3 + scene["random"][1] + 0.35 * time))
    share = jnp.clip(0.5 + 4.0 * wave, 0.0, 1.0)
    return blend(scene["colour_a"] + jnp.zeros((*x.shape, 3)), scene["colour_b"], share)


def _plain(scene: Scene, time, x, y, textures) -> Array:
    light = 1.05 - 0.25 * jnp.hypot(x - 0.667, y - 0.4)
    return 0.85 * scene["colour_a"] * light[..., None] + 0.08


def _sky(scene: Scene, time, x, y, textures) -> Array:
    whole = scene | {"horizon": jnp.float32(1.0)}
    top, bottom = _colour(0.16, 0.42, 0.86), _colour(0.62, 0.82, 0.98)
    return _cloudy(whole, time * 1.5, x, y, top, bottom, 0.14)


def _road(scene: Scene, time, x, y, textures) -> Array:
    sky = _cloudy(
        scene, time, x, y, _colour(0.35, 0.6, 0.92), _colour(0.85, 0.92, 0.98), 0.0
    )
    far = blend(sky, _colour(0.42, 0.5, 0.58), _below(_hills(scene, x, 0.07, 1), y))
    gravel = _textured(scene, x, y, textures, 1, _colour(0.66, 0.63, 0.6))
    return blend(far, gravel, _below(scene["horizon"], y))


def _forest(scene: Scene, time, x, y, textures) -> Array:
    sky = _ramp(
        _colour(0.55, 0.75, 0.85), _colour(0.87, 0.93, 0.9), y / scene["horizon"]
    )
    image = sky
    layers = ((0.17, 0.36, (0.28, 0.45, 0.36)), (0.23, 0.42, (0.1, 0.28, 0.17)))
    for layer, (spacing, height, green) in enumerate(layers):
        u = x / spacing + scene["random"][layer] * 9
        i = jnp.floor(u)
        tall = height * (0.65 + 0.35 * random_at(i, i * 0 + layer))
        top = scene["horizon"] + 0.04 - tall
        share = jnp.clip((y - top) / tall, 0.0, 1.0)
        # Branches: the outline widens in steps.
        half = 0.46 * (0.75 * share + 0.25 * jnp.modf(share * 4)[0]) * (share > 0)
        inside = smooth_step(-0.04, 0.04, half - jnp.abs(u - i - 0.5)) * (share > 0)
        shade = 0.85 + 0.3 * jnp.modf(share * 4)[0]
        image = blend(image, _colour(*green) * shade[..., None], inside)
    grass = _textured(scene, x, y, textures, 0, _colour(0.25, 0.45, 0.16))
    return blend(image, grass, _below(scene["horizon"], y))

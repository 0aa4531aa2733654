"""Smooth random sources of scenes, laid out like those that are built from wheels."""

import numpy as np

from models.mini.sources import PICTURES, TEXTURES, WINDOW, Sources


def make_sources(seed=0):
    """Makes pictures, footage, textures and a silhouette of random patches."""
    rng = np.random.default_rng(seed)
    n = len(PICTURES)

    def blobs(*shape):
        coarse = rng.integers(0, 256, (shape[0], 5, 5, *shape[3:]), np.uint8)
        rows, columns = shape[1] // 5 + 1, shape[2] // 5 + 1
        return coarse.repeat(rows, 1).repeat(columns, 2)[:, : shape[1], : shape[2]]

    return Sources(
        pictures=blobs(n, *WINDOW, 3),
        sizes=np.tile(np.asarray(WINDOW, np.float32), (n, 1)),
        clip=blobs(132, 48, 85, 3),
        textures=blobs(len(TEXTURES), 64, 64),
        silhouette=blobs(1, 64, 64)[0],
    )

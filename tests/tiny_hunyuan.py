"""Tiny HunyuanVideo models of fixtures, whose weights are seeded by their keys."""

import json
from pathlib import Path

import numpy as np
import safetensors

from models.hunyuan.config import HunyuanConfig
from models.hunyuan.convert import load_hunyuan_transformer
from models.hunyuan.transformer import HunyuanTransformer
from tests.fixtures.seeded_arrays import seeded_weight

FIXTURES = Path(__file__).parent / "fixtures"


def read_fixture(name):
    """Tensors of a fixture, and what its metadata say: dicts by name."""
    with safetensors.safe_open(FIXTURES / f"{name}.safetensors", "np") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    return tensors, {key: json.loads(text) for key, text in metadata.items()}


def seeded_weights(shapes):
    """Weights by key, in the layout of diffusers."""
    return {key: seeded_weight(key, tuple(shape)) for key, shape in shapes.items()}


def load_transformer(published, shapes, **changes) -> HunyuanTransformer:
    """A float32 transformer with tiles of 2 x 4 tokens."""
    options = {"tile": (2, 4), "dtype": "float32"} | changes
    config = HunyuanConfig.from_dict(published, **options)
    return load_hunyuan_transformer(seeded_weights(shapes), config)


def channels_last(array):
    return np.moveaxis(array, 1, -1)

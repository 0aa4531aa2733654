"""Weights of tiny transformers as published; see fixtures/make_wan_fixtures.py."""

import json
from pathlib import Path

import numpy as np
import safetensors.numpy

from models.wan.config import WanConfig

FIXTURES = Path(__file__).parent / "fixtures"
# Written out by the fixture script, independently of the table under test.
ORIGINAL_KEYS = {
    name: json.loads((FIXTURES / f"wan_{prefix}original_keys.json").read_text())
    for name, prefix in (("divided", ""), ("image", "image_"))
}
# Of "divided".
CONFIG = WanConfig(
    dim=24,
    ffn_dim=40,
    num_heads=2,
    num_layers=2,
    in_channels=4,
    out_channels=4,
    text_dim=10,
    text_length=7,
    freq_dim=16,
    tile=(2, 4),
    dtype="float32",
)


def load_published(name: str) -> dict[str, dict[str, np.ndarray]]:
    """Weights by layout: "diffusers" and "original" have the same arrays."""
    tensors = safetensors.numpy.load_file(FIXTURES / f"wan_{name}.safetensors")
    weights = {
        key.removeprefix("weights/"): value
        for key, value in tensors.items()
        if key.startswith("weights/")
    }
    original_keys = ORIGINAL_KEYS[name]
    assert weights.keys() == original_keys.keys()
    original = {original_keys[key]: value for key, value in weights.items()}
    return {"diffusers": weights, "original": original}

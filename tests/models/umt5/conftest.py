"""The fixtures that tests/fixtures/make_umt5_fixtures.py writes."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from flax import nnx

from models.umt5.config import UMT5Config
from models.umt5.convert import load_umt5_encoder
from models.umt5.encoder import UMT5Encoder
from models.umt5.text_encoder import UMT5TextEncoder
from models.umt5.tokenizer import UMT5Tokenizer

FIXTURES = Path(__file__).parents[2] / "fixtures"
TINY = UMT5Config(
    vocab_size=320,
    dim=12,
    num_heads=2,
    head_dim=4,
    ffn_dim=20,
    num_layers=2,
    dtype="float32",
)
CASES = ("far", "narrow_inner", "one_head", "wide_inner")


@dataclasses.dataclass(frozen=True)
class Case:
    """Weights, inputs and outputs of transformers' `UMT5EncoderModel`."""

    weights: dict[str, np.ndarray]
    published: dict
    ids: np.ndarray
    lengths: np.ndarray
    outputs: dict[str, np.ndarray]

    def model(self, **changes):
        """Our encoder with these weights, in float32 unless told otherwise."""
        dtypes = {"dtype": "float32", "param_dtype": "float32"}
        config = UMT5Config.from_dict(self.published, **(dtypes | changes))
        return load_umt5_encoder(self.weights, config)

    def original_weights(self):
        """The same arrays under the original Wan keys."""
        names = json.loads((FIXTURES / "umt5_original_keys.json").read_text())
        return {names[key]: value for key, value in self.weights.items()}


@pytest.fixture(scope="session")
def cases():
    """Every case by name."""
    found = {}
    for name in CASES:
        with safetensors.safe_open(FIXTURES / f"umt5_{name}.safetensors", "np") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            published = json.loads(file.metadata()["config"])
        groups = {"weights": {}, "inputs": {}, "outputs": {}}
        for key, value in tensors.items():
            group, key = key.split("/")
            groups[group][key] = value
        found[name] = Case(
            groups["weights"], published, **groups["inputs"], outputs=groups["outputs"]
        )
    return found


@pytest.fixture(scope="session")
def tokenizer():
    return UMT5Tokenizer(FIXTURES / "umt5_tokenizer", max_length=24)


@pytest.fixture(scope="session")
def text_encoder(tokenizer):
    """Random weights, with a table large enough for the tokenizer."""
    model = UMT5Encoder(TINY, rngs=nnx.Rngs(0))
    return UMT5TextEncoder(model=model, tokenizer=tokenizer)


def copy_of(text_encoder):
    """The same encoder with arrays of its own."""
    structure, state = nnx.split(text_encoder.model)
    model = nnx.merge(structure, jax.tree.map(jnp.copy, state))
    return dataclasses.replace(text_encoder, model=model)

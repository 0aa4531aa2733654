"""The fixtures that tests/fixtures/make_clip_fixtures.py writes."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors

from models.clip.config import CLIPVisionConfig
from models.clip.convert import load_clip_vision_encoder

FIXTURES = Path(__file__).parents[2] / "fixtures"
CASES = ("exact", "quick")


@dataclasses.dataclass(frozen=True)
class Case:
    """Weights, inputs and outputs of transformers' `CLIPVisionModel`."""

    weights: dict[str, dict[str, np.ndarray]]  # by layout
    published: dict
    images: np.ndarray
    pixels: np.ndarray
    tokens: np.ndarray

    def config(self, **changes):
        return CLIPVisionConfig.from_dict(self.published, **changes)

    def model(self, layout="transformers", **changes):
        return load_clip_vision_encoder(self.weights[layout], self.config(**changes))


def read_groups(path):
    """Arrays by the part of their name before the slash, and the metadata."""
    groups = {}
    with safetensors.safe_open(path, "np") as file:
        for name in file.keys():  # noqa: SIM118
            group, _, key = name.partition("/")
            groups.setdefault(group, {})[key] = file.get_tensor(name)
        return groups, file.metadata()


@pytest.fixture(scope="session")
def cases():
    """Every case by name."""
    found = {}
    for name in CASES:
        groups, metadata = read_groups(FIXTURES / f"clip_{name}.safetensors")
        images, outputs = groups.pop("inputs")["images"], groups.pop("outputs")
        # Version 4, which wrote the published files, saved a prefix.
        groups["transformers"] = {
            f"vision_model.{key}": value
            for key, value in groups["transformers_5"].items()
        }
        published = json.loads(metadata["config"])
        found[name] = Case(groups, published, images, **outputs)
    return found

"""Wan's autoencoders in small, with the seeded weights and inputs of the fixtures."""

import functools
import json
from pathlib import Path

import numpy as np
import safetensors
from flax import nnx

from models.checkpoints.rules import Lookup
from models.wan.vae.autoencoder import WanVAE
from models.wan.vae.config import WanVAEConfig
from models.wan.vae.convert import load_wan_vae, make_rules
from tests.fixtures.seeded_arrays import seeded_uniform, seeded_weight

FIXTURES = Path(__file__).parent / "fixtures"
FILES = ("vae_wan2_1.safetensors", "vae_wan2_2.safetensors")


@functools.cache
def load_fixture() -> tuple[dict[str, np.ndarray], dict[str, dict]]:
    """Outputs of diffusers and the configurations; see make_wan_vae_fixtures."""
    tensors, configs = {}, {}
    for name in FILES:
        with safetensors.safe_open(FIXTURES / name, "np") as file:
            tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            configs |= json.loads(file.metadata()["configs"])
    return tensors, configs


@functools.cache
def checkpoint_shapes(config: WanVAEConfig, layout: str) -> dict[str, tuple[int, ...]]:
    """Shape of every weight by key, as our table has them."""
    lookup = Lookup(make_rules(config, layout))
    model = nnx.eval_shape(lambda: WanVAE(config, rngs=nnx.Rngs(0)))
    shapes = {}
    for names, leaf in nnx.to_flat_state(nnx.state(model)):
        path = ".".join(map(str, names))
        ((key, rule),) = lookup.of_path(path)
        # An array of strides 0 stands in for weights of any size.
        array = np.broadcast_to(np.float32(0), leaf.shape)
        shapes[key] = rule.layout.save(array).shape
    return shapes


@functools.cache
def make_weights(case: str) -> dict[str, np.ndarray]:
    """Weights of a case by diffusers key."""
    shapes = checkpoint_shapes(make_config(case), "diffusers")
    return {key: seeded_weight(key, shape) for key, shape in shapes.items()}


def make_config(case: str, **changes) -> WanVAEConfig:
    """Configuration of a case of the fixture."""
    return WanVAEConfig.from_dict(load_fixture()[1][case], **changes)


@functools.cache
def make_model(case: str, **changes) -> WanVAE:
    """The model of a case, its configuration changed."""
    return load_wan_vae(make_weights(case), make_config(case, **changes))


def make_arrays(case: str) -> tuple[np.ndarray, np.ndarray]:
    """Inputs of a case: latents to decode, video to encode."""
    outputs, _ = load_fixture()
    video, latents = (outputs[f"{case}/{name}"].shape for name in ("video", "latents"))
    return (
        seeded_uniform(f"{case} latents", latents),
        seeded_uniform(f"{case} video", video) / 2,
    )

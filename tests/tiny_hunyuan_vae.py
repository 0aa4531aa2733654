"""HunyuanVideo's autoencoder in small, with the seeded weights of the fixtures."""

import functools
import json
from pathlib import Path

import numpy as np
import safetensors
from flax import nnx

from models.checkpoints.rules import Lookup
from models.hunyuan.vae.autoencoder import HunyuanVAE
from models.hunyuan.vae.config import HunyuanVAEConfig
from models.hunyuan.vae.convert import RULES, load_hunyuan_vae
from tests.fixtures.seeded_arrays import (
    seeded_norm_weight,
    seeded_uniform,
    seeded_weight,
)

FIXTURE = Path(__file__).parent / "fixtures" / "vae_hunyuan.safetensors"


@functools.cache
def load_fixture() -> tuple[dict[str, np.ndarray], dict[str, dict]]:
    """Outputs of diffusers and the configurations; see make_hunyuan_vae_fixtures."""
    with safetensors.safe_open(FIXTURE, "np") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return tensors, json.loads(file.metadata()["configs"])


@functools.cache
def checkpoint_shapes(config: HunyuanVAEConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every weight by key, as our table has them."""
    model = nnx.eval_shape(lambda: HunyuanVAE(config, rngs=nnx.Rngs(0)))
    lookup, shapes = Lookup(RULES), {}
    for names, leaf in nnx.to_flat_state(nnx.state(model)):
        path = ".".join(map(str, names))
        ((key, rule),) = lookup.of_path(path)
        # An array of strides 0 stands in for weights of any size.
        array = np.broadcast_to(np.float32(0), leaf.shape)
        shapes[key] = rule.layout.save(array).shape
    return shapes


def make_config(case: str, **changes) -> HunyuanVAEConfig:
    """Configuration of a case of the fixture."""
    return HunyuanVAEConfig.from_dict(load_fixture()[1][case], **changes)


def make_weights(case: str, seed: str = "0") -> dict[str, np.ndarray]:
    """Weights of a case by key."""
    return _make_weights(make_config(case), seed)


@functools.cache
def _make_weights(config: HunyuanVAEConfig, seed: str) -> dict[str, np.ndarray]:
    return {
        key: (
            seeded_norm_weight
            if "norm" in key and key.endswith("weight")
            else seeded_weight
        )(f"{seed} {key}", shape)
        for key, shape in checkpoint_shapes(config).items()
    }


def make_model(case: str, seed: str = "0", **changes) -> HunyuanVAE:
    """The model of a case, its configuration changed."""
    return _make_model(make_config(case, **changes), make_config(case), seed)


@functools.cache
def _make_model(
    config: HunyuanVAEConfig, seeded: HunyuanVAEConfig, seed: str
) -> HunyuanVAE:
    return load_hunyuan_vae(_make_weights(seeded, seed), config)


def make_arrays(case: str, seed: str = "0") -> tuple[np.ndarray, np.ndarray]:
    """Inputs of a case: latents to decode, video to encode."""
    outputs, _ = load_fixture()
    video, latents = (
        outputs[f"{case}/{seed}/{name}"].shape for name in ("video", "latents")
    )
    return (
        seeded_uniform(f"{seed} {case} latents", latents),
        seeded_uniform(f"{seed} {case} video", video) / 2,
    )

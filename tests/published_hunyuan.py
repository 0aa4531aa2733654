"""Weights of tiny HunyuanVideo transformers as published, in both layouts.

See fixtures/make_hunyuan_fixtures.py.
"""

import functools
import json
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import safetensors

from models.hunyuan.config import HunyuanConfig
from models.hunyuan.inputs import HunyuanInputs
from tests.fixtures.seeded_arrays import seeded_uniform, seeded_weight

FILE = Path(__file__).parent / "fixtures" / "hunyuan_transformer.safetensors"
CASES = ("wide", "divided", "ragged", "unguided")
TEXT_ROWS = 20

# Original key by diffusers key, from the names of HunyuanVideo's `models.py` and
# `token_refiner.py`; nothing is shared with the table under test.
_RENAMES = (
    (r"^x_embedder\.", "img_in."),
    (r"^time_text_embed\.timestep_embedder\.linear_1", "time_in.mlp.0"),
    (r"^time_text_embed\.timestep_embedder\.linear_2", "time_in.mlp.2"),
    (r"^time_text_embed\.guidance_embedder\.linear_1", "guidance_in.mlp.0"),
    (r"^time_text_embed\.guidance_embedder\.linear_2", "guidance_in.mlp.2"),
    (r"^time_text_embed\.text_embedder\.linear_1", "vector_in.in_layer"),
    (r"^time_text_embed\.text_embedder\.linear_2", "vector_in.out_layer"),
    (r"^context_embedder\.", "txt_in."),
    (r"^txt_in\.proj_in", "txt_in.input_embedder"),
    (
        r"^txt_in\.time_text_embed\.timestep_embedder\.linear_1",
        "txt_in.t_embedder.mlp.0",
    ),
    (
        r"^txt_in\.time_text_embed\.timestep_embedder\.linear_2",
        "txt_in.t_embedder.mlp.2",
    ),
    (r"^txt_in\.time_text_embed\.text_embedder", "txt_in.c_embedder"),
    (
        r"^txt_in\.token_refiner\.refiner_blocks\.(\d+)\.",
        r"txt_in.individual_token_refiner.blocks.\1.",
    ),
    (r"(txt_in.*)\.attn\.to_out\.0", r"\1.self_attn_proj"),
    (r"(txt_in.*)\.norm_out\.linear", r"\1.adaLN_modulation.1"),
    (r"(txt_in.*)\.ff\.net\.0\.proj", r"\1.mlp.fc1"),
    (r"(txt_in.*)\.ff\.net\.2", r"\1.mlp.fc2"),
    (r"^single_transformer_blocks\.", "single_blocks."),
    (r"^transformer_blocks\.", "double_blocks."),
    (r"(single_.*)\.norm\.linear", r"\1.modulation.linear"),
    (r"(single_.*)\.proj_out", r"\1.linear2"),
    (r"(single_.*)\.attn\.norm_(q|k)", r"\1.\2_norm"),
    (r"(double_.*)\.norm1\.linear", r"\1.img_mod.linear"),
    (r"(double_.*)\.norm1_context\.linear", r"\1.txt_mod.linear"),
    (r"(double_.*)\.attn\.norm_(q|k)\.", r"\1.img_attn_\2_norm."),
    (r"(double_.*)\.attn\.norm_added_(q|k)\.", r"\1.txt_attn_\2_norm."),
    (r"(double_.*)\.attn\.to_out\.0", r"\1.img_attn_proj"),
    (r"(double_.*)\.attn\.to_add_out", r"\1.txt_attn_proj"),
    (r"(double_.*)\.ff\.net\.0\.proj", r"\1.img_mlp.fc1"),
    (r"(double_.*)\.ff\.net\.2", r"\1.img_mlp.fc2"),
    (r"(double_.*)\.ff_context\.net\.0\.proj", r"\1.txt_mlp.fc1"),
    (r"(double_.*)\.ff_context\.net\.2", r"\1.txt_mlp.fc2"),
    (r"^norm_out\.linear", "final_layer.adaLN_modulation.1"),
    (r"^proj_out", "final_layer.linear"),
)
# Modules that the original stores as one, in the order of their rows.
_JOINED = (
    (r"^(txt_in.*)\.attn\.(to_q|to_k|to_v)\.", r"\1.self_attn_qkv."),
    (r"^(double_.*)\.attn\.(to_q|to_k|to_v)\.", r"\1.img_attn_qkv."),
    (r"^(double_.*)\.attn\.(add_q_proj|add_k_proj|add_v_proj)\.", r"\1.txt_attn_qkv."),
    (r"^(single_.*)\.(attn\.to_q|attn\.to_k|attn\.to_v|proj_mlp)\.", r"\1.linear1."),
)
_ORDER = ("to_q", "add_q_proj", "to_k", "add_k_proj", "to_v", "add_v_proj", "proj_mlp")


def original_key(key: str) -> str:
    """The original's key; several of diffusers have the same."""
    for pattern, replacement in _RENAMES + _JOINED:
        key = re.sub(pattern, replacement, key)
    return key


def _place(key: str) -> int:
    """Where the rows of a key stand among those that are stored with it."""
    return [part in key for part in _ORDER].index(True)


def to_original(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Weights in the original layout: joined, and halves of the last layer swapped."""
    parts: dict[str, list[str]] = {}
    for key in weights:
        parts.setdefault(original_key(key), []).append(key)
    original = {}
    for key, names in parts.items():
        in_order = sorted(names, key=_place) if len(names) > 1 else names
        value = np.concatenate([weights[name] for name in in_order])
        if "final_layer.adaLN" in key:
            scale, shift = np.split(value, 2)
            value = np.concatenate([shift, scale])
        original[key] = value
    return original


@functools.cache
def _described(name: str) -> dict:
    with safetensors.safe_open(FILE, "np") as file:
        return json.loads(file.metadata()[name])


def load_published(name: str) -> dict[str, dict[str, np.ndarray]]:
    """Weights of a case by layout."""
    shapes = _described(name)["shapes"].items()
    weights = {key: seeded_weight(key, tuple(shape)) for key, shape in shapes}
    return {"diffusers": weights, "original": to_original(weights)}


def config_of(name: str, **changes) -> HunyuanConfig:
    """Configuration of a case in float32."""
    options = {"text_length": TEXT_ROWS, "tile": (2, 4), "dtype": "float32"} | changes
    return HunyuanConfig.from_dict(_described(name)["config"], **options)


def inputs_of(name: str) -> HunyuanInputs:
    """Inputs of a case."""
    case, config = _described(name), config_of(name)
    batch = len(case["valid"])

    def draw(what, *shape):
        return seeded_uniform(f"hunyuan transformer {name} {what}", shape)

    latents = draw("latents", batch, config.in_channels, *case["size"])
    guidance = case["guidance"]
    return HunyuanInputs(
        latents=jnp.asarray(latents.transpose(0, 2, 3, 4, 1)),
        timesteps=jnp.asarray(case["timesteps"], jnp.float32),
        context=jnp.asarray(draw("text", batch, TEXT_ROWS, config.text_dim)),
        context_mask=jnp.arange(TEXT_ROWS) < jnp.asarray(case["valid"])[:, None],
        pooled=jnp.asarray(draw("pooled", batch, config.pooled_dim)),
        guidance=None if guidance is None else jnp.full(batch, guidance, jnp.float32),
    )


def velocity_of(name: str) -> np.ndarray:
    """What diffusers' model returns for a case, channels last."""
    with safetensors.safe_open(FILE, "np") as file:
        return file.get_tensor(name).transpose(0, 2, 3, 4, 1)

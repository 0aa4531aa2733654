"""Adapters that join layers as the checkpoint does, or otherwise."""

import numpy as np
import pytest

from models.checkpoints.lora import merge_lora
from models.hunyuan.convert import lora_names
from tests.cases import mostly_nightly
from tests.published_hunyuan import (
    config_of,
    load_published,
    original_key,
    to_original,
)

NAME, RANK = "divided", 3
CONFIG = config_of(NAME)
MODULES = {  # of the original, and of diffusers in the order of the original's rows
    "double_blocks.1.txt_attn_qkv": [
        f"transformer_blocks.1.attn.add_{name}_proj" for name in "qkv"
    ],
    "single_blocks.2.linear1": [
        f"single_transformer_blocks.2.{name}"
        for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    ],
    "double_blocks.0.img_mlp.fc1": ["transformer_blocks.0.ff.net.0.proj"],
    "final_layer.adaLN_modulation.1": ["norm_out.linear"],
}

QUICK = ("single_blocks.2.linear1",)  # joined, of unequal parts


@pytest.fixture(scope="module")
def published():
    return load_published(NAME)


def factors(name, weight):
    rng = np.random.default_rng(len(name))
    rows, columns = weight.shape
    return (
        rng.normal(size=(rows, RANK)).astype(np.float32),
        rng.normal(size=(RANK, columns)).astype(np.float32),
    )


def lora_of(modules, weights, spell=lambda name: name):
    """A LoRA on some modules, and the weights of its layout with it."""
    tensors, changed = {}, dict(weights)
    for name in modules:
        up, down = factors(name, weights[f"{name}.weight"])
        tensors[f"{spell(name)}.lora_A.weight"] = down
        tensors[f"{spell(name)}.lora_B.weight"] = up
        tensors[f"{spell(name)}.alpha"] = np.float32(RANK)
        changed[f"{name}.weight"] = weights[f"{name}.weight"] + up @ down
    return tensors, changed


def as_layout(weights, layout):
    return to_original(weights) if layout == "original" else weights


@pytest.mark.parametrize("original", mostly_nightly(MODULES, QUICK))
def test_an_adapter_of_diffusers_on_either_layout(published, original):
    tensors, changed = lora_of(MODULES[original], published["diffusers"])
    for layout, weights in published.items():
        merged = merge_lora(weights, tensors, lora_names(weights, CONFIG))
        assert merged.changes
        for key, expected in as_layout(changed, layout).items():
            np.testing.assert_allclose(merged[key], expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("original", mostly_nightly(MODULES, QUICK))
def test_an_adapter_of_the_original_on_either_layout(published, original):
    tensors, changed = lora_of([original], published["original"])
    weights = published["original"]
    merged = merge_lora(weights, tensors, lora_names(weights, CONFIG))
    np.testing.assert_allclose(
        merged[f"{original}.weight"], changed[f"{original}.weight"], rtol=0, atol=2e-6
    )
    weights = published["diffusers"]
    merged = merge_lora(weights, tensors, lora_names(weights, CONFIG))
    parts = [np.asarray(merged[f"{name}.weight"]) for name in MODULES[original]]
    got = np.concatenate(parts)
    if "adaLN" in original:  # its halves are swapped
        got = np.concatenate(np.split(got, 2)[::-1])
    np.testing.assert_allclose(got, changed[f"{original}.weight"], rtol=0, atol=2e-6)
    untouched = "transformer_blocks.0.attn.to_q.weight"
    assert original_key(untouched).startswith("double_blocks.0.img_attn_qkv")
    np.testing.assert_array_equal(merged[untouched], weights[untouched])


@pytest.mark.parametrize(
    "spell",
    [
        lambda name: f"transformer.{name}",
        lambda name: "lora_unet_" + name.replace(".", "_"),
        lambda name: (
            "diffusion_model."
            + name.replace("attn_qkv", "attn.qkv").replace("mlp.fc1", "mlp.0")
        ),
    ],
    ids=["prefix", "underscores", "comfyui"],
)
def test_spellings_of_tools(published, spell):
    modules = ["double_blocks.1.txt_attn_qkv", "double_blocks.0.img_mlp.fc1"]
    tensors, changed = lora_of(modules, published["original"], spell)
    weights = published["original"]
    merged = merge_lora(weights, tensors, lora_names(weights, CONFIG))
    for name in modules:
        np.testing.assert_allclose(
            merged[f"{name}.weight"], changed[f"{name}.weight"], rtol=0, atol=2e-6
        )

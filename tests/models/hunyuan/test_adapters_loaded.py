"""Adapters through `load_pipeline`: merged into HunyuanVideo, refused for another."""

import numpy as np
import pytest
import safetensors.numpy

from models.checkpoints.conversion import ConversionError
from models.diffusion.text_options import TextOptions
from models.loading import load_pipeline
from tests import hunyuan_folders
from tests.wan_folders import TEXT_TO_VIDEO

PROMPT, RANK, DIM = "a cat", 2, hunyuan_folders.CONFIG.dim
JOINED = "double_blocks.1.img_attn_qkv"  # of the original
APART = [f"transformer_blocks.1.attn.to_{name}" for name in "qkv"]
WAN = ["blocks.0.self_attn.k", "blocks.0.cross_attn.q", "blocks.0.ffn.0"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return hunyuan_folders.write_folders(tmp_path_factory.mktemp("hunyuan"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "prompts.safetensors"
    hunyuan_folders.write_embeddings(file, PROMPT)
    return TextOptions(embeddings=file, prompts=(PROMPT,))


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    hunyuan_folders.use_tiny_sizes(monkeypatch)


def write_adapter(file, modules, rows=DIM):
    """A LoRA of random factors on some modules, and its products by module."""
    rng = np.random.default_rng(0)
    tensors, products = {}, {}
    for name in modules:
        up = rng.normal(size=(rows, RANK)).astype(np.float32)
        down = rng.normal(size=(RANK, DIM)).astype(np.float32)
        tensors[f"diffusion_model.{name}.lora_A.weight"] = down
        tensors[f"diffusion_model.{name}.lora_B.weight"] = up
        tensors[f"diffusion_model.{name}.alpha"] = np.array(RANK, np.float32)
        products[name] = up @ down
    safetensors.numpy.save_file(tensors, file)
    return products


@pytest.mark.nightly
@pytest.mark.parametrize(
    "layout", ["original", pytest.param("diffusers", marks=pytest.mark.nightly)]
)
def test_adapters_are_merged_at_their_strengths(folders, text, tmp_path, layout):
    joined, apart = tmp_path / "joined.safetensors", tmp_path / "apart.safetensors"
    (whole,) = write_adapter(joined, [JOINED], 3 * DIM).values()
    products = write_adapter(apart, [*APART, WAN[1]])
    with pytest.warns(UserWarning, match="skipped 3 parts in 12 keys"):
        pipeline = load_pipeline(
            folders[layout],
            text=text,
            loras=[(joined, 0.5), (apart, 0.25)],
            lora_strict=False,
        )
    (file,) = (folders["diffusers"] / "transformer").glob("*.safetensors")
    weights = safetensors.numpy.load_file(file)
    attn = pipeline.model.transformer_blocks.attn
    layers = (attn.to_q, attn.to_k, attn.to_v)
    parts = zip(layers, APART, np.split(whole, 3), strict=True)
    for layer, name, rows in parts:
        change = 0.5 * rows + 0.25 * products[name]
        expected = weights[f"{name}.weight"] + change
        got = np.asarray(layer.kernel[1]).T
        np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6)
        before = weights[f"{name.replace('.1.', '.0.')}.weight"]
        np.testing.assert_array_equal(np.asarray(layer.kernel[0]).T, before)


@pytest.mark.parametrize(
    ("modules", "family"),
    [
        (WAN, "models with cross-attention, such as Wan's"),
        ([JOINED], "models with joint attention, such as HunyuanVideo"),
        pytest.param(
            APART,
            "models with joint attention, such as HunyuanVideo",
            marks=pytest.mark.nightly,
        ),
        pytest.param(
            ["lora_te1_layers_0_self_attn_k_proj"],
            "a text encoder",
            marks=pytest.mark.nightly,
        ),
    ],
    ids=["wan", "joined", "apart", "text-encoder"],
)
def test_adapters_of_another_family_are_refused_by_its_name(
    folders, tmp_path, modules, family
):
    file = tmp_path / "style.safetensors"
    write_adapter(file, modules)
    folder = TEXT_TO_VIDEO if "Hunyuan" in family else folders["diffusers"]
    with pytest.raises(ConversionError, match=f"is for .*{family}, not for this one"):
        load_pipeline(folder, parts=("transformer", "vae"), loras=[(file, 1.0)])

"""Adapters as Wan's users have them: every spelling, and parts for other models."""

import itertools
import re

import numpy as np
import pytest
import safetensors.numpy

from models.checkpoints.conversion import ConversionError
from models.checkpoints.lora import MergedArray, merge_lora
from models.wan.convert import LORA_FEATURES, lora_names
from tests.published_wan import load_published

CLOSE = {"rtol": 0, "atol": 5e-6}
pytestmark = pytest.mark.filterwarnings("ignore:.*does not say its alpha:UserWarning")


@pytest.fixture(scope="module")
def weights():
    """Published weights of a text-to-video model by layout."""
    return load_published("divided")


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def merge(source, lora, **options):
    names = lora_names(source)
    return merge_lora(source, lora, names, features=LORA_FEATURES, **options)


def changed(merged):
    return {key for key in merged if isinstance(merged[key], MergedArray)}


# A block's query projection as tools write it before the halves' names, and those.
SPELLINGS = [
    ("lora_unet__blocks_1_self_attn_q", "lora_down.weight", "lora_up.weight"),
    ("lora_transformer_blocks_1_attn1_to_q", "lora_down.weight", "lora_up.weight"),
    ("lycoris_blocks_1_self_attn_q", "lora_down.weight", "lora_up.weight"),
    ("model.diffusion_model.blocks.1.self_attn.q", "lora_A.weight", "lora_B.weight"),
    ("base_model.model.blocks.1.self_attn.q", "lora_A.turbo", "lora_B.turbo"),
    (
        "base_model.model.transformer.blocks.1.attn1.to_q",
        "lora_A.turbo.weight",
        "lora_B.turbo.weight",
    ),
    ("pipe.dit.blocks.1.self_attn.q", "lora_A.default.weight", "lora_B.default.weight"),
    ("transformer.blocks.1.attn1.to_q", "lora_A", "lora_B"),
    ("transformer.blocks.1.attn1.to_q_lora", "down.weight", "up.weight"),
    ("_orig_mod.blocks.1._orig_mod.self_attn.q", "lora_A.weight", "lora_B.weight"),
    ("lora_unet_blocks_1.self_attn.q", "lora_down.weight", "lora_up.weight"),
    ("unet.blocks.1.attn1.to_q", "lora.down.weight", "lora.up.weight"),
]


@pytest.mark.parametrize("layout", ["diffusers", "original"])
@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda parts: ".".join(parts[:2]))
def test_every_tool_spells_in_its_own_way(weights, layout, spelling):
    module, down_name, up_name = spelling
    down, up = draw(4, 24), draw(24, 4, seed=1)
    lora = {f"{module}.{down_name}": down, f"{module}.{up_name}": up}
    merged = merge(weights[layout], lora)
    key = {
        "diffusers": "blocks.1.attn1.to_q.weight",
        "original": "blocks.1.self_attn.q.weight",
    }[layout]
    assert changed(merged) == {key}
    expected = weights[layout][key] + up.astype(np.float64) @ down
    np.testing.assert_allclose(np.asarray(merged[key]), expected, **CLOSE)


@pytest.mark.parametrize("layout", ["diffusers", "original"])
@pytest.mark.parametrize(
    ("stem", "dot"), [("diffusion_model.", "."), ("lora_unet_", "_"), ("", ".")]
)
def test_the_step_distilled_adapter_of_lightx2v(weights, layout, stem, dot):
    """Its keys: matrices, biases, norms, and tables with the names of their blocks."""
    block = f"{stem}blocks{dot}1"
    lora = {
        f"{block}{dot}self_attn{dot}q.lora_down.weight": draw(4, 24),
        f"{block}{dot}self_attn{dot}q.lora_up.weight": draw(24, 4, seed=1),
        f"{block}{dot}self_attn{dot}q.diff_b": draw(24, seed=2),
        f"{block}{dot}self_attn{dot}norm_k.diff": draw(24, seed=3),
        f"{block}{dot}norm3.diff": draw(24, seed=4),
        f"{block}{dot}norm3.diff_b": draw(24, seed=5),
        f"{block}.diff_m": draw(1, 6, 24, seed=6),
        f"{stem}head.diff_m": draw(1, 2, 24, seed=7),
    }
    merged = merge(weights[layout], lora, scale=0.5)
    names = {
        "original": (
            "blocks.1.self_attn.q.weight",
            "blocks.1.self_attn.q.bias",
            "blocks.1.self_attn.norm_k.weight",
            "blocks.1.norm3.weight",
            "blocks.1.norm3.bias",
            "blocks.1.modulation",
            "head.modulation",
        ),
        "diffusers": (
            "blocks.1.attn1.to_q.weight",
            "blocks.1.attn1.to_q.bias",
            "blocks.1.attn1.norm_k.weight",
            "blocks.1.norm2.weight",
            "blocks.1.norm2.bias",
            "blocks.1.scale_shift_table",
            "scale_shift_table",
        ),
    }[layout]
    assert changed(merged) == set(names)
    down, up, *differences = lora.values()
    for key, change in zip(names, (up @ down, *differences), strict=True):
        expected = weights[layout][key] + 0.5 * change
        np.testing.assert_allclose(np.asarray(merged[key]), expected, **CLOSE)


def test_norms_of_lycoris_and_tables_without_their_first_axis(weights):
    source = weights["original"]
    lora = {
        "lycoris_blocks_0_norm3.w_norm": draw(24),
        "lycoris_blocks_0_norm3.b_norm": draw(24, seed=1),
        "diffusion_model.blocks.0.diff_m": draw(6, 24, seed=2),
    }
    merged = merge(source, lora)
    for key, value in zip(
        ("blocks.0.norm3.weight", "blocks.0.norm3.bias", "blocks.0.modulation"),
        lora.values(),
        strict=True,
    ):
        expected = source[key] + value
        np.testing.assert_allclose(np.asarray(merged[key]), expected, **CLOSE)


def image_adapter():
    """Two good keys, and those that only an image-to-video model has a place for."""
    block = "diffusion_model.blocks.0.cross_attn"
    image = {
        f"{block}.k_img.lora_down.weight": draw(4, 24),
        f"{block}.k_img.lora_up.weight": draw(24, 4),
        f"{block}.v_img.diff_b": draw(24),
        f"{block}.norm_k_img.diff": draw(24),
        "diffusion_model.img_emb.proj.1.lora_down.weight": draw(4, 24),
        "diffusion_model.img_emb.proj.1.lora_up.weight": draw(24, 4),
        "diffusion_model.patch_embedding.diff": draw(24, 36, 1, 2, 2),
    }
    good = {
        f"{block}.k.lora_down.weight": draw(4, 24, seed=1),
        f"{block}.k.lora_up.weight": draw(24, 4, seed=2),
    }
    return image, good


def test_parts_for_image_to_video_models_are_named_as_such(weights):
    image, good = image_adapter()
    with pytest.raises(ConversionError) as error:
        merge(weights["original"], image | good)
    head, *lines = str(error.value).splitlines()
    assert head == (
        "the adapter does not fit the weights; 7 problems in 9 keys (strict=False, or "
        "--lora-strict no, merges the rest):"
    )
    kinds = [line.strip().partition(": ") for line in lines]
    assert [kind for kind, _, _ in kinds] == ["another model"] * 6 + ["shape"]
    assert all(
        text.endswith("is for image-to-video models, not for this one")
        for kind, _, text in kinds
        if kind == "another model"
    )


def test_models_that_have_a_part_are_not_said_to_lack_it():
    source = load_published("image")["original"]
    block = "diffusion_model.blocks.99.cross_attn"
    lora = {f"{block}.v_img.diff_b": draw(24)}
    with pytest.raises(
        ConversionError, match=rf"unmatched: {block}\.v_img\.diff_b bel"
    ):
        merge(source, lora)


def test_they_can_be_skipped_with_a_note(weights):
    image, good = image_adapter()
    source = weights["original"]
    with pytest.warns(UserWarning, match="skipped 7 parts in 9 keys") as seen:
        merged = merge(source, image | good, strict=False)
    assert len([w for w in seen if "skipped" in str(w.message)]) == 1
    key = "blocks.0.cross_attn.k.weight"
    assert changed(merged) == {key}
    down, up = good.values()
    expected = source[key] + up.astype(np.float64) @ down
    np.testing.assert_allclose(np.asarray(merged[key]), expected, **CLOSE)


def test_what_is_damaged_is_never_skipped(weights):
    """Skipping is for what means nothing here; a lost half means something."""
    image, good = image_adapter()
    lora = image | dict([next(iter(good.items()))])
    with pytest.raises(ConversionError, match=r"; 1 problems in 8 keys:\n  half: "):
        merge(weights["original"], lora, strict=False)


def test_an_adapter_of_which_nothing_fits_is_refused(weights):
    image, _ = image_adapter()
    with pytest.raises(ConversionError, match="7 problems in 7 keys"):
        merge(weights["original"], image, strict=False)


@pytest.mark.parametrize(
    ("key", "method"),
    [("oft_blocks", "OFT"), ("a1.weight", "GLoRA"), ("vera_lambda_b", "VeRA")],
)
def test_other_methods_are_named(weights, key, method):
    lora = {f"diffusion_model.blocks.0.self_attn.q.{key}": draw(2, 2)}
    message = f"other method: .* is of a method that is not merged here: {method}"
    with pytest.raises(ConversionError, match=message):
        merge(weights["original"], lora)


@pytest.mark.parametrize("adapters", [("turbo", "style"), ("turbo", "style", "more")])
def test_two_adapters_in_one_file_are_not_mixed(weights, adapters):
    module = "blocks.0.self_attn.q"
    lora = {
        f"{module}.lora_{half}.{name}.weight": draw(*shape)
        for name, (half, shape) in itertools.product(
            adapters, (("A", (2, 24)), ("B", (24, 2)))
        )
    }
    message = (
        f"several adapters: {module}.lora_A.turbo.weight and {module}.lora_A.style."
        "weight are of two; expected one in a file"
    )
    with pytest.raises(ConversionError, match=re.escape(message)):
        merge(weights["original"], lora)


@pytest.mark.parametrize("strict", [True, False], ids=["refused", "skipped"])
def test_messages_are_short_whatever_a_file_holds(weights, tmp_path, strict):
    """Before, one line had 24,310 characters. Every kind is named."""
    folder = tmp_path / ("long" * 40)
    folder.mkdir()
    _, good = image_adapter()
    block = "diffusion_model.blocks"
    lora = good | {
        key: draw(2)
        for i in range(200)
        for key in (
            f"{block}.{i}.cross_attn.v_img.diff_b",
            f"{block}.{i}.self_attn.other",
            f"{block}.{i}.self_attn.q.oft_blocks",
            f"{block}.{i}.{'much' * 500}.diff",
        )
    }
    file = folder / "lora.safetensors"
    safetensors.numpy.save_file(lora, file)
    kinds = ("another model", "other method", "unknown kind", "unmatched")
    if strict:
        with pytest.raises(ConversionError, match="800 problems in 802 keys") as error:
            merge(weights["original"], file)
        message = str(error.value)
    else:
        with pytest.warns(UserWarning, match="skipped 800 parts") as seen:
            merge(weights["original"], file, strict=False)
        (message,) = (str(w.message) for w in seen if "skipped" in str(w.message))
    assert len(message) <= 1_500
    for kind in kinds:
        assert re.search(rf"^  {kind}: diffusion_model\.", message, re.MULTILINE)
        assert re.search(rf"^  {kind}: and 19\d more$", message, re.MULTILINE)

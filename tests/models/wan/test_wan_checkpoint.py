"""Folders as they are published, with small weights."""

import dataclasses
import itertools
import json
import shutil

import chex
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from flax import nnx

from models.checkpoints.conversion import ConversionError
from models.checkpoints.memory_map import CheckpointError
from models.checkpoints.safetensors_io import save_safetensors
from models.diffusion.folders.layouts import ALL_PARTS
from models.wan.checkpoint import (
    SchedulerSettings,
    WanFolder,
    open_wan_parts,
)
from models.wan.convert import load_wan_transformer
from models.wan.layouts import LAYOUTS as WAN_LAYOUTS
from tests.published_wan import CONFIG, FIXTURES, load_published

ORIGINAL_CONFIG = {
    "_class_name": "WanModel",
    "_diffusers_version": "0.30.0",
    "dim": 24,
    "eps": 1e-06,
    "ffn_dim": 40,
    "freq_dim": 16,
    "in_dim": 4,
    "model_type": "t2v",
    "num_heads": 2,
    "num_layers": 2,
    "out_dim": 4,
    "text_dim": 10,
    "text_len": 7,
}
# As diffusers 0.42.1 writes them.
UNIPC = {
    "_class_name": "UniPCMultistepScheduler",
    "_diffusers_version": "0.42.1",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "disable_corrector": [],
    "dynamic_thresholding_ratio": 0.995,
    "final_sigmas_type": "zero",
    "flow_shift": 3.0,
    "lower_order_final": True,
    "num_train_timesteps": 1000,
    "predict_x0": True,
    "prediction_type": "flow_prediction",
    "rescale_betas_zero_snr": False,
    "sample_max_value": 1.0,
    "shift_terminal": None,
    "sigma_max": None,
    "sigma_min": None,
    "solver_order": 2,
    "solver_p": None,
    "solver_type": "bh2",
    "steps_offset": 0,
    "thresholding": False,
    "time_shift_type": "exponential",
    "timestep_spacing": "linspace",
    "trained_betas": None,
    "use_beta_sigmas": False,
    "use_dynamic_shifting": False,
    "use_exponential_sigmas": False,
    "use_flow_sigmas": True,
    "use_karras_sigmas": False,
}
EULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "_diffusers_version": "0.42.1",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "invert_sigmas": False,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 5.0,
    "shift_terminal": None,
    "stochastic_sampling": False,
    "time_shift_type": "exponential",
    "use_beta_sigmas": False,
    "use_dynamic_shifting": False,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}
CHANGES = {"text_length": 7, "tile": (2, 4)}


def write_json(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def write_folders(root):
    """The same weights in both layouts; the transformer in shards."""
    fixture = FIXTURES / "wan_divided.safetensors"
    with safetensors.safe_open(fixture, "np") as stored:
        config = json.loads(stored.metadata()["config"])
    weights = load_published("divided")
    original, diffusers = root / "original", root / "diffusers"
    shards = {"stem": "diffusion_pytorch_model", "max_shard_bytes": 30_000}
    save_safetensors(weights["original"], original, **shards)
    write_json(original / "config.json", ORIGINAL_CONFIG)
    for name in ("models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth"):
        shutil.copy(FIXTURES / "torch_module.pth", original / name)
    write_json(original / "google" / "umt5-xxl" / "tokenizer.json", {})
    save_safetensors(weights["diffusers"], diffusers / "transformer", **shards)
    write_json(diffusers / "transformer" / "config.json", config)
    write_json(diffusers / "model_index.json", {"_class_name": "WanPipeline"})
    for part, stem in (("text_encoder", "model"), ("vae", "diffusion_pytorch_model")):
        tensors = {"0.bias": np.arange(2, dtype=np.float32)}
        save_safetensors(tensors, diffusers / part, stem=stem)
        write_json(diffusers / part / "config.json", {"part": part})
    write_json(diffusers / "tokenizer" / "tokenizer.json", {})
    write_json(diffusers / "scheduler" / "scheduler_config.json", UNIPC)
    return {"original": original, "diffusers": diffusers}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return write_folders(tmp_path_factory.mktemp("wan"))


@pytest.fixture
def copies(published, tmp_path):
    """The folders again, to be damaged."""
    for layout in ("original", "diffusers"):
        shutil.copytree(published[layout], tmp_path / layout)
    return tmp_path


LAYOUTS = pytest.mark.parametrize("layout", ["original", "diffusers"])


@LAYOUTS
def test_whole_folders_are_described(published, layout):
    folder = WanFolder.open(published[layout])
    assert (folder.path, folder.layout) == (published[layout], layout)
    assert not folder.is_pair
    expected = {"transformer", "text_encoder", "tokenizer", "vae"}
    if layout == "diffusers":
        expected.add("scheduler")
    assert folder.parts == expected
    config = folder.config(**CHANGES)
    assert dataclasses.replace(config, dtype="float32") == CONFIG
    tokenizer = {"original": "google/umt5-xxl", "diffusers": "tokenizer"}[layout]
    assert folder.tokenizer == published[layout] / tokenizer
    files = {
        "original": {
            "text_encoder": ["models_t5_umt5-xxl-enc-bf16.pth"],
            "vae": ["Wan2.1_VAE.pth"],
        },
        "diffusers": {
            "text_encoder": ["text_encoder/model.safetensors"],
            "vae": ["vae/diffusion_pytorch_model.safetensors"],
        },
    }[layout]
    assert len(folder.source("transformer").files) == 3
    for part in ("text_encoder", "vae"):
        assert folder.source(part).weights["0.bias"].shape == (2,)
        named = [published[layout] / name for name in files[part]]
        assert list(folder.source(part).files) == named
        config = None if layout == "original" else {"part": part}
        assert folder.part_config(part) == config


@LAYOUTS
def test_hidden_files_are_no_weights(copies, layout):
    """As macOS lays them beside files, downloads and editors beside what they write."""
    folder = copies / layout
    expected = {
        part: WanFolder.open(folder).source(part).files
        for part in ("transformer", "vae", "text_encoder")
    }
    for file in [file for file in folder.rglob("*") if file.is_file()]:
        (file.parent / f"._{file.name}").write_bytes(b"Mac OS X")
        (file.parent / f".{file.name}").write_bytes(file.read_bytes())
        cache = file.parent / ".cache"
        cache.mkdir(exist_ok=True)
        (cache / file.name).write_bytes(b"half")
    opened = WanFolder.open(folder)
    assert {part: opened.source(part).files for part in expected} == expected
    open_wan_parts(folder, **CHANGES).load_transformer()
    for file in itertools.chain(*expected.values()):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"lacks .*safetensors"):
        WanFolder.open(folder)


def test_hidden_files_are_no_model(tmp_path):
    for name in ("._Wan2.1_VAE.pth", "._diffusion_pytorch_model.safetensors"):
        (tmp_path / name).write_bytes(b"Mac OS X")
    assert WAN_LAYOUTS.find(tmp_path) is None


def assert_same_parameters(one, other):
    chex.assert_trees_all_equal(nnx.state(one), nnx.state(other), strict=True)


def test_both_layouts_load_to_the_same_model(published):
    original, diffusers = (
        open_wan_parts(published[layout], dtype="float32", **CHANGES)
        for layout in ("original", "diffusers")
    )
    config = original.config
    assert (config.dtype, config.param_dtype) == ("float32", "float32")
    expected = load_wan_transformer(load_published("divided")["diffusers"], config)
    assert_same_parameters(original.load_transformer(), expected)
    assert_same_parameters(diffusers.load_transformer(), expected)
    assert original.scheduler == SchedulerSettings()
    assert diffusers.scheduler == SchedulerSettings(grid="diffusers", shift=3.0)
    np.testing.assert_array_equal(diffusers.vae["0.bias"], [0, 1])
    assert set(original.text_encoder) == set(original.vae) > {"0.bias", "1.weight"}
    assert original.image_encoder is None


def test_narrow_weights_keep_what_is_computed_in_float32(published):
    parts = open_wan_parts(published["original"], **CHANGES)
    dtypes = {
        ".".join(map(str, path)): leaf.dtype.name
        for path, leaf in nnx.to_flat_state(nnx.state(parts.load_transformer()))
    }
    wide = {name for name, dtype in dtypes.items() if dtype == "float32"}
    embedder = "condition_embedder"
    assert wide == {
        f"{embedder}.time_embedder.linear_1.kernel",
        f"{embedder}.time_embedder.linear_1.bias",
        f"{embedder}.time_embedder.linear_2.kernel",
        f"{embedder}.time_embedder.linear_2.bias",
        f"{embedder}.time_proj.kernel",
        f"{embedder}.time_proj.bias",
        "scale_shift_table",
        "blocks.scale_shift_table",
        "blocks.norm2.scale",
        "blocks.norm2.bias",
        *(
            f"blocks.{attention}.{norm}.scale"
            for attention in ("attn1", "attn2")
            for norm in ("norm_q", "norm_k")
        ),
    }
    assert set(dtypes.values()) == {"float32", "bfloat16"}


def test_parts_of_adapters_for_other_models_are_refused_or_skipped(published, tmp_path):
    lora = {
        "diffusion_model.blocks.0.cross_attn.norm_k_img.diff": np.ones(24, np.float32),
        "diffusion_model.blocks.0.diff_m": np.ones((1, 6, 24), np.float32),
    }
    file = tmp_path / "lora.safetensors"
    safetensors.numpy.save_file(lora, file)
    loras = [(file, 1.0)]
    with pytest.raises(ConversionError, match="is for image-to-video models, not"):
        open_wan_parts(published["original"], loras=loras, **CHANGES)
    with pytest.warns(UserWarning, match="skipped 1 parts in 2 keys"):
        parts = open_wan_parts(
            published["original"], loras=loras, lora_strict=False, **CHANGES
        )
    key = "blocks.0.modulation"
    expected = load_published("divided")["original"][key] + np.float32(1)
    np.testing.assert_array_equal(np.asarray(parts.weights[key]), expected)


def test_adapters_are_merged(published):
    """Values are checked in tests/models/checkpoints/test_lora.py."""
    lora = FIXTURES / "lora_peft.safetensors"
    parts = open_wan_parts(
        published["original"], dtype="float32", loras=[(lora, 0.75)], **CHANGES
    )
    merged = parts.load_transformer()
    expected = safetensors.numpy.load_file(FIXTURES / "lora_peft_merged.safetensors")
    np.testing.assert_allclose(
        merged.blocks.attn2.to_q.kernel[1].T,
        expected["blocks.1.attn2.to_q.weight"],
        atol=1e-6,
    )
    wrong = FIXTURES / "lora_peft_merged.safetensors"
    with pytest.raises(
        ConversionError, match=r"lora_peft_merged\.safetensors does not"
    ):
        open_wan_parts(published["original"], loras=[(wrong, 1.0)], **CHANGES)


@pytest.mark.parametrize(
    ("layout", "name", "part"),
    [
        ("original", "config.json", "transformer"),
        ("original", "models_t5_umt5-xxl-enc-bf16.pth", "text_encoder"),
        ("original", "Wan2.1_VAE.pth", "vae"),
        ("original", "google/umt5-xxl/tokenizer.json", "tokenizer"),
        ("diffusers", "transformer/config.json", "transformer"),
        ("diffusers", "text_encoder/config.json", "text_encoder"),
        ("diffusers", "text_encoder/model.safetensors", "text_encoder"),
        ("diffusers", "vae/diffusion_pytorch_model.safetensors", "vae"),
        ("diffusers", "tokenizer/tokenizer.json", "tokenizer"),
        ("diffusers", "scheduler/scheduler_config.json", "scheduler"),
    ],
)
def test_each_missing_file_is_named(copies, layout, name, part):
    (copies / layout / name).unlink()
    with pytest.raises(CheckpointError) as error:
        WanFolder.open(copies / layout)
    message = str(error.value)
    start = f"{copies / layout}, a Wan model in the {layout} layout, lacks "
    assert message.startswith(start)
    missing, _, expected = message.removeprefix(start).partition("; expected ")
    assert missing.endswith(f"({part})")
    assert "," not in missing
    assert expected.startswith(f"the {layout} layout (")
    if part != "transformer":
        others = [other for other in ALL_PARTS if other != part]
        assert part not in WanFolder.open(copies / layout, parts=others).parts


def test_all_missing_files_are_named_at_once(copies):
    for name in ("text_encoder", "vae", "tokenizer"):
        shutil.rmtree(copies / "diffusers" / name)
    with pytest.raises(CheckpointError) as error:
        WanFolder.open(copies / "diffusers")
    assert (
        "lacks text_encoder/config.json (text_encoder), text_encoder/*.safetensors "
        "(text_encoder), tokenizer/tokenizer.json (tokenizer), vae/config.json (vae), "
        "vae/*.safetensors (vae); expected the diffusers layout (transformer/config"
    ) in str(error.value)
    assert "image_encoder" not in str(error.value)  # text-to-video needs none
    with pytest.raises(CheckpointError) as error:
        WanFolder.open(copies / "diffusers", parts=["vae"])
    expected = "expected the diffusers layout (vae/config.json, vae/*.safetensors, tran"
    assert expected in str(error.value)


def test_parts_that_are_not_needed_need_not_be_there(copies):
    for name in ("models_t5_umt5-xxl-enc-bf16.pth", "google"):
        path = copies / "original" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    parts = open_wan_parts(copies / "original", parts=["vae"], **CHANGES)
    assert parts.text_encoder is None
    assert parts.tokenizer is None
    assert parts.vae is not None


@pytest.mark.usefixtures("without_jaxtyping")
def test_unknown_parts_are_named(published):
    with pytest.raises(ValueError, match=r"parts=\['encoder'\] must be among"):
        WanFolder.open(published["original"], parts=["encoder"])


def test_image_models_need_an_image_encoder(copies):
    folder = copies / "original"
    write_json(folder / "config.json", ORIGINAL_CONFIG | {"model_type": "i2v"})
    with pytest.raises(
        CheckpointError, match=r"lacks models_clip_.*\(image_encoder\);"
    ):
        WanFolder.open(folder)
    shutil.copy(
        FIXTURES / "torch_module.pth",
        folder / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
    )
    opened = WanFolder.open(folder)
    assert "image_encoder" in opened.parts
    assert "0.bias" in opened.source("image_encoder").weights


def test_other_folders_are_told(tmp_path):
    assert WAN_LAYOUTS.find(tmp_path) is None
    write_json(tmp_path / "config.json", {})  # many models have one
    for path in (tmp_path, tmp_path / "absent", tmp_path / "config.json"):
        assert WAN_LAYOUTS.find(path) is None
        with pytest.raises(
            CheckpointError, match=r"is no folder of a Wan model; expec"
        ):
            WanFolder.open(path)


def test_half_a_pair_is_refused(copies):
    folder, index = copies / "diffusers", copies / "diffusers" / "model_index.json"
    class_name = ["diffusers", "WanTransformer3DModel"]
    write_json(index, {"transformer_2": [None, None]})  # as in Wan2.2-TI2V-5B
    WanFolder.open(folder)
    write_json(index, {"transformer_2": class_name})
    with pytest.raises(CheckpointError, match=r"lacks transformer_2/config\.json"):
        WanFolder.open(folder)
    (copies / "original" / "high_noise_model").mkdir()
    message = r"lacks high_noise_model/config\.json .*, low_noise_model/config\.json"
    with pytest.raises(CheckpointError, match=message):
        WanFolder.open(copies / "original")


@LAYOUTS
def test_layout_of_incomplete_folders(copies, layout):
    assert WAN_LAYOUTS.find(copies / layout) == layout
    for file in (copies / layout).rglob("config.json"):
        file.unlink()
    assert WAN_LAYOUTS.find(copies / layout) == layout


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", r"config\.json is missing or not JSON"),
        ("[]", r"config\.json must hold a JSON object"),
        (
            json.dumps(ORIGINAL_CONFIG | {"model_type": "vace"}),
            r"config\.json: .*'vace'",
        ),
        (json.dumps(ORIGINAL_CONFIG | {"window": 3}), r"unknown=\['window'\]"),
        (json.dumps(ORIGINAL_CONFIG | {"dim": 48}), "does not fit its config.json: "),
        (json.dumps(ORIGINAL_CONFIG | {"dim": "x"}), r"config\.json: "),
    ],
    ids=["cut", "list", "other", "unknown", "size", "text"],
)
@pytest.mark.usefixtures("without_jaxtyping")
def test_wrong_configurations_are_named(copies, config, message):
    (copies / "original" / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=message):
        open_wan_parts(copies / "original", **CHANGES).load_transformer()


@LAYOUTS
@pytest.mark.parametrize("adapted", [False, True], ids=["alone", "adapted"])
def test_the_shard_of_a_wrong_weight_is_named(copies, layout, adapted):
    folder = copies / layout / ("transformer" if layout == "diffusers" else "")
    *_, file = sorted(folder.glob("*.safetensors"))
    tensors = safetensors.numpy.load_file(file)
    key = next(key for key in tensors if key.endswith(".bias"))
    expected = tensors[key].shape
    safetensors.numpy.save_file(tensors | {key: np.zeros(3, np.float32)}, file)
    loras = [(FIXTURES / "lora_peft.safetensors", 1.0)] if adapted else []
    parts = open_wan_parts(copies / layout, loras=loras, **CHANGES)
    with pytest.raises(CheckpointError) as error:
        parts.load_transformer()
    message = str(error.value)
    assert message.startswith(f"the transformer in {folder} does not fit its config.j")
    assert f"shape: {key} in {file.name} is (3,); expected {expected}" in message


@LAYOUTS
@pytest.mark.parametrize("part", ["text_encoder", "vae", "transformer"])
def test_damaged_weights_are_named_before_anything_is_loaded(copies, layout, part):
    names = {
        "original": {
            "text_encoder": "models_t5_umt5-xxl-enc-bf16.pth",
            "vae": "Wan2.1_VAE.pth",
            "transformer": "diffusion_pytorch_model-00002-of-00003.safetensors",
        },
        "diffusers": {
            "text_encoder": "text_encoder/model.safetensors",
            "vae": "vae/diffusion_pytorch_model.safetensors",
            "transformer": "transformer/"
            "diffusion_pytorch_model-00002-of-00003.safetensors",
        },
    }
    file = copies / layout / names[layout][part]
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(CheckpointError, match=file.name):
        open_wan_parts(copies / layout, **CHANGES)


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        (UNIPC, SchedulerSettings(solver="unipc", grid="diffusers", shift=3.0)),
        (EULER, SchedulerSettings(solver="euler", grid="diffusers", shift=5.0)),
        (
            {
                "_class_name": "UniPCMultistepScheduler",
                "flow_shift": 8,
                "prediction_type": "flow_prediction",
                "use_flow_sigmas": True,
            },
            SchedulerSettings(solver="unipc", grid="diffusers", shift=8.0),
        ),
    ],
    ids=["unipc", "euler", "short"],
)
def test_schedulers_are_read(copies, stored, expected):
    write_json(copies / "diffusers" / "scheduler" / "scheduler_config.json", stored)
    assert WanFolder.open(copies / "diffusers").scheduler() == expected


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({}, r"_class_name=None; expected one of \['UniPC"),
        ({"_class_name": "DDIMScheduler"}, "_class_name='DDIMScheduler'"),
        (
            UNIPC | {"solver_order": 3, "use_karras_sigmas": True},
            r"asks for {'use_karras_sigmas': True, 'solver_order': 3}; this port has "
            r"{'use_karras_sigmas': False, 'solver_order': 2}",
        ),
        (EULER | {"stochastic_sampling": True}, "asks for {'stochastic_sampling'"),
        (
            {"_class_name": "UniPCMultistepScheduler"},
            "asks for {'prediction_type': 'epsilon', 'use_flow_sigmas': False}",
        ),
        (UNIPC | {"flow_shift": 0}, "has shift=0; expected a positive number"),
        (EULER | {"shift": "x"}, "has shift='x'; expected a positive number"),
    ],
    ids=["empty", "other", "unipc", "euler", "defaults", "zero", "text"],
)
def test_other_schedulers_are_refused(copies, stored, message):
    write_json(copies / "diffusers" / "scheduler" / "scheduler_config.json", stored)
    with pytest.raises(CheckpointError, match=message):
        WanFolder.open(copies / "diffusers").scheduler()


@pytest.mark.parametrize(
    ("layout", "part"), [("original", "scheduler"), ("diffusers", "tokenizer")]
)
def test_parts_without_weights_are_told(published, layout, part):
    with pytest.raises(CheckpointError, match=f"part='{part}' has no weights"):
        WanFolder.open(published[layout]).source(part)


def test_only_files_of_the_parts_are_fetched():
    patterns = WAN_LAYOUTS.hub_patterns(["transformer", "vae"])
    assert patterns == [
        "model_index.json",
        "config.json",
        "diffusion_pytorch_model*.safetensors",
        "Wan2.1_VAE.pth",
        "transformer/config.json",
        "transformer/*.safetensors",
        "vae/config.json",
        "vae/*.safetensors",
        "diffusion_pytorch_model*.safetensors.index.json",
        "transformer/*.safetensors.index.json",
        "vae/*.safetensors.index.json",
    ]
    assert "models_t5_umt5-xxl-enc-bf16.pth" in WAN_LAYOUTS.hub_patterns()

"""Parts in files of their own, as other programs keep them."""

import dataclasses
import json
import re
import shutil

import chex
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from models.checkpoints import hub
from models.checkpoints.memory_map import CheckpointError
from models.checkpoints.safetensors_io import save_safetensors
from models.cli import model as cli_model
from models.cli.model import read_request
from models.cli.parser import build_parser
from models.diffusion.folders.part_files import PartFiles
from models.loading import load_pipeline
from models.umt5.config import UMT5Config
from models.wan.checkpoint import open_wan_parts
from models.wan.config import WanConfig
from models.wan.convert import load_wan_transformer
from models.wan.loading import describe_wan
from models.wan.vae.config import WanVAEConfig
from tests.models.wan.test_published_folders import (
    FOLDERS,
    LATENTS,
    VIDEO,
    make_sampling,
    read_expected,
)

# ----------------------------------------------------------- files of the real sizes

SIZES = {  # width, hidden width, layers, channels in, starts from an image
    "Wan2.1-T2V-1.3B": (1536, 8960, 30, 16, False),
    "Wan2.1-T2V-14B": (5120, 13824, 40, 16, False),
    "Wan2.1-I2V-14B": (5120, 13824, 40, 36, True),
}


def published_shapes(dim, ffn, layers, channels, image):
    """Written out from the names and sizes in Wan2.1's `wan/modules/model.py`."""

    def linear(name, outputs, inputs):
        return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}

    shapes = {
        "patch_embedding.weight": (dim, channels, 1, 2, 2),
        "patch_embedding.bias": (dim,),
        **linear("text_embedding.0", dim, 4096),
        **linear("text_embedding.2", dim, dim),
        **linear("time_embedding.0", dim, 256),
        **linear("time_embedding.2", dim, dim),
        **linear("time_projection.1", 6 * dim, dim),
        **linear("head.head", 64, dim),
        "head.modulation": (1, 2, dim),
    }
    if image:
        shapes |= {f"img_emb.proj.0.{kind}": (1280,) for kind in ("weight", "bias")}
        shapes |= {f"img_emb.proj.4.{kind}": (dim,) for kind in ("weight", "bias")}
        shapes |= linear("img_emb.proj.1", 1280, 1280)
        shapes |= linear("img_emb.proj.3", dim, 1280)
    for layer in range(layers):
        block = f"blocks.{layer}"
        shapes[f"{block}.modulation"] = (1, 6, dim)
        shapes |= {f"{block}.norm3.{kind}": (dim,) for kind in ("weight", "bias")}
        shapes |= linear(f"{block}.ffn.0", ffn, dim) | linear(
            f"{block}.ffn.2", dim, ffn
        )
        for attention in ("self_attn", "cross_attn"):
            extra = image and attention == "cross_attn"
            for name in "qkvo":
                shapes |= linear(f"{block}.{attention}.{name}", dim, dim)
            for name in ("k_img", "v_img") if extra else ():
                shapes |= linear(f"{block}.{attention}.{name}", dim, dim)
            for name in ("norm_q", "norm_k", *(["norm_k_img"] if extra else [])):
                shapes[f"{block}.{attention}.{name}.weight"] = (dim,)
    return shapes


def write_empty(file, shapes, prefix=""):
    """A file of FP8 zeros that takes no room on the disk: nothing of it is read."""
    header, end = {}, 0
    for key, shape in shapes.items():
        start, end = end, end + int(np.prod(shape, dtype=object))
        header[prefix + key] = {
            "dtype": "F8_E4M3",
            "shape": shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)
    return file


@pytest.mark.parametrize(
    "model",
    [
        "Wan2.1-T2V-1.3B",
        pytest.param("Wan2.1-T2V-14B", marks=pytest.mark.nightly),
        "Wan2.1-I2V-14B",
    ],
)
def test_shapes_tell_the_model(tmp_path, model):
    prefix = "" if "T2V" in model else "model.diffusion_model."
    file = write_empty(
        tmp_path / "a.safetensors", published_shapes(*SIZES[model]), prefix
    )
    wan = open_wan_parts(file, parts=[], tile=(2, 4))
    preset = {
        "Wan2.1-T2V-1.3B": WanConfig.t2v_1_3b,
        "Wan2.1-T2V-14B": WanConfig.t2v_14b,
        "Wan2.1-I2V-14B": WanConfig.i2v_14b,
    }[model]
    expected = preset(tile=(2, 4), dtype="bfloat16", param_dtype="bfloat16")
    assert (wan.model, wan.config) == (model, expected)
    assert (wan.path, wan.files) == (file, (file,))


def without(shapes, *parts):
    return {
        key: shape for key, shape in shapes.items() if not any(p in key for p in parts)
    }


@pytest.fixture
def shallow(monkeypatch):
    """The same models with two layers, which are looked at faster."""
    names = ("t2v_1_3b", "t2v_14b", "i2v_14b")
    for name, whole in {name: getattr(WanConfig, name)() for name in names}.items():

        def make(cls, whole=whole, **changes):
            return dataclasses.replace(whole, num_layers=2)

        monkeypatch.setattr(WanConfig, name, classmethod(make))


SMALL = published_shapes(1536, 8960, 2, 16, False)
LARGE = published_shapes(5120, 13824, 2, 36, True)
CONTRADICTIONS = {
    "layers": (
        published_shapes(1536, 8960, 3, 16, False),
        "from Wan2.1-T2V-1.3B it differs in num_layers=3 (2); expected one of Wan2.1",
    ),
    "width": (
        published_shapes(2048, 8192, 2, 48, False),
        "from Wan2.1-T2V-1.3B it differs in dim=2048 (1536), ffn_dim=8192 (8960), "
        "in_channels=48 (16)",
    ),
    "image without its embedding": (
        published_shapes(5120, 13824, 2, 36, False),
        "from Wan2.1-I2V-14B it differs in image_dim=None (1280)",
    ),
    "missing": (
        without(SMALL, "blocks.1.ffn.2.bias"),
        "a.safetensors is not Wan2.1-T2V-1.3B, which its sizes are those of: 1 "
        "problems in 68 weights:\n  missing: blocks.1.ffn.2.bias",
    ),
    "one of another shape": (
        SMALL | {"blocks.1.self_attn.q.weight": (1536, 1535)},
        "shape: blocks.1.self_attn.q.weight in a.safetensors is (1536, 1535)",
    ),
    "VACE": (
        SMALL | {"vace_patch_embedding.weight": (1536, 96, 1, 2, 2)},
        "those of (VACE, which edits videos, is not supported): 1 problems",
    ),
    "two images": (
        LARGE | {"img_emb.emb_pos": (1, 514, 1280)},
        "(models of videos between two images are not supported): 1 problems",
    ),
    "no patches": (
        without(SMALL, "patch_embedding"),
        "lacks what tells its sizes, or has it in another shape: patch_embedding.ker",
    ),
    "an adapter": (
        {"blocks.0.self_attn.q.lora_down.weight": (4, 8)},
        "holds no Wan transformer (it is an adapter, which --lora merges into a mod",
    ),
    "an autoencoder": (
        {"decoder.conv1.weight": (4, 8, 3, 3, 3)},
        "holds no Wan transformer: cannot tell the layout of 1 keys, decoder.conv1",
    ),
    "two models": (
        {f"model.diffusion_model.{key}": shape for key, shape in SMALL.items()}
        | {"vae.conv1.weight": (1,)},
        "holds 69 keys that start with 'model.diffusion_model.' and 1 others, vae.co",
    ),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
@pytest.mark.usefixtures("shallow")
def test_contradictions_are_refused(tmp_path, case):
    shapes, message = CONTRADICTIONS[case]
    file = write_empty(tmp_path / "a.safetensors", shapes)
    with pytest.raises(CheckpointError, match=re.escape(message)) as error:
        open_wan_parts(file, parts=[])
    assert len(str(error.value)) < 3000


@pytest.mark.parametrize(
    "name", ["wan2.2_t2v_high_noise_14B_fp8_scaled", "Wan2_1-LowNoise", "Wan2_2-T2V"]
)
@pytest.mark.usefixtures("shallow")
def test_names_of_pairs_are_refused(tmp_path, name):
    file = write_empty(tmp_path / f"{name}.safetensors", SMALL)
    with pytest.raises(CheckpointError, match=r"named as one of Wan2\.2's pairs"):
        open_wan_parts(file, parts=[])


@pytest.mark.parametrize("image", [False, True], ids=["text", "image"])
@pytest.mark.usefixtures("shallow")
def test_parts_that_are_missing_are_named(tmp_path, image):
    file = write_empty(tmp_path / "a.safetensors", LARGE if image else SMALL)
    with pytest.raises(CheckpointError) as error:
        describe_wan(file)
    message = str(error.value)
    assert message.startswith(f"{file} is a transformer alone; give also the autoenc")
    for flag in ("--vae", "--text-encoder", "--tokenizer", "PartFiles(vae=...)"):
        assert flag in message
    assert ("--image-encoder" in message) == image


# ------------------------------------------------------------------------ values


@pytest.fixture
def tiny(monkeypatch):
    """The sizes that are told by nothing in a file are those of the fixtures."""

    def read(part):
        return json.loads((FOLDERS / "diffusers" / part / "config.json").read_text())

    for config, name, part in (
        (WanConfig, "t2v_1_3b", "transformer"),
        (UMT5Config, "xxl", "text_encoder"),
        (WanVAEConfig, "wan2_1", "vae"),
    ):
        published = read(part)

        def make(cls, published=published, **changes):
            return cls.from_dict(published, **changes)

        monkeypatch.setattr(config, name, classmethod(make))


@pytest.fixture(scope="module")
def weights():
    """The transformer of the folders in both layouts."""
    return {
        "original": read_shards(FOLDERS / "original"),
        "diffusers": read_shards(FOLDERS / "diffusers" / "transformer"),
    }


def read_shards(folder):
    shards = map(safetensors.numpy.load_file, sorted(folder.glob("*.safetensors")))
    return {key: value for shard in shards for key, value in shard.items()}


def narrow(weights, spelling):
    """FP8 with scales for matrices, and what they then stand for."""
    stored, meant = {}, {}
    for key, value in weights.items():
        if value.ndim != 2:
            stored[key] = meant[key] = value
            continue
        module = key.removesuffix(".weight")
        rows = spelling == "weight_scale"
        scale = np.abs(value).max(axis=1 if rows else None, keepdims=rows) / 448
        scale = np.asarray(scale, np.float32)
        stored[key] = (value / scale).astype(ml_dtypes.float8_e4m3fn)
        meant[key] = stored[key].astype(np.float32) * scale
        stored[f"{module}.{spelling}"] = scale
    if spelling == "scale_weight":
        stored["scaled_fp8"] = np.zeros(2, ml_dtypes.float8_e4m3fn)
    return stored, meant


@pytest.mark.parametrize(
    ("layout", "prefix", "spelling"),
    [
        ("original", "", None),
        ("original", "model.diffusion_model.", "scale_weight"),
        ("original", "diffusion_model.", "weight_scale"),
        ("diffusers", "model.diffusion_model.", None),
        ("diffusers", "", "weight_scale"),
    ],
)
@pytest.mark.usefixtures("tiny")
def test_transformers_of_other_programs(tmp_path, weights, layout, prefix, spelling):
    stored = meant = weights[layout]
    if spelling is not None:
        stored, meant = narrow(stored, spelling)
    file = tmp_path / "a.safetensors"
    prefixed = {prefix + key: value for key, value in stored.items()}
    safetensors.numpy.save_file(prefixed, file)
    wan = open_wan_parts(file, parts=[], dtype="float32")
    expected = load_wan_transformer(meant, wan.config)
    got = nnx.state(wan.load_transformer())
    chex.assert_trees_all_equal(got, nnx.state(expected), strict=True)


def test_folders_may_hold_fp8_too(tmp_path, weights):
    folder = shutil.copytree(FOLDERS / "diffusers", tmp_path / "model")
    stored, meant = narrow(weights["diffusers"], "weight_scale")
    for file in (folder / "transformer").glob("*.safetensors*"):
        file.unlink()
    save_safetensors(stored, folder / "transformer", stem="diffusion_pytorch_model")
    wan = open_wan_parts(folder, parts=[])
    assert set(wan.weights) == set(meant)
    for key, value in meant.items():
        np.testing.assert_array_equal(np.asarray(wan.weights[key]), value)


@pytest.fixture
def files(tmp_path, weights):
    """As ComfyUI lays them: a folder for each part."""
    transformer = tmp_path / "diffusion_models" / "wan.safetensors"
    transformer.parent.mkdir()
    prefixed = {f"model.diffusion_model.{k}": v for k, v in weights["original"].items()}
    safetensors.numpy.save_file(prefixed, transformer)
    for kind, name in (
        ("vae", "Wan2.1_VAE.pth"),
        ("text_encoders", "models_t5_umt5-xxl-enc-bf16.pth"),
    ):
        (tmp_path / kind).mkdir()
        shutil.copy(FOLDERS / "original" / name, tmp_path / kind / name)
    shutil.copytree(FOLDERS / "diffusers" / "tokenizer", tmp_path / "tokenizer")
    return tmp_path


def part_files(root, **changes):
    paths = {
        "vae": root / "vae" / "Wan2.1_VAE.pth",
        "text_encoder": root / "text_encoders" / "models_t5_umt5-xxl-enc-bf16.pth",
    }
    return PartFiles(**(paths | changes))


@pytest.mark.nightly
@pytest.mark.usefixtures("tiny")
def test_video_from_single_files_is_that_of_diffusers(files):
    expected = read_expected("expected")
    settings = expected["settings"]
    pipeline = load_pipeline(
        files / "diffusion_models" / "wan.safetensors", files=part_files(files)
    )
    result = pipeline.generate(
        settings["prompt"], make_sampling(settings), noise=expected["noise"]
    )
    np.testing.assert_allclose(result.latents, expected["latents"], **LATENTS)
    np.testing.assert_allclose(result.video, expected["video"], **VIDEO)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("how", ["file", "folder", "model", "prefix"])
def test_ways_to_give_an_autoencoder(files, how):
    stored = read_shards(FOLDERS / "diffusers" / "vae")
    plain, prefixed = files / "plain.safetensors", files / "prefixed.safetensors"
    safetensors.numpy.save_file(stored, plain)
    safetensors.numpy.save_file({f"vae.{k}": v for k, v in stored.items()}, prefixed)
    path = {
        "file": plain,
        "folder": FOLDERS / "diffusers" / "vae",
        "model": FOLDERS / "diffusers",
        "prefix": prefixed,
    }[how]
    wan = open_wan_parts(
        files / "diffusion_models" / "wan.safetensors",
        parts=["vae"],
        files=PartFiles(vae=path),
    )
    assert set(wan.vae) == set(stored)
    for key, value in stored.items():
        np.testing.assert_array_equal(np.asarray(wan.vae[key]), value)


@pytest.mark.usefixtures("tiny")
def test_scaled_text_encoder_in_one_file(files):
    """As ComfyUI stores it, with the tokenizer inside, which is not read."""
    folder = FOLDERS / "diffusers" / "text_encoder"
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    tables = ("shared.weight", "relative_attention_bias.weight", "embed_tokens.weight")
    matrices = {k: v for k, v in tensors.items() if not k.endswith(tables)}
    stored, meant = narrow(matrices, "scale_weight")
    rest = {k: v for k, v in tensors.items() if k.endswith(tables)}
    file = files / "text_encoders" / "scaled.safetensors"
    beside = {"spiece_model": np.arange(9, dtype=np.uint8)}
    safetensors.numpy.save_file(stored | rest | beside, file)
    wan = open_wan_parts(
        files / "diffusion_models" / "wan.safetensors",
        parts=["text_encoder", "tokenizer"],
        files=PartFiles(text_encoder=file),
    )
    assert wan.tokenizer == files / "tokenizer" / "tokenizer.json"
    assert set(wan.text_encoder) == set(tensors)
    for key, value in (meant | rest).items():
        np.testing.assert_array_equal(np.asarray(wan.text_encoder[key]), value)


@pytest.mark.usefixtures("tiny")
def test_tokenizers_are_found_beside_the_encoder_or_given(files):
    transformer = files / "diffusion_models" / "wan.safetensors"
    parts = ["text_encoder", "tokenizer"]
    elsewhere = files / "elsewhere"
    (files / "tokenizer").rename(elsewhere)
    with pytest.raises(CheckpointError, match="alone; give also the tokenizer"):
        open_wan_parts(transformer, parts=parts, files=part_files(files))
    given = part_files(files, tokenizer=elsewhere)
    wan = open_wan_parts(transformer, parts=parts, files=given)
    assert wan.tokenizer == elsewhere / "tokenizer.json"
    wrong = part_files(files, tokenizer=files / "vae")
    with pytest.raises(CheckpointError, match=r"tokenizer .*/vae: found no tokenizer"):
        open_wan_parts(transformer, parts=parts, files=wrong)


@pytest.mark.usefixtures("tiny")
def test_parts_stand_in_for_those_of_a_folder(files):
    """The folder need not have them; its own are left alone."""
    folder = files / "model"
    ignore = shutil.ignore_patterns("vae")
    shutil.copytree(FOLDERS / "diffusers", folder, ignore=ignore)
    given = PartFiles(vae=files / "vae" / "Wan2.1_VAE.pth")
    info = describe_wan(folder, files=given)
    assert info.files == given
    wan = open_wan_parts(folder, files=given)
    assert wan.sources["vae"].files == (given.vae,)
    assert wan.sources["text_encoder"].files[0].is_relative_to(folder)
    wrong = dataclasses.replace(given, image_encoder=given.vae)
    with pytest.raises(ValueError, match=r"image_encoder=.* is given, but .* is a t"):
        open_wan_parts(folder, files=wrong)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none.safetensors", r"vae .*none\.safetensors: .* does not exist; expected a"),
        ("empty", r"vae .*empty: .*empty holds no weights; expected one file \(\.saf"),
        ("two", r"vae .*two holds the files 1\.safetensors, 2\.pth; expected one fil"),
        ("a.gguf", r"vae .*a\.gguf must end with one of \.safetensors, \.pth"),
    ],
)
def test_wrong_paths_of_parts_are_explained(tmp_path, path, message):
    for name in ("empty/._x.safetensors", "two/1.safetensors", "two/2.pth", "a.gguf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=message):
        open_wan_parts(FOLDERS / "diffusers", files=PartFiles(vae=tmp_path / path))


def test_small_models_take_no_part_files(tmp_path):
    message = (
        "^files.vae=x.pth and revision=main: arguments that fit HunyuanVideo and Wan "
        "models only$"
    )
    with pytest.raises(ValueError, match=message):
        load_pipeline(files=PartFiles(vae="x.pth"), revision="main")


# ----------------------------------------------------------------- the command line


def request_of(*arguments):
    parsed = build_parser().parse_args(["generate", "a cat", *map(str, arguments)])
    parsed.argv = []
    return read_request(parsed)


@pytest.mark.usefixtures("tiny")
def test_the_command_takes_parts(files):
    given = part_files(files)
    transformer = files / "diffusion_models" / "wan.safetensors"
    request = request_of(
        *("--checkpoint", transformer),
        *("--vae", given.vae, "--text-encoder", given.text_encoder),
        *("--tokenizer", files / "tokenizer", "--size", "48x32", "--frames", "5"),
    )
    expected = dataclasses.replace(given, tokenizer=files / "tokenizer")
    assert request.info.files == expected
    line = f"model: Wan2.1-T2V-1.3B, by the shapes in {transformer}"
    assert request.describe() == [line]
    details = request.details()
    assert (details["model"], details["commit"]) == ("Wan2.1-T2V-1.3B", None)


def test_the_command_loads_the_commit_that_it_looked_at(tmp_path, monkeypatch):
    """A branch may move between looking and loading."""
    snapshots = tmp_path / "models--owner--tiny" / "snapshots"
    for commit in ("a1", "b2"):
        shutil.copytree(FOLDERS / "diffusers", snapshots / commit)
    fetched, loaded = [], []

    def fetch(repository, **options):
        revision = options["revision"]
        fetched.append((repository, revision))
        moved = {"v1": "a1" if len(fetched) == 1 else "b2"}
        return snapshots / moved.get(revision, revision)

    monkeypatch.setattr(hub, "_fetch", fetch)

    def stop(path, **_):
        loaded.append(path)
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_model, "load_pipeline", stop)
    monkeypatch.chdir(tmp_path)
    request = request_of(
        *("--checkpoint", "owner/tiny", "--revision", "v1"),
        *("--size", "48x32", "--frames", "5"),
    )
    with pytest.raises(KeyboardInterrupt):
        request.load()
    assert fetched == [("owner/tiny", "v1"), ("owner/tiny", "a1")]
    assert loaded == [snapshots / "a1"]
    assert request.details()["commit"] == "a1"


def test_the_small_model_takes_no_parts():
    message = (
        r"^--vae x\.pth and --revision v1 fit HunyuanVideo and Wan models only: "
        "name one with"
    )
    with pytest.raises(ValueError, match=message):
        request_of("--vae", "x.pth", "--revision", "v1")

"""HunyuanVideo's text encoders against transformers, run as the published code runs."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from models.checkpoints.memory_map import CheckpointError
from models.diffusion.embeddings import CachedTextEncoder
from models.diffusion.interfaces import TextEncoder
from models.diffusion.text_options import TextOptions
from models.hunyuan import text_encoder
from models.hunyuan.text import load_text_encoder
from models.hunyuan.text_encoder import (
    CROP,
    TEMPLATE,
    TEXT_LENGTH,
    HunyuanTextEncoder,
    hunyuan_cache,
)
from models.hunyuan.text_files import HunyuanTextFiles

FIXTURES = Path(__file__).parents[2] / "fixtures" / "hunyuan_text"
FILES = HunyuanTextFiles.find(FIXTURES)
ROUNDING = 1e-5  # of the output's scale; measured 6.7e-7
PARTS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")


@pytest.fixture(scope="module")
def expected():
    """Tokens and pooled vectors by prompt, and diffusers' template."""
    with safetensors.safe_open(FIXTURES / "expected.safetensors", "np") as file:
        arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    prompts = json.loads(metadata["prompts"])
    made = {
        prompt: (arrays[f"context.{place}"], arrays[f"pooled.{place}"])
        for place, prompt in enumerate(prompts)
    }
    return made, json.loads(metadata["template"])


@pytest.fixture
def encoder(request):
    """The tiny encoders on the CPU, with the interpreter that has torch."""
    python = request.config.getoption("--torch-python")
    return HunyuanTextEncoder(files=FILES, device="cpu", python=python)


def copy_of(folder):
    """A copy of the tiny model, to be changed."""
    shutil.copytree(FIXTURES, folder)
    return folder


def with_files(encoder, folder):
    return dataclasses.replace(encoder, files=HunyuanTextFiles.find(folder))


def test_the_template_is_that_of_diffusers(expected):
    assert expected[1] == {"template": TEMPLATE, "crop_start": CROP}


@pytest.mark.torch
def test_embeddings_are_those_of_the_published_code(encoder, expected, measured):
    made, _ = expected
    with pytest.warns(UserWarning, match=r"has \d+ tokens .* the first 256 are read"):
        context = encoder.encode(list(made))
    assert context.embeddings.shape[:2] == (len(made), TEXT_LENGTH)
    assert context.lengths.tolist() == [len(tokens) for tokens, _ in made.values()]
    assert context.lengths.tolist()[1] == 1  # no prompt: the closing token alone
    for index, (tokens, pooled) in enumerate(made.values()):
        got = np.asarray(context.embeddings[index])
        assert not got[len(tokens) :].any()
        for name, one, other in (
            ("LLaMA", got[: len(tokens)], tokens),
            ("CLIP", np.asarray(context.pooled[index]), pooled),
        ):
            difference = np.abs(one - other).max() / np.abs(other).max()
            measured(f"text of Hunyuan, {name}", difference)
            assert difference <= ROUNDING


@pytest.mark.torch
def test_prompts_are_stripped_and_run_alone(encoder, expected):
    prompt = next(iter(expected[0]))
    made = encoder.embed([prompt, f"\n {prompt}  ", "a dog"])
    assert list(made) == [prompt, f"\n {prompt}  ", "a dog"]
    np.testing.assert_array_equal(made[prompt].tokens, made[f"\n {prompt}  "].tokens)
    alone = encoder.embed([prompt])[prompt]
    np.testing.assert_array_equal(made[prompt].tokens, alone.tokens)
    np.testing.assert_array_equal(made[prompt].pooled, alone.pooled)


@pytest.mark.torch
def test_last_layers_and_final_norm_may_be_missing(encoder, expected, tmp_path):
    folder = copy_of(tmp_path / "model")
    file = folder / "text_encoder" / "model.safetensors"
    weights = safetensors.numpy.load_file(file)
    unread = ("layers.2.", "layers.3.", "norm.")
    kept = {key: w for key, w in weights.items() if not key.startswith(unread)}
    assert len(kept) == len(weights) - 19
    safetensors.numpy.save_file(kept, file)
    prompt = next(iter(expected[0]))
    got = with_files(encoder, folder).embed([prompt])[prompt]
    np.testing.assert_array_equal(got.tokens, encoder.embed([prompt])[prompt].tokens)


@pytest.mark.torch
def test_original_folders_and_a_whole_clip(encoder, expected, tmp_path):
    """Tokenizers lie beside the encoders; LLaMA's keys have a prefix."""
    folder = copy_of(tmp_path / "model")
    for name, file in (
        ("text_encoder", "tokenizer"),
        ("text_encoder_2", "tokenizer_2"),
    ):
        shutil.copytree(folder / file, folder / name, dirs_exist_ok=True)
        shutil.rmtree(folder / file)
    file = folder / "text_encoder" / "model.safetensors"
    weights = safetensors.numpy.load_file(file)
    weights = {f"model.{key}": value for key, value in weights.items()}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()
    safetensors.numpy.save_file(weights, file, {"format": "pt"})
    file = folder / "text_encoder_2" / "model.safetensors"
    weights = safetensors.numpy.load_file(file)
    weights["vision_model.x"] = np.zeros(2, np.float32)
    safetensors.numpy.save_file(weights, file, {"format": "pt"})
    file = folder / "text_encoder_2" / "config.json"
    text = json.loads(file.read_text())
    file.write_text(json.dumps({"model_type": "clip", "text_config": text}))
    prompt = next(iter(expected[0]))
    got = with_files(encoder, folder).embed([prompt])[prompt]
    for one, other in zip(got, encoder.embed([prompt])[prompt], strict=True):
        np.testing.assert_array_equal(one, other)


def drop_weight(folder):
    file = folder / "text_encoder_2" / "model.safetensors"
    weights = safetensors.numpy.load_file(file)
    name = next(key for key in weights if key.endswith("final_layer_norm.weight"))
    del weights[name]
    safetensors.numpy.save_file(weights, file, {"format": "pt"})


def cut_weights(folder):
    file = folder / "text_encoder" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def forget_bos(folder):
    file = folder / "tokenizer" / "tokenizer.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"post_processor": None}))


def shrink_table(folder):
    file = folder / "text_encoder" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vocab_size": 9}))


@pytest.mark.torch
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_weight, r"text_encoder_2 does not fit: .*final_layer_norm.weight"),
        (cut_weights, r"text_encoder cannot be read"),
        (forget_bos, r"94 tokens of the template before the prompt; expected 95"),
        (shrink_table, r"of text_encoder gives the token \d+; .* vectors for 9"),
    ],
)
def test_damaged_parts_are_one_error(encoder, tmp_path, damage, message):
    folder = copy_of(tmp_path / "model")
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as error:
        with_files(encoder, folder).embed(["a cat"])
    assert "Traceback" in str(error.value.__cause__)


@pytest.mark.torch
def test_no_finite_results_are_refused(encoder, tmp_path):
    folder = copy_of(tmp_path / "model")
    file = folder / "text_encoder" / "model.safetensors"
    weights = safetensors.numpy.load_file(file)
    weights["embed_tokens.weight"][:] = np.nan
    safetensors.numpy.save_file(weights, file, {"format": "pt"})
    with pytest.raises(FloatingPointError, match="context of 'a cat' is not finite"):
        with_files(encoder, folder).embed(["a cat"])


@pytest.fixture
def stand_in(monkeypatch):
    """An encoder without torch, and the requests that its process was given."""
    requests = []

    def answer(request, *, script, python):
        requests.append(request)
        arrays = {}
        for index, prompt in enumerate(request["prompts"]):
            arrays[f"context.{index}"] = np.full((2, 3), len(prompt), np.float32)
            arrays[f"pooled.{index}"] = np.full(4, len(prompt), np.float32)
        counts = [len(prompt) + 1 for prompt in request["prompts"]]
        return {"num_tokens": counts, "device": "cpu", "dtype": "float32"}, arrays

    monkeypatch.setattr(text_encoder, "run_worker", answer)
    return HunyuanTextEncoder(files=FILES, python="elsewhere"), requests


def test_the_request(stand_in):
    encoder, requests = stand_in
    assert isinstance(encoder, TextEncoder)
    encoder.embed([" a {} cat ", "a {} cat"])
    (request,) = requests
    assert request["prompts"] == ["a {} cat"]
    assert request["texts"] == [TEMPLATE.replace("{}", "a {} cat")]
    assert (request["crop"], request["kept"], request["skipped_layers"]) == (95, 256, 2)
    assert request["text_encoder"] == str(FIXTURES / "text_encoder")
    encoder.free()
    assert encoder.unknown_words("qwxz") == []


def test_long_prompts_are_noted_once(stand_in):
    encoder, _ = stand_in
    with pytest.warns(UserWarning, match="256 tokens|257 tokens") as notes:
        encoder.embed(["x" * 255, "y" * 256])
    (note,) = notes
    assert "'yyy" in str(note.message)
    assert "has 257 tokens with the closing one" in str(note.message)


def test_embeddings_are_kept_in_a_folder(stand_in, tmp_path):
    encoder, requests = stand_in
    cached = CachedTextEncoder(
        cache=hunyuan_cache(tmp_path, FILES),
        text_length=TEXT_LENGTH,
        load_encoder=lambda: encoder,
    )
    for _ in range(2):
        context = cached.encode(["a cat", " a cat"])
        assert context.pooled.tolist() == [[5.0] * 4] * 2
        assert len(requests) == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_sources_of_a_model(stand_in, tmp_path, monkeypatch):
    _, requests = stand_in
    monkeypatch.setattr(text_encoder, "check_text_packages", lambda: None)
    given = load_text_encoder(
        FILES, TextOptions(prompts=("a cat",), device=jax.devices("cpu")[0])
    )
    assert given.encode(["a cat"]).pooled.tolist() == [[5.0] * 4]
    given.save(tmp_path / "file.safetensors")
    (request,) = requests
    assert request["device"] == "cpu"
    for files in (FILES, None):
        file = tmp_path / "file.safetensors"
        read = load_text_encoder(
            files, TextOptions(prompts=("a cat",), embeddings=file)
        )
        assert read.encode(["a cat"]).pooled.tolist() == [[5.0] * 4]
    for _ in range(2):
        kept = TextOptions(prompts=("a dog!",), embeddings=tmp_path / "kept")
        load_text_encoder(FILES, kept)
        assert len(requests) == 2
    assert requests[1]["device"] is None
    assert load_text_encoder(None, TextOptions(prompts=("a cat",))) is None


def test_identity_differs_with_any_part(tmp_path):
    first = hunyuan_cache(tmp_path, FILES).identity
    assert hunyuan_cache(tmp_path, HunyuanTextFiles.find(FIXTURES)).identity == first
    found = {first}
    for part, name in zip(
        PARTS,
        ("model.safetensors", "tokenizer.json", "model.safetensors", "merges.txt"),
        strict=True,
    ):
        folder = copy_of(tmp_path / part)
        assert hunyuan_cache(tmp_path, HunyuanTextFiles.find(folder)).identity == first
        content = bytearray((folder / part / name).read_bytes())
        content[-2] ^= 1
        (folder / part / name).write_bytes(content)
        found.add(hunyuan_cache(tmp_path, HunyuanTextFiles.find(folder)).identity)
    for field, same in (("transformers_version", True), ("rms_norm_eps", False)):
        folder = copy_of(tmp_path / field)
        file = folder / "text_encoder" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {field: 0.5}))
        other = hunyuan_cache(tmp_path, HunyuanTextFiles.find(folder)).identity
        assert (other == first) == same
        found.add(other)
    assert len(found) == 1 + len(PARTS) + 1


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("text_encoder", "has no folder text_encoder; expected"),
        ("text_encoder/config.json", "config.json cannot be read"),
        ("text_encoder/model.safetensors", "pickles are not read"),
        ("tokenizer/tokenizer.json", "tokenizer has no tokenizer.json"),
        ("tokenizer_2/vocab.json", "has no tokenizer of CLIP"),
    ],
)
def test_missing_files_are_named(tmp_path, lost, message):
    folder = copy_of(tmp_path / "model")
    path = folder / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(CheckpointError, match=message):
        HunyuanTextEncoder.load(folder)


def test_other_models_and_lost_shards_are_named(tmp_path):
    folder = copy_of(tmp_path / "model")
    config = folder / "text_encoder" / "config.json"
    config.write_text('{"model_type": "llava"}')
    with pytest.raises(CheckpointError, match=r"'llava'; expected 'llama': the lang"):
        HunyuanTextFiles.find(folder)
    config.write_text('{"model_type": "llama"}')
    (folder / "text_encoder" / "model.safetensors").unlink()
    index = folder / "text_encoder" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"lacks the shards \['model-1.safe"):
        HunyuanTextFiles.find(folder)


def test_a_missing_extra_is_named_first(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = r"needs? the package torch; .* pip install draft-attention-jax\[hunyuan\]"
    with pytest.raises(ImportError, match=message):
        HunyuanTextEncoder(files=FILES, python=sys.executable)


@pytest.mark.usefixtures("without_jaxtyping")
def test_other_devices_are_refused():
    with pytest.raises(ValueError, match="device='tpu' must be 'cuda', 'cpu' or None"):
        HunyuanTextEncoder(files=FILES, device="tpu", python="elsewhere")

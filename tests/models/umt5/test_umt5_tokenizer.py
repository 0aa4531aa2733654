"""Against sentencepiece, transformers and diffusers; see make_umt5_fixtures."""

import json
import shutil
import sys

import numpy as np
import pytest

from models.checkpoints.safetensors_io import CheckpointError
from models.umt5.tokenizer import UMT5Tokenizer, clean_prompt, find_tokenizer
from tests.models.umt5.conftest import FIXTURES

FILE = FIXTURES / "umt5_tokenizer" / "tokenizer.json"
PROMPTS = json.loads((FIXTURES / "umt5_prompts.json").read_text())


@pytest.mark.parametrize("row", PROMPTS, ids=range(len(PROMPTS)))
def test_prompts_are_cleaned_as_diffusers_does(row):
    assert clean_prompt(row["prompt"]) == row["clean"]
    assert clean_prompt(row["clean"]) == row["clean"]


@pytest.mark.parametrize("row", PROMPTS, ids=range(len(PROMPTS)))
def test_tokens_are_those_of_sentencepiece(row):
    tokens = row["sentencepiece"]
    ids, lengths = UMT5Tokenizer(FILE).encode([row["prompt"]])
    assert (ids.shape, ids.dtype, lengths.dtype) == ((1, 512), np.int32, np.int32)
    assert lengths[0] == len(tokens)
    assert ids[0, : len(tokens)].tolist() == tokens
    assert not ids[0, len(tokens) :].any()


def test_long_prompts_are_cut_as_transformers_does(tokenizer):
    with pytest.warns(UserWarning, match="only the first 23") as warned:
        ids, lengths = tokenizer.encode([row["prompt"] for row in PROMPTS])
    assert ids.tolist() == [row["short_ids"] for row in PROMPTS]
    assert lengths.tolist() == [row["short_length"] for row in PROMPTS]
    cut = {
        row["prompt"]: len(row["sentencepiece"])
        for row in PROMPTS
        if len(row["sentencepiece"]) > 24
    }
    assert [str(warning.message) for warning in warned] == [
        f"the prompt {prompt[:60]!r} has {count} tokens; only the first 23 and the end "
        "token are read"
        for prompt, count in cut.items()
    ]
    assert len(cut) == 3


def test_one_token_is_the_end_token():
    with pytest.warns(UserWarning, match="only the first 0 and the end token"):
        ids, lengths = UMT5Tokenizer(FILE, max_length=1).encode(["a cat"])
    assert (ids.tolist(), lengths.tolist()) == ([[1]], [1])


def test_stored_lengths_are_not_read(tmp_path):
    content = json.loads(FILE.read_text())
    content["truncation"] = {
        "direction": "Right",
        "max_length": 2,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    ids, lengths = UMT5Tokenizer(tmp_path, max_length=6).encode(["a cat"])
    assert (ids.tolist(), lengths.tolist()) == ([[22, 165, 14, 1, 0, 0]], [4])


@pytest.mark.parametrize("place", [".", "google/umt5-xxl", "tokenizer"])
def test_checkpoint_folders_are_searched(tmp_path, place):
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    shutil.copy(FILE, tmp_path / place)
    assert find_tokenizer(tmp_path) == tmp_path / place / "tokenizer.json"


def test_no_tokenizer_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json in any of .*google"):
        UMT5Tokenizer(tmp_path)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "spiece.model").touch()
    with pytest.raises(CheckpointError, match=r"AutoTokenizer\.from_pretrained\("):
        UMT5Tokenizer(tmp_path)


def test_other_files_are_refused(tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_text('{"version": "1.0"}')
    with pytest.raises(CheckpointError, match=f"{file} is damaged or not a tokenizer"):
        UMT5Tokenizer(file)
    content = json.loads(FILE.read_text())
    file.write_text(json.dumps(content | {"post_processor": None}))
    with pytest.raises(CheckpointError, match=f"{file} is not a UMT5 tokenizer"):
        UMT5Tokenizer(file)


@pytest.mark.parametrize("package", ["tokenizers", "ftfy"])
def test_missing_packages_are_named(monkeypatch, tokenizer, package):
    monkeypatch.setitem(sys.modules, package, None)
    message = rf"package {package}; .*pip install '\.\[wan\]' in a clone"
    with pytest.raises(ImportError, match=message):
        (UMT5Tokenizer(FILE) if package == "tokenizers" else tokenizer).encode(["a"])


@pytest.mark.usefixtures("without_jaxtyping")
def test_bad_arguments_are_named(tokenizer):
    with pytest.raises(ValueError, match="max_length=0 must be a positive integer"):
        UMT5Tokenizer(FILE, max_length=0)

"""Which source serves a model's prompts, and what of its encoder stays."""

import numpy as np
import pytest

from models.diffusion.embeddings import (
    CachedTextEncoder,
    EmbeddingCache,
    GivenTextEncoder,
    PromptEmbedding,
    UnknownPromptError,
    pad_embeddings,
)
from models.diffusion.text_sources import open_text_encoder

PROMPTS = ("a cat", "")


def embedding(prompt):
    return PromptEmbedding(
        np.full((len(prompt) + 1, 2), 3.0, np.float32),
        np.full(2, len(prompt), np.float32),
    )


class Encoder:
    """Stands for an encoder in memory."""

    def __init__(self):
        self.asked, self.freed = [], False

    def embed(self, prompts):
        self.asked += prompts
        return {prompt: embedding(prompt) for prompt in prompts}

    def encode(self, prompts):
        return pad_embeddings([embedding(prompt) for prompt in prompts], 8)

    def free(self):
        self.freed = True


@pytest.fixture
def loaded():
    """The encoders that were loaded."""
    return []


@pytest.fixture
def sources(loaded):
    def load():
        loaded.append(Encoder())
        return loaded[-1]

    def cache(folder):
        return EmbeddingCache(folder=folder, identity="x", clean=str.strip)

    return {"load": load, "open_cache": cache, "text_length": 8}


def pooled(encoder, prompts=PROMPTS):
    return encoder.encode(prompts).pooled[:, 0].tolist()


def test_prompts_are_encoded_and_the_encoder_freed(sources, loaded):
    encoder = open_text_encoder(**sources, prompts=PROMPTS, embeddings=None)
    assert [(one.asked, one.freed) for one in loaded] == [([*PROMPTS], True)]
    assert pooled(encoder) == [5, 0]
    with pytest.raises(UnknownPromptError, match="given for"):
        encoder.encode(["a dog"])


def test_the_encoder_stays_without_prompts(sources, loaded):
    encoder = open_text_encoder(**sources, prompts=None, embeddings=None)
    assert encoder is loaded[0]
    assert not loaded[0].freed


def test_a_folder_keeps_embeddings(sources, loaded, tmp_path):
    folder = tmp_path / "new"
    for _ in range(2):
        encoder = open_text_encoder(**sources, prompts=PROMPTS, embeddings=folder)
        assert isinstance(encoder, CachedTextEncoder)
        assert [(one.asked, one.freed) for one in loaded] == [([*PROMPTS], True)]
        assert pooled(encoder) == [5, 0]
    assert pooled(encoder, ["a dog!"]) == [6]
    assert len(loaded) == 2
    lazy = open_text_encoder(**sources, prompts=None, embeddings=tmp_path / "other")
    assert len(loaded) == 2
    assert pooled(lazy) == [5, 0]


def test_a_file_stands_for_the_encoder(sources, loaded, tmp_path):
    file = tmp_path / "prompts.safetensors"
    made = {prompt: embedding(prompt) for prompt in PROMPTS}
    GivenTextEncoder(embeddings=made, text_length=8).save(file)
    for load in (sources["load"], None):
        given = sources | {"load": load}
        encoder = open_text_encoder(**given, prompts=PROMPTS, embeddings=file)
        assert pooled(encoder) == [5, 0]
        with pytest.raises(UnknownPromptError, match=r"given for \['a dog'\]"):
            open_text_encoder(**given, prompts=("a dog",), embeddings=file)
    assert loaded == []


def test_a_model_without_an_encoder_has_none(sources, tmp_path):
    none = sources | {"load": None}
    for embeddings in (None, tmp_path):
        found = open_text_encoder(**none, prompts=PROMPTS, embeddings=embeddings)
        assert found is None


def test_an_encoder_that_fails_is_freed(sources, loaded):
    failing = Encoder()

    def fail(prompts):
        raise FloatingPointError("not finite")

    failing.embed = fail
    with pytest.raises(FloatingPointError, match="not finite"):
        open_text_encoder(
            **(sources | {"load": lambda: failing}), prompts=PROMPTS, embeddings=None
        )
    assert failing.freed

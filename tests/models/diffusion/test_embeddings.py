"""Embeddings of prompts: put together, stored in folders and files, and found again."""

import jax
import numpy as np
import pytest
import safetensors.numpy

from models.checkpoints.memory_map import CheckpointError
from models.diffusion.contexts import join_contexts
from models.diffusion.embeddings import (
    CachedTextEncoder,
    EmbeddingCache,
    GivenTextEncoder,
    PromptEmbedding,
    UnknownPromptError,
    hash_settings,
    pad_embeddings,
    sample_weights,
)
from models.diffusion.interfaces import TextContext, TextEncoder
from models.umt5.tokenizer import clean_prompt

PROMPTS = ["a cat", "", "a dog", "a cat"]
LENGTH = 24


def embedding(prompt, *, pooled=True):
    """Made-up vectors that differ between any two prompts."""
    tokens = np.arange(2.0 * (len(prompt) + 1), dtype=np.float32).reshape(-1, 2)
    return PromptEmbedding(tokens, np.full(3, len(prompt) + 0.5, np.float32))._replace(
        **({} if pooled else {"pooled": None})
    )


def cache_in(folder, identity="x"):
    return EmbeddingCache(folder=folder, identity=identity, clean=str.strip)


class Encoder:
    """Stands for an encoder in memory."""

    def __init__(self, pooled=True):
        self.pooled = pooled
        self.asked, self.freed = [], False

    def embed(self, prompts):
        assert not self.freed
        self.asked.append(list(prompts))
        return {prompt: embedding(prompt, pooled=self.pooled) for prompt in prompts}

    def free(self):
        self.freed = True


class Loads:
    """Loads an encoder anew each time, and keeps what it loaded."""

    def __init__(self, pooled=True):
        self.pooled, self.made = pooled, []

    def __call__(self):
        self.made.append(Encoder(self.pooled))
        return self.made[-1]


def assert_contexts_equal(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize("pooled", [True, False], ids=["pooled", "tokens"])
def test_contexts_are_padded(pooled):
    rows = [embedding(prompt, pooled=pooled) for prompt in PROMPTS]
    context = pad_embeddings(rows, LENGTH)
    assert context.embeddings.shape == (4, LENGTH, 2)
    assert context.lengths.tolist() == [6, 1, 6, 6]
    for item, row, length in zip(
        context.embeddings, rows, context.lengths, strict=True
    ):
        np.testing.assert_array_equal(item[:length], row.tokens)
        assert not item[length:].any()
    if pooled:
        np.testing.assert_array_equal(context.pooled[:, 0], [5.5, 0.5, 5.5, 5.5])
    assert (context.pooled is not None) == pooled


@pytest.mark.parametrize(
    "shapes",
    [[], [(2, 3), (2, 4)], [(5, 3)], [(0, 3)], [(3,)]],
    ids=["none", "widths", "long", "empty", "flat"],
)
@pytest.mark.usefixtures("without_jaxtyping")
def test_rows_that_do_not_fit_are_refused(shapes):
    rows = [PromptEmbedding(np.zeros(shape, np.float32)) for shape in shapes]
    with pytest.raises(ValueError, match="1 to 4 vectors each, all of one width"):
        pad_embeddings(rows, 4)


@pytest.mark.parametrize(
    "shapes", [[(3,), None], [(3,), (4,)], [(1, 3)]], ids=["some", "widths", "table"]
)
@pytest.mark.usefixtures("without_jaxtyping")
def test_pooled_vectors_that_do_not_fit_are_refused(shapes):
    rows = [
        PromptEmbedding(
            np.zeros((1, 2), np.float32),
            None if shape is None else np.zeros(shape, np.float32),
        )
        for shape in shapes
    ]
    with pytest.raises(ValueError, match=r"one vector for each prompt or none, all of"):
        pad_embeddings(rows, 4)


def test_contexts_are_joined_with_those_of_negative_prompts():
    both = pad_embeddings([embedding("a"), embedding("bc")], LENGTH)
    one = pad_embeddings([embedding("none")], LENGTH)
    joined = join_contexts(both, one)
    expected = [embedding(prompt) for prompt in ("a", "bc", "none", "none")]
    assert_contexts_equal(joined, pad_embeddings(expected, LENGTH))
    with pytest.raises(ValueError, match=r"prompts has pooled .* negative_context has"):
        join_contexts(both, one._replace(pooled=None))
    with pytest.raises(ValueError, match=r"negative_context has pooled .* prompts has"):
        join_contexts(both._replace(pooled=None), one)


def test_both_follow_the_protocol(tmp_path):
    for encoder in (
        CachedTextEncoder(cache=cache_in(tmp_path), text_length=LENGTH),
        GivenTextEncoder(embeddings={"a": embedding("a")}, text_length=LENGTH),
    ):
        assert isinstance(encoder, TextEncoder)
        assert encoder.unknown_words("qwxz") == []
        assert encoder.describe_vocabulary()


@pytest.mark.usefixtures("without_jaxtyping")
def test_a_string_and_no_prompt_are_refused(tmp_path):
    for encoder in (
        CachedTextEncoder(cache=cache_in(tmp_path), text_length=LENGTH),
        GivenTextEncoder(embeddings={"a": embedding("a")}, text_length=LENGTH),
    ):
        with pytest.raises(TypeError, match="prompts='a' must be a sequence of str"):
            encoder.encode("a")
        with pytest.raises(ValueError, match=r"prompts=\[\] must hold at least one"):
            encoder.encode([])


@pytest.mark.parametrize("pooled", [True, False], ids=["pooled", "tokens"])
def test_a_cache_loads_the_encoder_only_for_new_prompts(tmp_path, pooled):
    loads, folder = Loads(pooled), tmp_path / "new"
    encoder = CachedTextEncoder(
        cache=cache_in(folder), text_length=LENGTH, load_encoder=loads
    )
    rows = [embedding(prompt, pooled=pooled) for prompt in PROMPTS]
    expected = pad_embeddings(rows, LENGTH)
    for _ in range(2):
        assert_contexts_equal(encoder.encode(PROMPTS), expected)
        assert [made.asked for made in loads.made] == [[PROMPTS[:3]]]
    encoder.encode(["a bird", "a cat"])
    assert [made.asked for made in loads.made] == [[PROMPTS[:3]], [["a bird"]]]
    assert all(made.freed for made in loads.made)
    names = sorted(file.suffix for file in folder.iterdir())
    assert names == [".safetensors"] * 4  # no partial file is left
    alone = CachedTextEncoder(cache=cache_in(folder), text_length=LENGTH)
    assert_contexts_equal(alone.encode(PROMPTS), expected)


def test_an_encoder_that_fails_is_freed(tmp_path):
    class Failing(Encoder):
        def embed(self, prompts):
            raise FloatingPointError("not finite")

    failing = Failing()
    encoder = CachedTextEncoder(
        cache=cache_in(tmp_path), text_length=LENGTH, load_encoder=lambda: failing
    )
    with pytest.raises(FloatingPointError, match="not finite"):
        encoder.encode(PROMPTS)
    assert failing.freed
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written_costs_no_run(tmp_path):
    (tmp_path / "file").write_text("")
    encoder = CachedTextEncoder(
        cache=cache_in(tmp_path / "file" / "below"),
        text_length=LENGTH,
        load_encoder=Loads(),
    )
    with pytest.warns(UserWarning, match=r"cannot be kept in .*below, so later runs"):
        context = encoder.encode(PROMPTS)
    expected = pad_embeddings([embedding(prompt) for prompt in PROMPTS], LENGTH)
    assert_contexts_equal(context, expected)


def test_prompts_that_clean_to_the_same_text_share_a_file(tmp_path):
    cache = cache_in(tmp_path)
    cache.store(" a cat ", embedding("a cat"))
    found = cache.load("a cat")
    np.testing.assert_array_equal(found.tokens, embedding("a cat").tokens)
    np.testing.assert_array_equal(found.pooled, embedding("a cat").pooled)
    assert cache.load("a  cat") is None
    assert cache_in(tmp_path, identity="y").load("a cat") is None


def test_folders_of_before_are_read(tmp_path):
    """A file as releases wrote it that knew no pooled vectors."""
    name = "ef76c31f23eb43a905face0ee34abfdabf0f54e1811855d8c155ae294de2c09e"
    rows = np.arange(6, dtype=np.float32).reshape(3, 2)
    metadata = {
        "format": "draft-video-embedding-1",
        "identity": "some encoder",
        "prompt": 'a "cat" & dog',
    }
    safetensors.numpy.save_file(
        {"context": rows}, tmp_path / f"{name}.safetensors", metadata
    )
    cache = EmbeddingCache(folder=tmp_path, identity="some encoder", clean=clean_prompt)
    found = cache.load("a  “cat” &amp; dog")
    np.testing.assert_array_equal(found.tokens, rows)
    assert found.pooled is None


def test_files_of_before_are_read(tmp_path):
    """A file as releases wrote it that knew no pooled vectors."""
    file = tmp_path / "given.safetensors"
    header = (
        rb'{"__metadata__":{"prompts":"[\"a cat\", \"\"]",'
        rb'"format":"draft-video-embedding-1"},'
        rb'"context.0":{"dtype":"F32","shape":[3,2],"data_offsets":[0,24]},'
        rb'"context.1":{"dtype":"F32","shape":[1,2],"data_offsets":[24,32]}}'
    )
    data = np.array([0, 1, 2, 3, 4, 5, 1, 1], np.float32).tobytes()
    file.write_bytes(len(header).to_bytes(8, "little") + header + data)
    context = GivenTextEncoder.load(file, text_length=4).encode(["", "a cat"])
    assert context.lengths.tolist() == [1, 3]
    np.testing.assert_array_equal(context.embeddings[1, :3].ravel(), range(6))
    assert context.pooled is None


def test_prompts_without_embedding_are_named(tmp_path):
    encoder = CachedTextEncoder(cache=cache_in(tmp_path), text_length=LENGTH)
    with pytest.raises(UnknownPromptError, match=r"no embeddings by this .* \['a c"):
        encoder.encode(["a cat"])


def test_damaged_embeddings_are_named(tmp_path):
    cache = cache_in(tmp_path)
    path = cache.store("a cat", embedding("a cat"))
    path.rename(cache.path("a dog"))
    with pytest.raises(CheckpointError, match="is not the embedding of 'a dog' by"):
        cache.load("a dog")
    path.write_bytes(b"\0" * 20)
    with pytest.raises(CheckpointError, match=f"{path} cannot be read"):
        cache.load("a cat")


def test_weights_are_told_apart_by_what_they_hold(tmp_path):
    first, copy, last = (tmp_path / name for name in ("a", "b", "c"))
    data = bytearray(np.random.default_rng(0).bytes(300_000))
    first.write_bytes(data)
    copy.write_bytes(data)
    data[299_999] ^= 1
    last.write_bytes(data)
    assert sample_weights([first]) == sample_weights([copy])
    assert sample_weights([first]) != sample_weights([last])
    assert sample_weights([first, last]) == sample_weights([last, copy])
    assert sample_weights([first, copy]) != sample_weights([first])
    with pytest.raises(CheckpointError, match="at least one weight file"):
        sample_weights([])
    with pytest.raises(CheckpointError, match="missing cannot be read"):
        sample_weights([tmp_path / "missing"])


def test_settings_differ_with_any_of_them():
    first = hash_settings({"a": {"b": 1}, "c": [2]})
    assert hash_settings({"c": [2], "a": {"b": 1}}) == first
    for other in ({"a": {"b": 2}, "c": [2]}, {"a": {"b": 1}}, {"a": {"c": 1}}):
        assert hash_settings(other) != first


@pytest.mark.parametrize("pooled", [True, False], ids=["pooled", "tokens"])
def test_given_embeddings(tmp_path, pooled):
    file = tmp_path / "prompts.safetensors"
    rows = {prompt: embedding(prompt, pooled=pooled) for prompt in PROMPTS}
    given = GivenTextEncoder(embeddings=rows, text_length=LENGTH)
    given.save(file)
    read = GivenTextEncoder.load(file, text_length=LENGTH)
    expected = pad_embeddings([rows[prompt] for prompt in PROMPTS], LENGTH)
    for encoder in (given, read):
        context = encoder.encode(PROMPTS)
        assert isinstance(context, TextContext)
        assert_contexts_equal(context, expected)
    with pytest.raises(UnknownPromptError, match=r"for \['x'\]; .* \['a cat', '', "):
        read.encode(["a cat", "x"])
    with pytest.raises(ValueError, match="1 to 3 vectors each"):
        GivenTextEncoder.load(file, text_length=3)


def test_other_files_are_not_embeddings(tmp_path):
    file = tmp_path / "weights.safetensors"
    safetensors.numpy.save_file({"x": np.ones(2)}, file)
    with pytest.raises(CheckpointError, match=f"{file} is not a file of embeddings"):
        GivenTextEncoder.load(file, text_length=LENGTH)
    with pytest.raises(CheckpointError, match=r"missing cannot be read"):
        GivenTextEncoder.load(tmp_path / "missing", text_length=LENGTH)

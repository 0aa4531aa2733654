"""Prompts to context: from the encoder, from disk, and from the user."""

import dataclasses

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from models.checkpoints.safetensors_io import CheckpointError
from models.diffusion.dtypes import default_dtype
from models.diffusion.interfaces import TextEncoder
from models.umt5.config import UMT5Config
from models.umt5.convert import export_umt5_encoder
from models.umt5.embeddings import (
    CachedTextEncoder,
    EmbeddingCache,
    GivenTextEncoder,
    encoder_identity,
)
from models.umt5.text_encoder import UMT5TextEncoder, pad_rows
from models.umt5.tokenizer import UMT5Tokenizer
from tests.models.umt5.conftest import FIXTURES, copy_of

run = nnx.jit(lambda model, ids, lengths: model(ids, lengths))
PROMPTS = ["a cat", "", "a dog at night", "a cat"]


@pytest.fixture(scope="module")
def expected(text_encoder):
    context, lengths = text_encoder.encode(PROMPTS)
    return np.asarray(context), np.asarray(lengths)


def test_context_is_that_of_the_encoder(text_encoder, expected):
    context, lengths = expected
    assert (context.shape, context.dtype) == ((4, 24, 12), np.float32)
    # "a cat" is three pieces; each prompt has an end token.
    assert lengths.tolist() == [4, 1, lengths[2], 4]
    ids, _ = text_encoder.tokenizer.encode(PROMPTS)
    for row, length in enumerate(lengths):
        assert not context[row, length:].any()
    np.testing.assert_allclose(
        context, run(text_encoder.model, ids, lengths), atol=1e-5
    )


def test_context_of_a_prompt_does_not_depend_on_the_others(text_encoder, expected):
    context, lengths = text_encoder.encode(["a dog at night"])
    np.testing.assert_array_equal(context[0], expected[0][2])
    assert lengths[0] == expected[1][2]


def test_long_and_short_prompts_agree_at_any_padded_size(text_encoder):
    """Prompts run at 32, 64, ... tokens; the size must not show."""
    tokenizer = UMT5Tokenizer(FIXTURES / "umt5_tokenizer", max_length=100)
    encoder = dataclasses.replace(text_encoder, tokenizer=tokenizer)
    prompts = ["a", "cats and dogs " * 5, "cats and dogs " * 11]
    ids, lengths = tokenizer.encode(prompts)
    assert [n > 32 for n in lengths] == [False, True, True]
    assert [n > 64 for n in lengths] == [False, False, True]
    context, _ = encoder.encode(prompts)
    whole = run(encoder.model, ids, lengths)
    np.testing.assert_allclose(context, whole, atol=1e-5)


def test_all_encoders_follow_the_protocol(text_encoder, tmp_path):
    cache = EmbeddingCache(folder=tmp_path, identity="x")
    rows = {"a": np.zeros((1, 2), np.float32)}
    for encoder in (
        text_encoder,
        CachedTextEncoder(cache=cache, text_length=24),
        GivenTextEncoder(embeddings=rows, text_length=24),
    ):
        assert isinstance(encoder, TextEncoder)
        assert encoder.unknown_words("qwxz") == []
        assert encoder.describe_vocabulary()
    assert "303 known pieces" in text_encoder.describe_vocabulary()


@pytest.mark.usefixtures("without_jaxtyping")
def test_a_string_and_no_prompt_are_refused(text_encoder, tokenizer, tmp_path):
    cache = EmbeddingCache(folder=tmp_path, identity="x")
    rows = {"a": np.zeros((1, 2), np.float32)}
    for encoder in (
        tokenizer,
        text_encoder,
        CachedTextEncoder(cache=cache, text_length=24),
        GivenTextEncoder(embeddings=rows, text_length=24),
    ):
        with pytest.raises(TypeError, match="prompts='a' must be a sequence of str"):
            encoder.encode("a")
        with pytest.raises(ValueError, match=r"prompts=\[\] must hold at least one"):
            encoder.encode([])


def test_a_freed_encoder_says_so(text_encoder):
    encoder = copy_of(text_encoder)
    encoder.free()
    with pytest.raises(RuntimeError, match="was freed; load it again"):
        encoder.encode(["a cat"])


def test_results_that_are_not_finite_are_refused(text_encoder):
    encoder = copy_of(text_encoder)
    scale = encoder.model.norm.scale
    scale[...] = np.nan * scale[...]
    with pytest.raises(FloatingPointError, match="context of 'a cat' is not finite"):
        encoder.encode(["a cat"])


def test_load_reads_both_parts(text_encoder, expected, tmp_path):
    weights = export_umt5_encoder(text_encoder.model, layout="original")
    safetensors.numpy.save_file(weights, tmp_path / "encoder.safetensors")
    config = text_encoder.model.config
    device = jax.devices("cpu")[0]
    again = UMT5TextEncoder.load(
        tmp_path,
        FIXTURES / "umt5_tokenizer",
        config=dataclasses.replace(config, param_dtype="float32"),
        max_length=24,
        device=device,
    )
    np.testing.assert_array_equal(again.encode(PROMPTS)[0], expected[0])


def test_cpus_compute_in_float32():
    assert default_dtype(jax.devices("cpu")[0]) == "float32"


def test_a_table_smaller_than_the_tokenizer_is_refused(tokenizer, cases):
    with pytest.raises(ValueError, match=r"has 303 tokens; the encoder has .* for 40"):
        UMT5TextEncoder(model=cases["one_head"].model(), tokenizer=tokenizer)


@pytest.mark.parametrize(
    "shapes",
    [[], [(2, 3), (2, 4)], [(5, 3)], [(0, 3)], [(3,)]],
    ids=["none", "widths", "long", "empty", "flat"],
)
@pytest.mark.usefixtures("without_jaxtyping")
def test_rows_that_do_not_fit_are_refused(shapes):
    with pytest.raises(ValueError, match="1 to 4 vectors each, all of one width"):
        pad_rows([np.zeros(shape, np.float32) for shape in shapes], 4)


class Loads:
    """Makes the encoder anew each time, as from disk, and keeps what it made."""

    def __init__(self, original):
        self.original = original
        self.made = []

    def __call__(self):
        self.made.append(copy_of(self.original))
        return self.made[-1]


def test_a_cache_loads_the_encoder_only_for_new_prompts(
    text_encoder, expected, tmp_path
):
    loads = Loads(text_encoder)
    cache = EmbeddingCache(folder=tmp_path / "new", identity="x")
    encoder = CachedTextEncoder(cache=cache, text_length=24, load_encoder=loads)
    for count in (1, 1):
        context, lengths = encoder.encode(PROMPTS)
        np.testing.assert_array_equal(context, expected[0])
        np.testing.assert_array_equal(lengths, expected[1])
        assert len(loads.made) == count
    encoder.encode(["a bird", "a cat"])
    assert len(loads.made) == 2
    for made in loads.made:
        leaves = jax.tree.leaves(nnx.state(made.model))
        assert leaves
        assert all(leaf.is_deleted() for leaf in leaves)
    names = sorted(file.suffix for file in (tmp_path / "new").iterdir())
    assert names == [".safetensors"] * 4  # no partial file is left
    alone = CachedTextEncoder(cache=cache, text_length=24)
    np.testing.assert_array_equal(alone.encode(PROMPTS)[0], expected[0])


def test_a_cache_that_cannot_be_written_costs_no_run(text_encoder, expected, tmp_path):
    (tmp_path / "file").write_text("")
    cache = EmbeddingCache(folder=tmp_path / "file" / "below", identity="x")
    encoder = CachedTextEncoder(
        cache=cache, text_length=24, load_encoder=Loads(text_encoder)
    )
    with pytest.warns(UserWarning, match=r"cannot be kept in .*below, so later runs"):
        context, lengths = encoder.encode(PROMPTS)
    np.testing.assert_array_equal(context, expected[0])
    np.testing.assert_array_equal(lengths, expected[1])


def test_prompts_that_clean_to_the_same_text_share_a_file(tmp_path):
    cache = EmbeddingCache(folder=tmp_path, identity="x")
    cache.store("a  cat ", np.ones((2, 3), np.float32))
    np.testing.assert_array_equal(cache.load("a cat"), 1.0)
    assert cache.load("a dog") is None
    other = EmbeddingCache(folder=tmp_path, identity="y")
    assert other.load("a cat") is None


def test_prompts_without_embedding_are_named(tmp_path):
    cache = EmbeddingCache(folder=tmp_path, identity="x")
    with pytest.raises(LookupError, match=r"no embeddings by this encoder of \['a c"):
        CachedTextEncoder(cache=cache, text_length=24).encode(["a cat"])


def test_damaged_embeddings_are_named(tmp_path):
    cache = EmbeddingCache(folder=tmp_path, identity="x")
    path = cache.store("a cat", np.ones((2, 3), np.float32))
    path.rename(cache.path("a dog"))
    with pytest.raises(CheckpointError, match="is not the embedding of 'a dog' by"):
        cache.load("a dog")
    path.write_bytes(b"\0" * 20)
    with pytest.raises(CheckpointError, match=f"{path} cannot be read"):
        cache.load("a cat")


def test_identity_differs_with_anything_that_changes_embeddings(tokenizer, tmp_path):
    weights, copy, edited = (tmp_path / name for name in ("a", "b", "c"))
    data = bytearray(np.random.default_rng(0).bytes(300_000))
    weights.write_bytes(data)
    copy.write_bytes(data)
    data[299_999] ^= 1
    edited.write_bytes(data)
    config = UMT5Config.xxl()
    wide = dataclasses.replace(config, dtype="float32")
    longer = UMT5Tokenizer(tokenizer.file, max_length=25)
    identities = [
        encoder_identity(config, tokenizer, [weights]),
        encoder_identity(config, tokenizer, [edited]),
        encoder_identity(config, tokenizer, [weights, copy]),
        encoder_identity(wide, tokenizer, [weights]),
        encoder_identity(config, longer, [weights]),
    ]
    assert len(set(identities)) == len(identities)
    assert encoder_identity(config, tokenizer, [copy]) == identities[0]
    with pytest.raises(CheckpointError, match="at least one weight file"):
        encoder_identity(config, tokenizer, [])
    with pytest.raises(CheckpointError, match="missing cannot be read"):
        encoder_identity(config, tokenizer, [tmp_path / "missing"])


def test_given_embeddings(text_encoder, expected, tmp_path):
    given = GivenTextEncoder(embeddings=text_encoder.embed(PROMPTS), text_length=24)
    given.save(tmp_path / "prompts.safetensors")
    read = GivenTextEncoder.load(tmp_path / "prompts.safetensors", text_length=24)
    for encoder in (given, read):
        context, lengths = encoder.encode(PROMPTS)
        np.testing.assert_array_equal(context, expected[0])
        np.testing.assert_array_equal(lengths, expected[1])
    with pytest.raises(LookupError, match=r"given for \['x'\]; .* \['a cat', '', "):
        read.encode(["a cat", "x"])
    with pytest.raises(ValueError, match="1 to 3 vectors each"):
        GivenTextEncoder.load(tmp_path / "prompts.safetensors", text_length=3)


def test_other_files_are_not_embeddings(tmp_path):
    file = tmp_path / "weights.safetensors"
    safetensors.numpy.save_file({"x": np.ones(2)}, file)
    with pytest.raises(CheckpointError, match=f"{file} is not a file of embeddings"):
        GivenTextEncoder.load(file)
    with pytest.raises(CheckpointError, match=r"missing cannot be read"):
        GivenTextEncoder.load(tmp_path / "missing")

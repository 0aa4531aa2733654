"""Prompts to context; storing it is tested in tests/models/diffusion."""

import dataclasses

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from models.diffusion.dtypes import default_dtype
from models.diffusion.interfaces import TextEncoder
from models.umt5.config import UMT5Config
from models.umt5.convert import export_umt5_encoder
from models.umt5.embeddings import umt5_cache
from models.umt5.text_encoder import UMT5TextEncoder
from models.umt5.tokenizer import UMT5Tokenizer
from tests.models.umt5.conftest import FIXTURES, copy_of

run = nnx.jit(lambda model, ids, lengths: model(ids, lengths))
PROMPTS = ["a cat", "", "a dog at night", "a cat"]


@pytest.fixture(scope="module")
def expected(text_encoder):
    context = text_encoder.encode(PROMPTS)
    assert context.pooled is None
    return np.asarray(context.embeddings), np.asarray(context.lengths)


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
    context = text_encoder.encode(["a dog at night"])
    np.testing.assert_array_equal(context.embeddings[0], expected[0][2])
    assert context.lengths[0] == expected[1][2]


def test_long_and_short_prompts_agree_at_any_padded_size(text_encoder):
    """Prompts run at 32, 64, ... tokens; the size must not show."""
    tokenizer = UMT5Tokenizer(FIXTURES / "umt5_tokenizer", max_length=100)
    encoder = dataclasses.replace(text_encoder, tokenizer=tokenizer)
    prompts = ["a", "cats and dogs " * 5, "cats and dogs " * 11]
    ids, lengths = tokenizer.encode(prompts)
    assert [n > 32 for n in lengths] == [False, True, True]
    assert [n > 64 for n in lengths] == [False, False, True]
    context = encoder.encode(prompts).embeddings
    whole = run(encoder.model, ids, lengths)
    np.testing.assert_allclose(context, whole, atol=1e-5)


def test_it_follows_the_protocol(text_encoder):
    assert isinstance(text_encoder, TextEncoder)
    assert text_encoder.unknown_words("qwxz") == []
    assert "303 known pieces" in text_encoder.describe_vocabulary()


@pytest.mark.usefixtures("without_jaxtyping")
def test_a_string_and_no_prompt_are_refused(text_encoder, tokenizer):
    for encoder in (tokenizer, text_encoder):
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
    np.testing.assert_array_equal(again.encode(PROMPTS).embeddings, expected[0])


def test_cpus_compute_in_float32():
    assert default_dtype(jax.devices("cpu")[0]) == "float32"


def test_a_table_smaller_than_the_tokenizer_is_refused(tokenizer, cases):
    with pytest.raises(ValueError, match=r"has 303 tokens; the encoder has .* for 40"):
        UMT5TextEncoder(model=cases["one_head"].model(), tokenizer=tokenizer)


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
    arguments = [
        (config, tokenizer, [weights]),
        (config, tokenizer, [edited]),
        (config, tokenizer, [weights, copy]),
        (wide, tokenizer, [weights]),
        (config, longer, [weights]),
    ]
    identities = [umt5_cache(tmp_path, *given).identity for given in arguments]
    assert len(set(identities)) == len(identities)
    renamed = umt5_cache(tmp_path, config, tokenizer, [copy])
    assert renamed.identity == identities[0]
    assert renamed.path("a  cat ") == renamed.path("a cat")


def test_folders_of_before_are_read(tokenizer, tmp_path):
    """The identity is that of the first release, for these sizes and weights."""
    weights = tmp_path / "weights"
    weights.write_bytes(bytes(range(256)))
    cache = umt5_cache(tmp_path, UMT5Config.xxl(dtype="float32"), tokenizer, [weights])
    expected = "d99cc56c3eaa25c0e267e764bc9a1a647370ec1f4c101d94a11cccd67ae27e68"
    assert cache.identity == expected

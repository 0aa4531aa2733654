"""Vocabulary and text embedding of the small model."""

# ruff: noqa: RUF001  # letters of other scripts are the point

import re

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.mini.text import TextEmbedding, Vocabulary, split_words

VOCABULARY = Vocabulary(
    words=("a", "and", "ball", "blue", "box", "red"), num_buckets=4, max_length=8
)


@pytest.fixture(scope="module")
def embedding() -> TextEmbedding:
    return TextEmbedding(VOCABULARY.size, 8, 16, rngs=nnx.Rngs(0))


def embed(embedding: TextEmbedding, *prompts: str) -> np.ndarray:
    ids, lengths, _ = VOCABULARY.encode(prompts)
    return np.asarray(embedding(jnp.asarray(ids), jnp.asarray(lengths)))


def test_split_words():
    assert split_words("A red, RED ball's 2-day trip!") == [
        *("a", "red", "red", "ball's", "2", "day", "trip"),
    ]


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("一只狗, 红色 ball", ["一只狗", "红色", "ball"]),
        ("Красный МЯЧ", ["красный", "мяч"]),
        ("कुत्ता", ["कुत्ता"]),  # vowel signs are marks
        ("cafe\u0301 CAF\u00c9", ["café", "café"]),
        ("می\u200cخواهم", ["می\u200cخواهم"]),
        ("a 🐕🏽 and ❤\ufe0f!", ["a", "🐕🏽", "and", "❤\ufe0f"]),
        ("👩\u200d🚀red", ["👩\u200d🚀", "red"]),
        ("Ｒｅｄ it’s", ["red", "it's"]),
        ("$5 + 10% (ok)_x^y", ["5", "10", "ok", "x", "y"]),
        ("?!… —", []),
    ],
)
def test_words_of_every_script(prompt, words):
    assert split_words(prompt) == words


def test_words_of_ascii_are_those_of_the_training():
    """The shipped model's ids follow from this pattern."""
    rng = np.random.default_rng(0)
    for codes in rng.integers(0, 128, (200, 60)):
        prompt = "".join(map(chr, codes))
        assert split_words(prompt) == re.findall(r"[a-z0-9']+", prompt.lower())


def test_ids_and_lengths():
    ids, lengths, unknown = VOCABULARY.encode(["a red Ball.", "", "box a"])
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids[0], [1, 6, 3, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(ids[1], np.zeros(8))
    np.testing.assert_array_equal(ids[2, :3], [5, 1, 0])
    np.testing.assert_array_equal(lengths, [3, 0, 2])
    assert unknown == [[], [], []]


def test_unknown_words_share_buckets():
    ids, lengths, unknown = VOCABULARY.encode(["a dragon"])
    # The CRC-32 of "dragon" is 0x27d829b4, and that modulo 4 is 0.
    assert ids[0, 1] == 7 + 0
    assert lengths[0] == 2
    assert unknown == [["dragon"]]
    assert VOCABULARY.size == 1 + 6 + 4


def test_long_prompt_is_cut_with_a_warning():
    with pytest.warns(UserWarning, match="prompt 0 has 9 words; only the first 8"):
        ids, lengths, _ = VOCABULARY.encode(["red " * 9])
    assert lengths[0] == 8
    assert (ids == 6).all()


def test_from_captions_is_sorted_and_saved(tmp_path):
    built = Vocabulary.from_captions(["red box", "a RED ball"], num_buckets=2)
    assert built.words == ("a", "ball", "box", "red")
    built.save(tmp_path / "vocabulary.json")
    assert Vocabulary.load(tmp_path / "vocabulary.json") == built


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"words": ("a", "a")}, "appears twice"),
        ({"words": ("a",), "num_buckets": 0}, "num_buckets=0 must be at least 1"),
        ({"words": ("a",), "max_length": 0}, "max_length=0 must be at least 1"),
    ],
)
def test_bad_vocabulary(fields, text):
    with pytest.raises(ValueError, match=text):
        Vocabulary(**fields)


def test_padding_rows_are_zero(embedding):
    context = embed(embedding, "a red ball", "")
    assert (np.abs(context[0, :3]).max(axis=-1) > 0.1).all()
    np.testing.assert_array_equal(context[0, 3:], 0.0)
    np.testing.assert_array_equal(context[1], 0.0)


def test_batch_items_do_not_influence_each_other(embedding):
    alone = embed(embedding, "a red ball")
    together = embed(embedding, "blue box", "a red ball", "a")
    np.testing.assert_allclose(together[1], alone[0], atol=1e-6)


def test_order_of_words_matters(embedding):
    first, second = embed(
        embedding, "a red ball and a blue box", "a blue ball and a red box"
    )
    assert np.abs(first - second).max() > 0.1
    # Also at the words themselves: "ball" beside "red" differs from beside "blue".
    assert np.abs(first[2] - second[2]).max() > 1e-3


def test_convolution_matches_loops(embedding):
    """The first convolution of a one-layer copy, word by word."""
    ids, _, _ = VOCABULARY.encode(["a red ball"])
    words = np.asarray(embedding.words.embedding[...])
    positions = np.asarray(embedding.positions.embedding[...])
    rows = np.zeros((8, 16))
    for place in range(3):
        rows[place] = words[ids[0, place]] + positions[place]
    for layer in (embedding.convolution_0, embedding.convolution_1):
        kernel, bias = np.asarray(layer.kernel[...]), np.asarray(layer.bias[...])
        mixed = np.zeros_like(rows)
        for place in range(3):
            window = [
                rows[place + shift] if 0 <= place + shift < 8 else np.zeros(16)
                for shift in (-2, -1, 0, 1, 2)
            ]
            value = np.concatenate(window) @ kernel + bias
            cubic = np.sqrt(2 / np.pi) * (value + 0.044715 * value**3)
            mixed[place] = 0.5 * value * (1 + np.tanh(cubic))
        rows = rows + mixed
    np.testing.assert_allclose(embed(embedding, "a red ball")[0], rows, atol=1e-5)

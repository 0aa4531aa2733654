"""Words to context vectors: the text side of the small model.

Wan's text encoder has 5.7 billion parameters. The small model's captions come from a
small grammar, so a table of word vectors and two convolutions take its place. The
convolutions tell "a red ball and a blue box" from "a blue ball and a red box".
"""

import dataclasses
import json
import re
import unicodedata
import warnings
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

PADDING = 0
KERNEL = 5  # words that one convolution sees


_RUNS = re.compile("[wm]+|s[sm]*")  # of the kinds of `_kind`
_JOINERS = "\u200c\u200d"  # stand inside words of some scripts, and inside emoji


def split_words(prompt: str) -> list[str]:
    """Returns the words of a prompt in lower case, without punctuation.

    Letters of every script count, with their marks, and so do symbols such as emoji. A
    script that leaves no spaces between words gives one word for each phrase.
    """
    text = unicodedata.normalize("NFKC", prompt).replace("\u2019", "'").lower()
    kinds = "".join(map(_kind, text))
    return [text[run.start() : run.end()] for run in _RUNS.finditer(kinds)]


def _kind(character: str) -> str:
    """Returns w in words, s for symbols, m for marks of either, and a space between."""
    category = unicodedata.category(character)
    if category[0] in "LN" or character == "'":
        return "w"
    if category == "So":
        return "s"
    # Colours of emoji are modifiers; ASCII's two are punctuation here.
    modifier = category == "Sk" and not character.isascii()
    return "m" if category[0] == "M" or modifier or character in _JOINERS else " "


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The ids of the words that a model was trained on.

    Id 0 is padding, ids from 1 are the known words in order; the last ids are
    buckets that unknown words are hashed into.

    Attributes:
      words: Known words, each once.
      num_buckets: Buckets for the others.
      max_length: Words of a prompt that are read, L.

    Raises:
      ValueError: A word appears twice, or a count is not positive.
    """

    words: tuple[str, ...]
    num_buckets: int = 64
    max_length: int = 32

    def __post_init__(self) -> None:
        if len(set(self.words)) != len(self.words):
            raise ValueError("a word appears twice in the vocabulary")
        for name in ("num_buckets", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    @classmethod
    def from_captions(cls, captions: Iterable[str], **options: int) -> "Vocabulary":
        """Takes every word of some captions, in alphabetical order."""
        words = {word for caption in captions for word in split_words(caption)}
        return cls(words=tuple(sorted(words)), **options)

    @classmethod
    def load(cls, path: Path | str) -> "Vocabulary":
        """Reads `vocabulary.json`."""
        fields = json.loads(Path(path).read_text())
        return cls(**(fields | {"words": tuple(fields["words"])}))

    def save(self, path: Path | str) -> None:
        """Writes `vocabulary.json`."""
        Path(path).write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    @property
    def size(self) -> int:
        """The number of rows of the embedding table."""
        return 1 + len(self.words) + self.num_buckets

    @property
    def first_bucket(self) -> int:
        """The id of the first bucket for unknown words."""
        return 1 + len(self.words)

    def encode(
        self, prompts: Sequence[str]
    ) -> tuple[Int[np.ndarray, "B L"], Int[np.ndarray, " B"], list[list[str]]]:
        """Returns the ids of the words of some prompts.

        Args:
          prompts: Any text. Words past `max_length` are left out with a warning.

        Returns:
          ids: int32, 0 past the end of a prompt.
          lengths: int32, words of each prompt. An empty prompt has length 0.
          unknown: The words of each prompt that the model never saw.
        """
        known = {word: 1 + index for index, word in enumerate(self.words)}
        ids = np.full((len(prompts), self.max_length), PADDING, np.int32)
        lengths = np.zeros(len(prompts), np.int32)
        unknown: list[list[str]] = []
        for row, prompt in enumerate(prompts):
            words = split_words(prompt)
            if len(words) > self.max_length:
                warnings.warn(
                    f"prompt {row} has {len(words)} words; only the first "
                    f"{self.max_length} are read",
                    stacklevel=2,
                )
            words = words[: self.max_length]
            ids[row, : len(words)] = [
                known.get(word, self._bucket(word)) for word in words
            ]
            lengths[row] = len(words)
            unknown.append([word for word in words if word not in known])
        return ids, lengths, unknown

    def _bucket(self, word: str) -> int:
        # crc32, because Python's own hash changes from run to run.
        return self.first_bucket + zlib.crc32(word.encode()) % self.num_buckets


class TextEmbedding(nnx.Module):
    """Word and position vectors, mixed by two convolutions over the words.

    Args:
      vocabulary_size: Rows of the word table.
      max_length: Rows of the position table, L.
      dim: Width of the context.
      rngs: Initialises the parameters.
    """

    def __init__(
        self, vocabulary_size: int, max_length: int, dim: int, *, rngs: nnx.Rngs
    ):
        # Unit variance after the sum, as the transformer's text layers expect.
        init = nnx.initializers.normal(0.7)
        self.words = nnx.Embed(vocabulary_size, dim, embedding_init=init, rngs=rngs)
        self.positions = nnx.Embed(max_length, dim, embedding_init=init, rngs=rngs)
        small = nnx.initializers.normal(0.02)
        self.convolution_0 = nnx.Linear(KERNEL * dim, dim, kernel_init=small, rngs=rngs)
        self.convolution_1 = nnx.Linear(KERNEL * dim, dim, kernel_init=small, rngs=rngs)

    def __call__(
        self, ids: Int[Array, "B L"], lengths: Int[Array, " B"]
    ) -> Float[Array, "B L E"]:
        """Embeds some prompts.

        Args:
          ids: Ids that `Vocabulary.encode` returns.
          lengths: Words of each prompt.

        Returns:
          float32; rows past a prompt's length are zero.
        """
        positions = jnp.arange(ids.shape[1])
        inside = (positions[None, :] < lengths[:, None])[..., None]
        context = jnp.where(inside, self.words(ids) + self.positions(positions), 0.0)
        for convolution in (self.convolution_0, self.convolution_1):
            mixed = jax.nn.gelu(convolution(_neighbours(context)))
            context = jnp.where(inside, context + mixed, 0.0)
        return context


def _neighbours(context: Float[Array, "B L E"]) -> Float[Array, "B L K"]:
    """Puts each word's vector beside those of the words around it."""
    length, reach = context.shape[1], KERNEL // 2
    padded = jnp.pad(context, ((0, 0), (reach, reach), (0, 0)))
    shifted = [padded[:, start : start + length] for start in range(KERNEL)]
    return jnp.concatenate(shifted, axis=-1)

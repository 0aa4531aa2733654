"""Text embeddings without the encoder: stored on disk, or given by the user.

A folder of embeddings has one file for each prompt. A hash of the cleaned prompt and of
the encoder names it, so encoders never read each other's. A file has the arrays of
`PromptEmbedding`: "context" for the tokens, and "pooled" where the encoder has one.
"""

import dataclasses
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Array, Float

from models.checkpoints.memory_map import CheckpointError
from models.diffusion.interfaces import TextContext
from models.diffusion.prompt_text import check_prompts
from models.files import write_whole


class UnknownPromptError(LookupError):
    """There are no embeddings of a prompt, and no encoder to make them."""


_FORMAT = "draft-video-embedding-1"
_SAMPLES, _SAMPLE_BYTES = 256, 2**16


class PromptEmbedding(NamedTuple):
    """Vectors of one prompt, in host memory."""

    tokens: Float[np.ndarray, "_ E"]  # a row for each token, without padding
    pooled: Float[np.ndarray, " P"] | None = None  # of the whole prompt, or None


class EmbeddingMaker(Protocol):
    """An encoder whose weights are in memory."""

    def embed(self, prompts: Sequence[str]) -> dict[str, PromptEmbedding]:
        """Returns the vectors of each prompt."""

    def free(self) -> None:
        """Gives the memory of the weights back."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbeddingCache:
    """Embeddings of prompts, on disk.

    Several processes may use one folder: a file appears only when it is complete.

    Args:
      folder: Folder of the files, made if it does not exist.
      identity: Name of the encoder that made the vectors; see `hash_settings`.
      clean: What the encoder does to a prompt before all else.
    """

    folder: Path | str
    identity: str
    clean: Callable[[str], str]

    def path(self, prompt: str) -> Path:
        """Returns a prompt's file; prompts that clean to the same text share it."""
        key = json.dumps([_FORMAT, self.identity, self.clean(prompt)])
        digest = hashlib.sha256(key.encode()).hexdigest()
        return Path(self.folder) / f"{digest}.safetensors"

    def load(self, prompt: str) -> PromptEmbedding | None:
        """Reads the embedding of a prompt; None if it is not there.

        Raises:
          CheckpointError: The file is damaged, or of another prompt or encoder.
        """
        path = self.path(prompt)
        if not path.exists():
            return None
        tensors, metadata = _read(path)
        expected = {"context"}, {"context", "pooled"}
        if metadata != self._metadata(prompt) or tensors.keys() not in expected:
            raise CheckpointError(
                f"{path} is not the embedding of {prompt!r} by this encoder; delete it"
            )
        return PromptEmbedding(tensors["context"], tensors.get("pooled"))

    def store(self, prompt: str, embedding: PromptEmbedding) -> Path:
        """Writes the embedding of a prompt; returns the file."""
        path = self.path(prompt)
        _write(path, _tensors(embedding), self._metadata(prompt))
        return path

    def _metadata(self, prompt: str) -> dict[str, str]:
        prompt = self.clean(prompt)
        return {"format": _FORMAT, "identity": self.identity, "prompt": prompt}


def hash_settings(settings: Mapping[str, Any]) -> str:
    """Returns a name for an encoder: a hash of all that its embeddings depend on.

    Args:
      settings: Values that JSON has, by name: of an encoder's configuration, of its
        tokenizer, and of its weights what `sample_weights` returns. Names of files
        and the device do not belong there.
    """
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def sample_weights(files: Iterable[Path]) -> list[str]:
    """Returns hashes of weight files that differ between any two encoders.

    They cover the size of each file and 256 samples of 64 KiB spread evenly over it.
    Other weights differ nearly everywhere, and reading 11 GB would take as long as
    loading them. Names and folders of the files do not count.

    Raises:
      CheckpointError: There is no weight file, or one cannot be read.
    """
    samples = sorted(_sample_digest(Path(file)) for file in files)
    if not samples:
        raise CheckpointError("an encoder's identity needs at least one weight file")
    return samples


def pad_embeddings(embeddings: Sequence[PromptEmbedding], length: int) -> TextContext:
    """Puts the embeddings of prompts together as the context of a batch.

    Args:
      embeddings: At least one; at most `length` tokens each, of equal width.
      length: Context rows, L.

    Returns:
      Context in float32, zero past the end of a prompt; lengths in int32. All are on
      the default device.

    Raises:
      ValueError: There is no prompt, or a prompt is too long or of another width.
    """
    rows = [embedding.tokens for embedding in embeddings]
    shapes = [row.shape for row in rows]
    widths = {shape[-1] for shape in shapes}
    if len(widths) != 1 or any(
        len(shape) != 2 or not 1 <= shape[0] <= length for shape in shapes
    ):
        raise ValueError(
            f"token vectors have the shapes {shapes}; expected at least one prompt, "
            f"1 to {length} vectors each, all of one width"
        )
    context = np.zeros((len(rows), length, *widths), np.float32)
    for item, row in zip(context, rows, strict=True):
        item[: len(row)] = row
    lengths = np.array([len(row) for row in rows], np.int32)
    return TextContext(
        jnp.asarray(context), jnp.asarray(lengths), _join_pooled(embeddings)
    )


def _join_pooled(
    embeddings: Sequence[PromptEmbedding],
) -> Float[Array, "B P"] | None:
    pooled = [e.pooled for e in embeddings if e.pooled is not None]
    if not pooled:
        return None
    shapes = [None if e.pooled is None else e.pooled.shape for e in embeddings]
    if len(set(shapes)) != 1 or pooled[0].ndim != 1:
        raise ValueError(
            f"pooled vectors have the shapes {shapes}; expected one vector for each "
            "prompt or none, all of one width"
        )
    return jnp.asarray(np.stack(pooled), jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CachedTextEncoder:
    """A `TextEncoder` that loads its encoder only for prompts it has not seen.

    Args:
      cache: Stored vectors.
      text_length: Context rows, L.
      load_encoder: Loads the encoder that `cache.identity` names. It is freed as
        soon as the missing prompts are stored. None if there is no encoder.
    """

    cache: EmbeddingCache
    text_length: int
    load_encoder: Callable[[], EmbeddingMaker] | None = None

    def encode(self, prompts: Sequence[str]) -> TextContext:
        """Returns the same as the encoder itself, to the last bit.

        Warns if new embeddings cannot be stored.

        Raises:
          CheckpointError: A stored embedding is damaged.
          UnknownPromptError: Prompts are not stored, and there is no encoder.
          TypeError: `prompts` is a string, not a sequence of them.
          ValueError: There is no prompt.
        """
        check_prompts(prompts)
        found = {prompt: self.cache.load(prompt) for prompt in prompts}
        missing = [prompt for prompt, stored in found.items() if stored is None]
        if missing and self.load_encoder is None:
            raise UnknownPromptError(
                f"{self.cache.folder} holds no embeddings by this encoder of {missing}"
            )
        if missing and self.load_encoder is not None:
            encoder = self.load_encoder()
            try:
                made = encoder.embed(missing)
            finally:
                encoder.free()
            self._keep(made)
            found |= made
        return pad_embeddings(
            [one for prompt in prompts if (one := found[prompt]) is not None],
            self.text_length,
        )

    def _keep(self, made: Mapping[str, PromptEmbedding]) -> None:
        """Stores new embeddings; they serve this run even if that fails."""
        try:
            for prompt, embedding in made.items():
                self.cache.store(prompt, embedding)
        except OSError as error:
            warnings.warn(
                f"embeddings cannot be kept in {self.cache.folder}, so later runs will "
                f"make them again: {error}",
                stacklevel=3,
            )

    def unknown_words(self, prompt: str) -> list[str]:
        """Returns no words: an encoder of subwords knows the pieces of any."""
        return []

    def describe_vocabulary(self) -> str:
        """Returns in words what prompts can be made of."""
        stored = f"prompts whose embeddings are in {self.cache.folder}"
        return stored if self.load_encoder is None else "any text"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class GivenTextEncoder:
    """A `TextEncoder` that knows exactly the embeddings it was given.

    Args:
      embeddings: Embeddings by prompt. With guidance there is one of the negative
        prompt too.
      text_length: Context rows, L.

    Raises:
      ValueError: A prompt has no or too many vectors, or widths differ.
    """

    embeddings: Mapping[str, PromptEmbedding]
    text_length: int

    def __post_init__(self) -> None:
        pad_embeddings(list(self.embeddings.values()), self.text_length)

    @classmethod
    def load(cls, path: Path | str, *, text_length: int) -> "GivenTextEncoder":
        """Reads the file that `save` writes.

        Raises:
          CheckpointError: The file is missing, damaged, or something else.
          ValueError: A prompt has more vectors than `text_length`.
        """
        path = Path(path)
        tensors, metadata = _read(path)
        try:
            prompts = json.loads(metadata["prompts"])
            embeddings = {
                prompt: PromptEmbedding(
                    tensors[f"context.{index}"], tensors.get(f"pooled.{index}")
                )
                for index, prompt in enumerate(prompts)
            }
        except (KeyError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"{path} is not a file of embeddings: {error!r}"
            ) from error
        return cls(embeddings=embeddings, text_length=text_length)

    def save(self, path: Path | str) -> None:
        """Writes all embeddings into one safetensors file."""
        tensors = {
            f"{name}.{index}": array
            for index, embedding in enumerate(self.embeddings.values())
            for name, array in _tensors(embedding).items()
        }
        prompts = json.dumps(list(self.embeddings), ensure_ascii=False)
        _write(Path(path), tensors, {"format": _FORMAT, "prompts": prompts})

    def encode(self, prompts: Sequence[str]) -> TextContext:
        """Returns the context of the prompts.

        Raises:
          UnknownPromptError: Embeddings of a prompt were not given.
          TypeError: `prompts` is a string, not a sequence of them.
          ValueError: There is no prompt.
        """
        check_prompts(prompts)
        unknown = [prompt for prompt in prompts if prompt not in self.embeddings]
        if unknown:
            raise UnknownPromptError(
                f"no embeddings were given for {unknown}; there are embeddings for "
                f"{list(self.embeddings)}"
            )
        return pad_embeddings([self.embeddings[p] for p in prompts], self.text_length)

    def unknown_words(self, prompt: str) -> list[str]:
        """Returns no words: `encode` refuses a prompt it does not know."""
        return []

    def describe_vocabulary(self) -> str:
        """Returns in words what prompts can be made of."""
        return f"exactly the prompts {list(self.embeddings)}"


def _tensors(embedding: PromptEmbedding) -> dict[str, np.ndarray]:
    """Returns the arrays of a file, by the names that they have there."""
    pooled = {} if embedding.pooled is None else {"pooled": embedding.pooled}
    return {"context": embedding.tokens} | pooled


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    try:
        with safetensors.safe_open(path, framework="np") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _write(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: dict[str, str]
) -> None:
    """Writes a file that other processes see whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = safetensors.numpy.save(
        {key: np.ascontiguousarray(value) for key, value in tensors.items()}, metadata
    )
    write_whole(path, data)


def _sample_digest(path: Path) -> str:
    """Returns the SHA-256 of a file's size and of bytes spread over it."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            digest = hashlib.sha256(str(size).encode())
            last = max(size - _SAMPLE_BYTES, 0)
            # Every byte of a small file is read; offsets of a large one spread out.
            step = max(last / (_SAMPLES - 1), _SAMPLE_BYTES)
            for start in dict.fromkeys(
                min(round(index * step), last) for index in range(_SAMPLES)
            ):
                file.seek(start)
                digest.update(file.read(_SAMPLE_BYTES))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return digest.hexdigest()

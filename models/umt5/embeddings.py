"""Text embeddings without the encoder: stored on disk, or given by the user.

A folder of embeddings has one file for each prompt. A hash of the cleaned prompt and of
the encoder names it, so encoders never read each other's.
"""

import dataclasses
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Array, Float, Int

from models.checkpoints.memory_map import CheckpointError
from models.files import write_whole
from models.umt5.config import TEXT_LENGTH, UMT5Config
from models.umt5.text_encoder import UMT5TextEncoder, pad_rows
from models.umt5.tokenizer import UMT5Tokenizer, check_prompts, clean_prompt


class UnknownPromptError(LookupError):
    """There are no embeddings of a prompt, and no encoder to make them."""


TokenVectors = Float[np.ndarray, "_ E"]
_FORMAT = "draft-video-embedding-1"
_SAMPLES, _SAMPLE_BYTES = 256, 2**16


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbeddingCache:
    """Token vectors of prompts, on disk.

    Several processes may use one folder: a file appears only when it is complete.

    Args:
      folder: Folder of the files, made if it does not exist.
      identity: Name of the encoder that made the vectors; see `encoder_identity`.
    """

    folder: Path | str
    identity: str

    def path(self, prompt: str) -> Path:
        """Returns a prompt's file; prompts that clean to the same text share it."""
        key = json.dumps([_FORMAT, self.identity, clean_prompt(prompt)])
        digest = hashlib.sha256(key.encode()).hexdigest()
        return Path(self.folder) / f"{digest}.safetensors"

    def load(self, prompt: str) -> TokenVectors | None:
        """Reads the vectors of a prompt; None if they are not there.

        Raises:
          CheckpointError: The file is damaged, or of another prompt or encoder.
        """
        path = self.path(prompt)
        if not path.exists():
            return None
        tensors, metadata = _read(path)
        if metadata != self._metadata(prompt) or tensors.keys() != {"context"}:
            raise CheckpointError(
                f"{path} is not the embedding of {prompt!r} by this encoder; delete it"
            )
        return tensors["context"]

    def store(self, prompt: str, vectors: TokenVectors) -> Path:
        """Writes the vectors of a prompt; returns the file."""
        path = self.path(prompt)
        _write(path, {"context": vectors}, self._metadata(prompt))
        return path

    def _metadata(self, prompt: str) -> dict[str, str]:
        prompt = clean_prompt(prompt)
        return {"format": _FORMAT, "identity": self.identity, "prompt": prompt}


def encoder_identity(
    config: UMT5Config, tokenizer: UMT5Tokenizer, weight_files: Iterable[Path]
) -> str:
    """Returns a name for an encoder that differs whenever its embeddings may.

    It covers the configuration, the tokenizer's file and length, and the size of each
    weight file with 256 samples of 64 KiB spread evenly over it. Other weights differ
    nearly everywhere, and reading 11 GB would take as long as loading them. Names and
    folders of the files do not count, and neither does the device.

    Args:
      config: The encoder's configuration.
      tokenizer: The encoder's tokenizer.
      weight_files: Its checkpoint.

    Raises:
      CheckpointError: There is no weight file, or one cannot be read.
    """
    samples = sorted(_sample_digest(Path(file)) for file in weight_files)
    if not samples:
        raise CheckpointError("an encoder's identity needs at least one weight file")
    parts = {
        "config": dataclasses.asdict(config),
        "tokenizer": tokenizer.digest,
        "max_length": tokenizer.max_length,
        "weights": samples,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


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
    load_encoder: Callable[[], UMT5TextEncoder] | None = None

    def encode(
        self, prompts: Sequence[str]
    ) -> tuple[Float[Array, "B L E"], Int[Array, " B"]]:
        """Returns the same as `UMT5TextEncoder.encode`, to the last bit.

        Warns if new embeddings cannot be stored.

        Raises:
          CheckpointError: A stored embedding is damaged.
          UnknownPromptError: Prompts are not stored, and there is no encoder.
          TypeError: `prompts` is a string, not a sequence of them.
          ValueError: There is no prompt.
        """
        check_prompts(prompts)
        rows = {prompt: self.cache.load(prompt) for prompt in prompts}
        missing = [prompt for prompt, row in rows.items() if row is None]
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
            rows |= made
        return pad_rows(
            [row for prompt in prompts if (row := rows[prompt]) is not None],
            self.text_length,
        )

    def _keep(self, made: Mapping[str, TokenVectors]) -> None:
        """Stores new embeddings; they serve this run even if that fails."""
        try:
            for prompt, vectors in made.items():
                self.cache.store(prompt, vectors)
        except OSError as error:
            warnings.warn(
                f"embeddings cannot be kept in {self.cache.folder}, so later runs will "
                f"make them again: {error}",
                stacklevel=3,
            )

    def unknown_words(self, prompt: str) -> list[str]:
        """Returns no words; see `UMT5TextEncoder`."""
        return []

    def describe_vocabulary(self) -> str:
        """Returns in words what prompts can be made of."""
        stored = f"prompts whose embeddings are in {self.cache.folder}"
        return stored if self.load_encoder is None else "any text"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class GivenTextEncoder:
    """A `TextEncoder` that knows exactly the embeddings it was given.

    Args:
      embeddings: Vectors of a prompt's tokens, its end token included, by prompt.
        Guidance needs those of the negative prompt too.
      text_length: Context rows, L.

    Raises:
      ValueError: A prompt has no or too many vectors, or widths differ.
    """

    embeddings: Mapping[str, TokenVectors]
    text_length: int

    def __post_init__(self) -> None:
        pad_rows(list(self.embeddings.values()), self.text_length)

    @classmethod
    def load(
        cls, path: Path | str, *, text_length: int = TEXT_LENGTH
    ) -> "GivenTextEncoder":
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
                prompt: tensors[f"context.{index}"]
                for index, prompt in enumerate(prompts)
            }
        except (KeyError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"{path} is not a file of embeddings: {error!r}"
            ) from error
        return cls(embeddings=embeddings, text_length=text_length)

    def save(self, path: Path | str) -> None:
        """Writes all embeddings into one safetensors file."""
        rows = self.embeddings.values()
        tensors = {f"context.{index}": row for index, row in enumerate(rows)}
        prompts = json.dumps(list(self.embeddings), ensure_ascii=False)
        _write(Path(path), tensors, {"format": _FORMAT, "prompts": prompts})

    def encode(
        self, prompts: Sequence[str]
    ) -> tuple[Float[Array, "B L E"], Int[Array, " B"]]:
        """Returns the context of the prompts, and how many of its rows are tokens.

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
        return pad_rows([self.embeddings[p] for p in prompts], self.text_length)

    def unknown_words(self, prompt: str) -> list[str]:
        """Returns no words: `encode` refuses a prompt it does not know."""
        return []

    def describe_vocabulary(self) -> str:
        """Returns in words what prompts can be made of."""
        return f"exactly the prompts {list(self.embeddings)}"


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

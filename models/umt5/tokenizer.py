"""Turns prompts into token ids as Wan's own pipeline does: clean, split, end, pad.

The tokenizer is read from `tokenizer.json`, which both published layouts contain and
which transformers itself runs. A lone `spiece.model` is refused: a second library
for the same table would have to be kept in step with the first.
"""

import hashlib
import html
import importlib
import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
from jaxtyping import Int

from models.checkpoints.hub import INSTALL_WAN_EXTRA
from models.checkpoints.safetensors_io import CheckpointError
from models.diffusion.prompt_text import check_prompts
from models.umt5.config import TEXT_LENGTH

FILE = "tokenizer.json"
# Where the published checkpoint folders keep it: original Wan, diffusers.
_SUBFOLDERS = (".", "google/umt5-xxl", "tokenizer")
_PADDING, _END = "<pad>", "</s>"


class UMT5Tokenizer:
    """A subword tokenizer that ends every prompt with an end token.

    Attributes:
      file: The `tokenizer.json` that was read.
      max_length: Tokens of a prompt that are kept, L, the end token included.
      digest: SHA-256 of the file.
    """

    def __init__(self, path: Path | str, *, max_length: int = TEXT_LENGTH) -> None:
        """Reads a tokenizer.

        Args:
          path: `tokenizer.json`, the folder it is in, or a checkpoint folder in
            the original Wan or the diffusers layout.
          max_length: Tokens of a prompt that are kept, the end token included.

        Raises:
          CheckpointError: There is no such file, or it is damaged or not a UMT5
            tokenizer.
          ImportError: The package `tokenizers` is not installed.
          ValueError: `max_length` is not a positive integer.
        """
        if type(max_length) is not int or max_length < 1:
            raise ValueError(f"{max_length=} must be a positive integer")
        tokenizers = _require("tokenizers")
        self.file = find_tokenizer(Path(path))
        self.max_length = max_length
        content = self.file.read_bytes()
        self.digest = hashlib.sha256(content).hexdigest()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the package raises plain Exception
            raise CheckpointError(
                f"{self.file} is damaged or not a tokenizer: {error}"
            ) from error
        # Some published files carry a length; ours is `max_length` alone.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        padding, end = map(self._tokenizer.token_to_id, (_PADDING, _END))
        if padding is None or self._tokenizer.encode("").ids[-1:] != [end]:
            raise CheckpointError(
                f"{self.file} is not a UMT5 tokenizer: it must have the token "
                f"{_PADDING!r} and end every prompt with {_END!r}"
            )
        self._padding, self._end = padding, end

    @property
    def vocab_size(self) -> int:
        """The number of tokens it has, added ones included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(
        self, prompts: Sequence[str]
    ) -> tuple[Int[np.ndarray, "B L"], Int[np.ndarray, " B"]]:
        """Returns the tokens of some prompts.

        Args:
          prompts: Any text; cleaned by `clean_prompt` first. Tokens past
            `max_length` are left out with a warning; the end token stays.

        Returns:
          ids: int32, padded with the padding token.
          lengths: int32, tokens of each prompt with the end token; at least 1.

        Raises:
          ImportError: The package `ftfy` is not installed.
          TypeError: `prompts` is a string, not a sequence of them.
          ValueError: There is no prompt.
        """
        check_prompts(prompts)
        ids = np.full((len(prompts), self.max_length), self._padding, np.int32)
        lengths = np.zeros(len(prompts), np.int32)
        for row, prompt in enumerate(prompts):
            tokens = self._tokenizer.encode(clean_prompt(prompt)).ids
            if len(tokens) > self.max_length:
                warnings.warn(
                    f"the prompt {prompt[:60]!r} has {len(tokens)} tokens; only the "
                    f"first {self.max_length - 1} and the end token are read",
                    stacklevel=2,
                )
                tokens = [*tokens[: self.max_length - 1], self._end]
            ids[row, : len(tokens)] = tokens
            lengths[row] = len(tokens)
        return ids, lengths


def check_text_packages(*, tokenizer: bool) -> None:
    """Raises before anything is loaded if a package that prompts need is missing.

    Args:
      tokenizer: Whether prompts are split into tokens; stored embeddings are found by
        the cleaned prompt alone.

    Raises:
      ImportError: The package `ftfy` or `tokenizers` is not installed.
    """
    for package in ("ftfy", *(("tokenizers",) if tokenizer else ())):
        _require(package)


def clean_prompt(prompt: str) -> str:
    """Cleans a text as Wan's pipeline does before it is split into tokens.

    Repairs wrongly decoded text and straightens curly quotes (ftfy), replaces HTML
    entities, even ones escaped twice, and makes one space of any whitespace.

    Raises:
      ImportError: The package `ftfy` is not installed.

    Source: Wan2.1 `wan/modules/tokenizers.py`, clean="whitespace".
    """
    text = _require("ftfy").fix_text(prompt)
    text = html.unescape(html.unescape(text))
    return re.sub(r"\s+", " ", text).strip()


def find_tokenizer(path: Path) -> Path:
    """Finds the `tokenizer.json` at a path; see `UMT5Tokenizer` for what is accepted.

    Raises:
      CheckpointError: There is none; the folders looked at are named.
    """
    if path.is_file():
        return path
    if (found := search_tokenizer([path])) is not None:
        return found
    folders = [path / subfolder for subfolder in _SUBFOLDERS]
    for folder in folders:
        if (folder / "spiece.model").is_file():
            raise CheckpointError(
                f"{folder} has spiece.model but no {FILE}; with transformers, "
                f"AutoTokenizer.from_pretrained({str(folder)!r})"
                f".save_pretrained({str(folder)!r}) writes it"
            )
    raise CheckpointError(
        f"found no {FILE} in any of {[str(folder) for folder in folders]}"
    )


def search_tokenizer(folders: Iterable[Path]) -> Path | None:
    """Returns the first `tokenizer.json` in some folders; None if there is none."""
    for folder in folders:
        for subfolder in _SUBFOLDERS:
            if (file := folder / subfolder / FILE).is_file():
                return file
    return None


def _require(package: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"Wan's text encoder needs the package {package}; install it with "
            f"{INSTALL_WAN_EXTRA}"
        ) from error

"""The text encoders of HunyuanVideo: a prompt's tokens from LLaMA, one vector of CLIP.

Both run through transformers in a process of their own, which ends when the prompts
are encoded. JAX should not have taken the GPU by then.
"""

import dataclasses
import importlib.util
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from models.diffusion.embeddings import (
    EmbeddingCache,
    PromptEmbedding,
    hash_settings,
    pad_embeddings,
)
from models.diffusion.interfaces import TextContext
from models.diffusion.prompt_text import check_prompts
from models.hunyuan import text_worker
from models.hunyuan.text_files import HunyuanTextFiles
from models.hunyuan.text_process import INSTALL_HUNYUAN_EXTRA, run_worker

_LOG = logging.getLogger(__name__)

TextDevice = Literal["cuda", "cpu"]

# What LLaMA is told before the prompt, which takes the place of "{}".
# Source: HunyuanVideo `constants.py`, PROMPT_TEMPLATE_ENCODE_VIDEO. Its sentences
# follow each other without a space.
TEMPLATE = (
    "<|start_header_id|>system<|end_header_id|>\n\nDescribe the video by detailing "
    "the following aspects: "
    "1. The main content and theme of the video."
    "2. The color, shape, size, texture, quantity, text, and spatial relationships "
    "of the objects."
    "3. Actions, events, behaviors temporal relationships, physical movement changes "
    "of the objects."
    "4. background environment, light, style and atmosphere."
    "5. camera angles, movements, and transitions used in the video:<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
)
CROP = 95  # tokens before the prompt, which the transformer does not see
TEXT_LENGTH = 256  # tokens that it sees, the closing one included
SKIPPED_LAYERS = 2  # of LLaMA, at its end, and its final norm


@dataclasses.dataclass(frozen=True, kw_only=True)
class HunyuanTextEncoder:
    """Both encoders; a `TextEncoder` of `models.diffusion.interfaces`.

    Each `encode` or `embed` loads the weights anew (16 GB), so it should be given all
    prompts at once; `CachedTextEncoder` keeps what it makes.

    Args:
      files: The models and their tokenizers.
      device: Where they run. "cuda" computes in float16, as published; "cpu" in
        float32, or in bfloat16 where memory is short. None is "cuda" if they fit
        there, else "cpu".
      python: Interpreter with torch and transformers.

    Raises:
      ImportError: The extra `hunyuan` is not installed.
      ValueError: The device is none of these.
    """

    files: HunyuanTextFiles
    device: TextDevice | None = None
    python: str = sys.executable

    def __post_init__(self) -> None:
        if self.device not in ("cuda", "cpu", None):
            raise ValueError(f"{self.device=} must be 'cuda', 'cpu' or None")
        if self.python == sys.executable:
            check_text_packages()

    @classmethod
    def load(
        cls, folder: Path | str, *, device: TextDevice | None = None
    ) -> "HunyuanTextEncoder":
        """Finds the files of a model's folder; see `HunyuanTextFiles.find`.

        Raises:
          CheckpointError: A part is not there, or is another model.
          ImportError: The extra `hunyuan` is not installed.
        """
        return cls(files=HunyuanTextFiles.find(folder), device=device)

    def encode(self, prompts: Sequence[str]) -> TextContext:
        """Returns the context of the prompts, with CLIP's vectors as pooled ones.

        A prompt is stripped first. Warns of one that is too long, and cuts it as the
        original does: the closing token is lost.

        Args:
          prompts: At least one; equal ones are computed once. Each runs by itself.

        Raises:
          CheckpointError: A file is damaged, or the files do not fit each other.
          ChildProcessError: The process that encodes has failed.
          FloatingPointError: A result is not finite.
          ImportError: The process lacks a package.
          MemoryError: There is no memory for the encoders.
          TypeError: `prompts` is a string, not a sequence of them.
          ValueError: There is no prompt, or no such device.
        """
        made = self.embed(prompts)
        return pad_embeddings([made[prompt] for prompt in prompts], TEXT_LENGTH)

    def embed(self, prompts: Sequence[str]) -> dict[str, PromptEmbedding]:
        """Returns the vectors of each prompt, by prompt, in host memory.

        Takes and raises what `encode` does.
        """
        check_prompts(prompts)
        stripped = list(dict.fromkeys(prompt.strip() for prompt in prompts))
        request = {
            name: str(path.absolute()) for name, path in vars(self.files).items()
        }
        _LOG.info("encoding the text in a process of its own")
        answer, arrays = run_worker(
            request
            | {
                "prompts": stripped,
                "texts": [TEMPLATE.format(prompt) for prompt in stripped],
                "prefix": TEMPLATE.split("{}")[0],
                "crop": CROP,
                "kept": TEXT_LENGTH,
                "skipped_layers": SKIPPED_LAYERS,
                "device": self.device,
            },
            script=Path(text_worker.__file__),
            python=self.python,
        )
        _LOG.info("the text was encoded on %(device)s in %(dtype)s", answer)
        for prompt, count in zip(stripped, answer["num_tokens"], strict=True):
            _note_length(prompt, count)
        made = {}
        for index, prompt in enumerate(stripped):
            tokens, pooled = arrays[f"context.{index}"], arrays[f"pooled.{index}"]
            if not (np.isfinite(tokens).all() and np.isfinite(pooled).all()):
                raise FloatingPointError(
                    f"the context of {prompt!r} is not finite: check the text "
                    "encoders' weights, which may be damaged"
                )
            made[prompt] = PromptEmbedding(tokens, pooled)
        return {prompt: made[prompt.strip()] for prompt in prompts}

    def unknown_words(self, prompt: str) -> list[str]:
        """Returns no words: tokenizers of bytes write any word in pieces they know."""
        return []

    def describe_vocabulary(self) -> str:
        """Returns in words what prompts can be made of."""
        return f"any text of up to {TEXT_LENGTH - 1} tokens of LLaMA"

    def free(self) -> None:
        """Does nothing: the process that has encoded prompts has ended."""


def hunyuan_cache(folder: Path | str, files: HunyuanTextFiles) -> EmbeddingCache:
    """Returns the embeddings in a folder that these encoders have made.

    Their identity covers configurations, tokenizers and weights of both, the
    template, its crop, the layers that are skipped and the length. The device does
    not count. Prompts that are equal when stripped share a file.

    Args:
      folder: Folder of the files, made if it does not exist.
      files: The models and their tokenizers.

    Raises:
      CheckpointError: A file is missing or cannot be read.
    """
    settings = files.settings() | {
        "template": TEMPLATE,
        "crop": CROP,
        "text_length": TEXT_LENGTH,
        "skipped_layers": SKIPPED_LAYERS,
        "clip_length": text_worker.CLIP_TOKENS,
    }
    return EmbeddingCache(
        folder=folder, identity=hash_settings(settings), clean=str.strip
    )


def check_text_packages() -> None:
    """Raises before anything is read if a package of the extra is missing.

    Raises:
      ImportError: torch or transformers is not installed.
    """
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(
                f"HunyuanVideo's text encoders need the package {package}; install it "
                f"with {INSTALL_HUNYUAN_EXTRA}, or give embeddings"
            )


def _note_length(prompt: str, count: int) -> None:
    if count > TEXT_LENGTH:
        warnings.warn(
            f"the prompt {prompt[:60]!r} has {count} tokens with the closing one; only "
            f"the first {TEXT_LENGTH} are read, as in the original",
            stacklevel=3,
        )

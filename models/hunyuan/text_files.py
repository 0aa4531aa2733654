"""Files of HunyuanVideo's text encoders and tokenizers on this machine."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from models.checkpoints.memory_map import CheckpointError
from models.diffusion.embeddings import sample_weights

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
# Fields of a `config.json` that change no value.
_IDLE = (
    "_name_or_path",
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)
_CLIP_TOKENIZER = ("tokenizer.json", "vocab.json", "merges.txt")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HunyuanTextFiles:
    """Folders in the format of transformers; any of them may be the same.

    Args:
      text_encoder: LLaMA, the language part of LLaVA-LLaMA-3-8B saved alone.
      tokenizer: Its tokenizer.
      text_encoder_2: CLIP-L, its text part or the whole.
      tokenizer_2: Its tokenizer.

    Raises:
      CheckpointError: A folder lacks a file, or holds another model.
    """

    text_encoder: Path
    tokenizer: Path
    text_encoder_2: Path
    tokenizer_2: Path

    def __post_init__(self) -> None:
        for folder, models in (
            (self.text_encoder, ("llama",)),
            (self.text_encoder_2, ("clip", "clip_text_model")),
        ):
            found = _read_json(folder / "config.json").get("model_type")
            if found not in models:
                raise CheckpointError(
                    f"{folder / 'config.json'} has model_type={found!r}; expected "
                    f"{' or '.join(map(repr, models))}{_remedy(found)}"
                )
            _weight_files(folder)
        if not (self.tokenizer / "tokenizer.json").is_file():
            raise CheckpointError(f"{self.tokenizer} has no tokenizer.json")
        _tokenizer_files(self.tokenizer_2)

    @classmethod
    def find(cls, folder: Path | str) -> "HunyuanTextFiles":
        """Returns the files of a model's folder in diffusers' or the original layout.

        The original keeps each tokenizer in the folder of its encoder.

        Raises:
          CheckpointError: A part is not there, or is another model.
        """
        folder = Path(folder)
        encoders = [folder / name for name in ("text_encoder", "text_encoder_2")]
        for encoder in encoders:
            if not encoder.is_dir():
                raise CheckpointError(
                    f"{folder} has no folder {encoder.name}; expected the text "
                    "encoders in text_encoder and text_encoder_2"
                )
        tokenizers = [
            own if (own := folder / name).is_dir() else encoder
            for name, encoder in zip(
                ("tokenizer", "tokenizer_2"), encoders, strict=True
            )
        ]
        return cls(
            text_encoder=encoders[0],
            tokenizer=tokenizers[0],
            text_encoder_2=encoders[1],
            tokenizer_2=tokenizers[1],
        )

    def settings(self) -> dict[str, Any]:
        """Returns what embeddings depend on, for `hash_settings`.

        Raises:
          CheckpointError: A file is missing or cannot be read.
        """
        return {
            "llama": _model_settings(self.text_encoder),
            "llama_tokenizer": _digests([self.tokenizer / "tokenizer.json"]),
            "clip": _model_settings(self.text_encoder_2),
            "clip_tokenizer": _digests(_tokenizer_files(self.tokenizer_2)),
        }


def _model_settings(folder: Path) -> dict[str, Any]:
    config = _read_json(folder / "config.json")
    for idle in _IDLE:
        config.pop(idle, None)
    return {"config": config, "weights": sample_weights(_weight_files(folder))}


def _weight_files(folder: Path) -> list[Path]:
    """Returns the safetensors files that transformers reads from a folder."""
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    if not (folder / _INDEX).is_file():
        raise CheckpointError(
            f"{folder} has neither {_WEIGHTS} nor {_INDEX}; pickles are not read: load "
            "the folder with transformers once and save_pretrained it"
        )
    names = sorted(set(_read_json(folder / _INDEX).get("weight_map", {}).values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        raise CheckpointError(f"{folder} lacks the shards {missing} of {_INDEX}")
    return [folder / name for name in names]


def _tokenizer_files(folder: Path) -> list[Path]:
    files = [folder / name for name in _CLIP_TOKENIZER if (folder / name).is_file()]
    if not any(file.suffix == ".json" for file in files):
        raise CheckpointError(
            f"{folder} has no tokenizer of CLIP; expected tokenizer.json, or "
            "vocab.json and merges.txt"
        )
    return files


def _digests(files: list[Path]) -> list[str]:
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} is not an object of JSON")
    return found


def _remedy(model_type: object) -> str:
    if model_type != "llava":
        return ""
    return (
        ": the language part of LLaVA saved alone, as HunyuanVideo's "
        "preprocess_text_encoder_tokenizer_utils.py saves it"
    )

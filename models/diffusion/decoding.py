"""From latents to a video in [0, 1], and latents that are kept to be decoded later."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jaxtyping import Array, Float

from models.checkpoints.memory_map import CheckpointError
from models.checkpoints.safetensors_io import load_safetensors
from models.diffusion.interfaces import Codec
from models.files import write_whole

_KEY, _ENTRY = "latents", "draft_video"  # the tensor, and the entry of the metadata


def decode_video(
    codec: Codec, latents: Float[Array | np.ndarray, "B F H W C"]
) -> Float[np.ndarray, "B frames height width 3"]:
    """Returns the video of latents, with values in [0, 1].

    Raises:
      FloatingPointError: What the codec makes is not finite.
    """
    # A whole video at 720p takes a gigabyte: chunks leave the device one by one.
    decode = getattr(codec, "decode_to_host", codec.decode)
    video = np.asarray(decode(jnp.asarray(latents)), np.float32)
    check_codec_output("video that the codec decoded", video)
    return np.clip(0.5 * (video + 1.0), 0.0, 1.0)


def check_codec_output(what: str, array: Float[Array | np.ndarray, "..."]) -> None:
    """Raises FloatingPointError if a result is not finite; its source was."""
    # NaN is both the least and the most, so no mask as large as a video is needed.
    if not np.isfinite([float(array.min()), float(array.max())]).all():
        raise FloatingPointError(
            f"the {what} is not finite: check the codec's weights (a published model's "
            "VAE), which may be damaged"
        )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class KeptLatents:
    """Latents of one video that could not be decoded, and what belongs to them.

    Attributes:
      latents: Latents, as the codec takes them.
      video: Name of the file that they are to become.
      report: Report of the run: settings, and times of its steps.
      model: Paths and names by which the model was loaded: "checkpoint", "vae" and
        "revision"; None for what was not given.
    """

    latents: Float[np.ndarray, "1 F H W C"]
    video: str
    report: dict[str, Any]
    model: Mapping[str, str | None]

    def write(self, path: Path) -> None:
        """Writes a `.safetensors` file, whole or not at all."""
        entry = {"video": self.video, "report": self.report, "model": dict(self.model)}
        data = safetensors.numpy.save(
            {_KEY: np.ascontiguousarray(self.latents)},
            metadata={_ENTRY: json.dumps(entry, allow_nan=False)},
        )
        write_whole(path, data)

    @classmethod
    def read(cls, path: Path) -> "KeptLatents":
        """Reads such a file.

        Raises:
          CheckpointError: It is missing, damaged, or holds something else.
        """
        reader = load_safetensors(path)
        try:
            entry = json.loads(reader.metadata[_ENTRY])
            fields = {name: entry[name] for name in ("video", "report", "model")}
            latents = np.asarray(reader[_KEY], np.float32)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path} holds no latents of a video ({error!r}); expected a file that "
                "draft-video generate has left where a video could not be decoded"
            ) from error
        return cls(latents=latents, **fields)

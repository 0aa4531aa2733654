"""Ratios of magnitudes that MagCache goes by: published ones, and own files."""

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from models.files import write_whole
from pallas_kernels.common import make_plain, register_configuration

_PUBLISHED = Path(__file__).with_name("published_ratios.json")
_FORMAT = "draft-video magnitude ratios, 1"


class RatiosError(ValueError):
    """A file or list of ratios is damaged, or belongs to another model."""


@register_configuration
@dataclasses.dataclass(frozen=True, kw_only=True)
class MagRatios:
    """How much longer each step's residual is than that of the step before.

    A value is the mean over tokens of the ratio of lengths, in a run that computes all
    steps. The residual is the output of the last block without the input of the first.

    Attributes:
      values: For prompts, and where a list has them for negative prompts, one value for
        each step. The first step has none before it: 1.0.
      model: Model that they were measured on.
      source: Where they come from.
      attention: Attention that they were measured with, such as "dense".
      shift: Of the noise levels that they were measured on; None if not known.
      num_layers: Layers of that model; None of published lists, which are chosen by
        the model's sizes.

    Raises:
      ValueError: There are no values, branches differ in length, or one is not a
        positive, finite number.
    """

    values: tuple[tuple[float, ...], ...]
    model: str
    source: str
    attention: str = "dense"
    shift: float | None = None
    num_layers: int | None = None

    def __post_init__(self) -> None:
        make_plain(self)
        lengths = {len(branch) for branch in self.values}
        if len(self.values) not in (1, 2) or len(lengths) != 1 or not min(lengths):
            raise ValueError(
                f"values have {[len(branch) for branch in self.values]} steps; "
                "expected one or two branches of equally many, at least 1"
            )
        wrong = [
            value
            for branch in self.values
            for value in branch
            if not 0.0 < value < math.inf
        ]
        if wrong:
            raise ValueError(f"values has {wrong[0]!r}; expected positive numbers")

    @property
    def num_steps(self) -> int:
        """Steps of the run that they were measured in."""
        return len(self.values[0])

    def at(self, num_steps: int) -> Float[np.ndarray, "branches steps"]:
        """Returns values for a number of steps: those of the nearest measured ones.

        Of two that are equally near it is the one with an even index.

        Source: MagCache's `nearest_interp`.
        """
        values = np.asarray(self.values)
        last = self.num_steps - 1
        if num_steps == 1:
            return values[:, last:]
        nearest = np.round(np.arange(num_steps) * (last / (num_steps - 1)))
        return values[:, nearest.astype(int)]


@functools.cache
def published_ratios(name: str) -> MagRatios:
    """Returns a list that the authors of MagCache measured, with dense attention.

    Args:
      name: Such as "wan2.1-t2v-14b" or "hunyuanvideo-720p".

    Raises:
      ValueError: There is no such list; names those that there are.

    Source: Zehong-Ma/MagCache, Apache-2.0; the file beside this one says the commit.
    """
    data = json.loads(_PUBLISHED.read_text())
    if name not in data["lists"]:
        raise ValueError(f"{name=} must be one of {', '.join(data['lists'])}")
    entry = data["lists"][name]
    return MagRatios(
        values=tuple(map(tuple, entry["branches"])),
        model=entry["model"],
        source=f"{data['source']} {entry['file']}, commit {data['commit']}",
        attention=entry["attention"],
        shift=entry["shift"],
    )


def write_ratios(path: Path, ratios: MagRatios, details: dict[str, Any]) -> None:
    """Writes ratios as JSON.

    Args:
      path: File to write.
      ratios: What was measured.
      details: How; put beside the values, and not read again.
    """
    content = {"format": _FORMAT, "ratios": dataclasses.asdict(ratios)} | details
    write_whole(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def read_ratios(path: Path) -> MagRatios:
    """Reads ratios that `write_ratios` wrote.

    Raises:
      OSError: The file cannot be read.
      RatiosError: It is not such a file.
    """
    remedy = "`draft-video calibrate` writes such a file"
    try:
        content = json.loads(path.read_text())
        if content["format"] != _FORMAT:
            raise ValueError(f"format {content['format']!r}; expected {_FORMAT!r}")
        entry = content["ratios"]
        values = tuple(tuple(map(float, branch)) for branch in entry.pop("values"))
        return MagRatios(values=values, **entry)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RatiosError(f"{path} holds no ratios ({error}); {remedy}") from error

"""Adapters that were made for few steps, told by their names.

Such an adapter is distilled: with the steps and the guidance of the model itself it
makes poor videos slowly. Nothing in its tensors says so; people read it in its name.
"""

import dataclasses
import itertools
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from models.checkpoints.safetensors_io import load_safetensors

# Steps that those who made them name: the first is suggested, up to the second are
# in use. All are made for no guidance, which is 1.
# lightx2v: Wan2.1-T2V-14B-StepDistill-CfgDistill, 4 steps. FastWan2.1: 3 steps.
# FastHunyuan, whose adapter others call FastVideo: 6 steps.
# CausVid, AccVid and FusionX, which holds both: 4 to 10 steps.
_WORDS: Mapping[str, tuple[int, int]] = {
    "lightx2v": (4, 8),
    "lightning": (4, 8),
    "stepdistill": (4, 8),
    "cfgdistill": (4, 8),
    "selfforcing": (4, 8),
    "fastwan": (3, 6),
    "fasthunyuan": (6, 8),
    "fastvideo": (6, 8),
    "fusionx": (8, 10),
    "causvid": (6, 10),
    "accvid": (8, 10),
    "accvideo": (8, 10),
    "distill": (4, 8),
    "distilled": (4, 8),
    "turbo": (4, 8),
    "turbowan": (4, 8),
    "turbodiffusion": (4, 8),
    "lcm": (4, 8),
    "dmd": (4, 8),
    "dmd2": (4, 8),
    "rcm": (4, 8),
}
_MOST_STEPS = 16  # "2000steps" counts those of training
# "epoch-10-step500" counts those, too.
_STEP_COUNT = re.compile(
    r"(?<![a-z0-9.])(?<!epoch[-_ ])(\d{1,2})[-_ ]?steps?(?![a-z0-9])"
)
_WORD = re.compile(r"[a-z]+(?:\d+[a-z]+)*\d*")
# Names that say nothing; that of the folder counts then.
_COMMON_NAMES = ("pytorch_lora_weights", "adapter_model", "lora", "model")
_HEADER_NAMES = (
    "ss_output_name",
    "ss_training_comment",
    "modelspec.title",
    "modelspec.description",
    "modelspec.usage_hint",
    "name",
)
_MOST_CHARACTERS = 1_000  # of a text that is looked at


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewSteps:
    """What suits an adapter that was made for few steps.

    Attributes:
      num_steps: Steps to take.
      most_steps: More than these are of no use.
      guidance: Strength of classifier-free guidance; 1 turns it off.
      reason: The name that says so, and where it stands.
    """

    num_steps: int
    most_steps: int
    guidance: float = 1.0
    reason: str

    def suits(self, num_steps: int, guidance: float) -> bool:
        """Returns whether a run has such steps and guidance."""
        return num_steps <= self.most_steps and guidance == self.guidance


def find_few_steps(lora: str | os.PathLike) -> FewSteps | None:
    """Returns what suits an adapter; None if nothing says it is made for few steps.

    Nothing is changed by it: steps and guidance stay what a run is given.

    Args:
      lora: The adapter's `.safetensors` file. Its name and its header are read.

    Raises:
      CheckpointError: The file is missing or damaged.
    """
    for place, text in _names(Path(lora), load_safetensors(lora).metadata):
        text = text[:_MOST_CHARACTERS].lower()
        if (count := _STEP_COUNT.search(text)) and 0 < int(count[1]) <= _MOST_STEPS:
            steps = int(count[1])
            reason = f"{place} says {count[0]!r}"
            return FewSteps(num_steps=steps, most_steps=2 * steps, reason=reason)
        words = _WORD.findall(text)
        pairs = [first + second for first, second in itertools.pairwise(words)]
        for word in (*pairs, *words):
            known = word if word in _WORDS else word.rstrip("0123456789")
            if known in _WORDS:
                steps, most = _WORDS[known]
                reason = f"{place} says {word!r}"
                return FewSteps(num_steps=steps, most_steps=most, reason=reason)
    return None


def _names(path: Path, metadata: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Returns the texts that may name the adapter, and where they stand."""
    yield "its name", path.stem
    if path.stem.lower() in _COMMON_NAMES:
        yield "its folder", path.resolve().parent.name
    for name in _HEADER_NAMES:
        if name in metadata:
            yield f"{name} in its header", metadata[name]

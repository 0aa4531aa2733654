"""How strongly an adapter was trained to act: alpha / rank, said in many places.

In order of what trainers themselves go by:

- a tensor `alpha` of the module (kohya's tools, LyCORIS, OneTrainer, ai-toolkit);
- settings of PEFT: `adapter_config.json` beside the file, or in the file's header
  under `lora_adapter_metadata` (diffusers) or `lora_config` (finetrainers);
- plain keys of the header, and those of kohya's tools (`ss_network_alpha`), where a
  file has lost its tensors `alpha`.

The first two, and two settings, must agree. Kohya's tools read the tensors alone, which
may differ from the header's numbers from one layer to the next; so tensors win there.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from models.checkpoints.listing import shorten
from models.checkpoints.lora.patterns import ModulePattern, PatternError
from models.checkpoints.memory_map import CheckpointError

CONFIG_NAME = "adapter_config.json"
MOST_BYTES = 1 << 20  # of settings; those of a model with 60 layers have 20,000
MOST_PATTERNS = 2_048
MOST_ATOMS = 1_024  # of the patterns that are no names, for a match takes time for each
_HEADER_SETTINGS = ("lora_adapter_metadata", "lora_config", "adapter_config")
_ANOTHERS = "; if that file is another adapter's, give each a folder of its own"
# Ways to start a training that change the base model, so that the published one with
# the adapter is not what was trained.
_CHANGE_BASE = ("pissa", "olora", "corda", "loftq")
_PEFT_METHODS = ("LORA", "LOKR", "LOHA")
# Two statements agree if they differ by no more than an alpha rounded to bfloat16.
_TOLERANCE = 1 / 128

type _Patterns = tuple[tuple[ModulePattern, float], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """An adapter's numbers as one place outside of the tensors says them.

    Attributes:
      place: Name of the place, for messages.
      alpha: Alpha of every module; None if it is not said.
      rank: Rank of every module; None if it is not said.
      alphas: Exceptions by module.
      ranks: Exceptions by module.
      by_root: Whether alpha is divided by the root of the rank, not by the rank.
      with_magnitudes: Whether every module has a magnitude: DoRA.
      method: PEFT's word for the method; "LORA" if it is not said.
      is_kohyas: Whether it repeats what tensors say in files as they were trained.
      names_trainer: Whether the trainer is named, which always writes such tensors.
      of_kernels: Alpha and rank of convolutions, where they are others.
    """

    place: str
    alpha: float | None = None
    rank: int | None = None
    alphas: _Patterns = ()
    ranks: _Patterns = ()
    by_root: bool = False
    with_magnitudes: bool = False
    method: str = "LORA"
    is_kohyas: bool = False
    names_trainer: bool = False
    of_kernels: tuple[float | None, int | None] | None = None

    def numbers_of(
        self, module: str, has_kernel: bool
    ) -> tuple[float | None, int | None]:
        """Returns alpha and rank of a module; None for what is not said."""
        if has_kernel and self.of_kernels is not None:
            return self.of_kernels
        alpha = _first_match(self.alphas, module, self.alpha)
        rank = _first_match(self.ranks, module, self.rank)
        return alpha, None if rank is None else int(rank)

    def factor(self, alpha: float, rank: int) -> float:
        """Returns what the product of the matrices is multiplied with."""
        return alpha / (math.sqrt(rank) if self.by_root else rank)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Strength:
    """The factor of one module, and what is to be said of it.

    Attributes:
      factor: Factor of the module's matrices.
      is_known: Whether the adapter says it; else the factor is 1.
      note: A doubt to be told once; empty without.
    """

    factor: float
    is_known: bool = True
    note: str = ""


class DisagreementError(ValueError):
    """Two places say different strengths."""


@dataclasses.dataclass(frozen=True)
class Strengths:
    """Everything that an adapter says of its strength outside of its tensors."""

    settings: tuple[Settings, ...] = ()

    def of(
        self,
        module: str,
        rank: int | None,
        *,
        alpha: tuple[str, float] | None,
        has_kernel: bool,
        renamed: bool,
    ) -> Strength:
        """Returns the strength of one module.

        Args:
          module: The module's name as the adapter spells it.
          rank: Rank of its matrices; None if they are whole.
          alpha: Key and value of its tensor `alpha`; None if there is none.
          has_kernel: Whether it is a convolution.
          renamed: Whether its matrices have PEFT's names.

        Raises:
          DisagreementError: Two places differ, or ranks do.
        """
        said: list[tuple[str, float]] = []
        note = ""
        if alpha is not None and rank is None:
            return Strength(factor=self._of_whole(alpha[1], has_kernel))
        if alpha is not None and rank is not None:
            said.append(self._by_tensor(*alpha, rank, has_kernel))
        for settings in self.settings:
            if settings.is_kohyas and alpha is not None:
                continue
            told, own_rank = settings.numbers_of(module, has_kernel)
            if None not in (rank, own_rank) and rank != own_rank and told is not None:
                raise DisagreementError(
                    f"{settings.place} says the rank {own_rank} of {module}, whose "
                    f"matrices have {rank}"
                    + (_ANOTHERS if settings.place == CONFIG_NAME else "")
                )
            used = own_rank if rank is None and settings.method == "LOKR" else rank
            if told is None or used is None:
                continue
            factor = settings.factor(told, used)
            if settings.names_trainer and renamed:
                # musubi-tuner's convert_lora.py leaves the header as it was.
                note = (
                    f"{settings.place} says alpha {told:g} for rank {used}, but the "
                    "matrices were renamed since, by which tools multiply it in: it "
                    "is not applied again; if yours did not, multiply the strength "
                    f"by {factor:g}"
                )
                factor = 1.0
            said.append((f"alpha {told:g} of {settings.place}", factor))
        if not said:
            return Strength(factor=1.0, is_known=rank is None)
        place, factor = said[0]
        for other, second in said[1:]:
            if not math.isclose(factor, second, rel_tol=_TOLERANCE):
                raise DisagreementError(
                    f"{place} means a factor of {factor:g} for {module}, {other} one "
                    f"of {second:g}"
                )
        return Strength(factor=factor, note=note)

    def _of_whole(self, alpha: float, has_kernel: bool) -> float:
        """Returns the factor of LyCORIS' whole matrices: 1, and alpha has no meaning.

        Where it divides by the root of the rank, it stores alpha such that alpha / rank
        is the factor, though only the header has the rank.
        """
        for settings in self.settings:
            _, rank = settings.numbers_of("", has_kernel)
            if settings.is_kohyas and settings.by_root and rank is not None:
                return alpha / rank
        return 1.0

    def _by_tensor(
        self, key: str, alpha: float, rank: int, has_kernel: bool
    ) -> tuple[str, float]:
        """Returns the factor by a tensor `alpha`, and its place.

        LyCORIS stores alpha times the root of the rank where it divides by the root;
        its first versions that did so stored alpha itself, which the header has too.
        """
        for settings in self.settings:
            nominal, _ = settings.numbers_of("", has_kernel)
            if settings.is_kohyas and settings.by_root and alpha == nominal:
                return f"{key}={alpha:g}", settings.factor(alpha, rank)
        return f"{key}={alpha:g}", alpha / rank


def read_strengths(
    metadata: Mapping[str, str], folder: Path | None, origin: str
) -> Strengths:
    """Reads what stands in a file's header and beside the file.

    Args:
      metadata: Texts of the header.
      folder: Folder of the file; None if tensors come from elsewhere.
      origin: The adapter's name, for messages.

    Raises:
      CheckpointError: A place is damaged, too long, or of another method.
    """
    found: list[Settings] = []

    def read(place: str, text: Any, reader: Callable[[str, Any], Settings]) -> None:
        try:
            found.append(reader(place, text))
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"{origin} has damaged settings, {place}: {shorten(repr(error))}"
            ) from error

    if folder is not None and (folder / CONFIG_NAME).is_file():
        read(CONFIG_NAME, folder / CONFIG_NAME, _read_config_file)
    for name in _HEADER_SETTINGS:
        if name in metadata:
            read(name, metadata[name], _read_json_settings)
    read("its header", metadata, _read_plain_header)
    read("ss_network_alpha", metadata, _read_kohyas_header)
    return Strengths(tuple(found))


def _read_config_file(place: str, file: Path) -> Settings:
    if file.stat().st_size > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES} bytes")
    return _read_json_settings(place, file.read_text(encoding="utf-8"))


def _read_json_settings(place: str, text: str) -> Settings:
    """Reads PEFT's settings; diffusers puts the model's name before each."""
    if len(text) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES} characters")
    stored = {
        key.removeprefix("transformer."): value
        for key, value in json.loads(text).items()
    }
    method = str(stored.get("peft_type") or "LORA").upper()
    if method not in _PEFT_METHODS:
        raise ValueError(f"peft_type={method!r} is none of {_PEFT_METHODS}")
    start = str(stored.get("init_lora_weights")).lower()
    if start.startswith(_CHANGE_BASE):
        raise ValueError(
            f"init_lora_weights={start!r} changes the base model before training; let "
            "PEFT convert the adapter (path_initial_model_for_weight_conversion)"
        )
    return Settings(
        place=place,
        method=method,
        alpha=_number(stored, "lora_alpha", "alpha"),
        rank=_whole(_number(stored, "r", "rank")),
        alphas=_patterns(stored, "alpha_pattern"),
        ranks=_patterns(stored, "rank_pattern"),
        by_root=bool(stored.get("use_rslora")),
        with_magnitudes=bool(stored.get("use_dora")),
    )


def _read_plain_header(place: str, metadata: Mapping[str, str]) -> Settings:
    """Reads numbers that stand in the header by themselves, if they are numbers."""
    try:
        return Settings(
            place=place,
            alpha=_number(metadata, "lora_alpha", "network_alpha", "alpha"),
            rank=_whole(_number(metadata, "lora_rank", "network_dim", "rank", "r")),
        )
    except ValueError:  # such short names may mean anything
        return Settings(place=place)


def _read_kohyas_header(place: str, metadata: Mapping[str, str]) -> Settings:
    """Reads the header of kohya's tools, and of LyCORIS in them.

    Tools that change the ranks write "Dynamic", those that do not know them "None";
    0 stands for the rank.
    """

    def number(source: Mapping[str, Any], name: str) -> float | None:
        words = ("", "none", "dynamic", "0", "0.0")
        if str(source.get(name, "")).strip().lower() in words:
            return None
        return _number(source, name)

    given = _network_arguments(metadata.get("ss_network_args", ""))
    alpha, rank = number(metadata, place), number(metadata, "ss_network_dim")
    of_kernels = number(given, "conv_alpha"), _whole(number(given, "conv_dim"))
    return Settings(
        place=place,
        alpha=alpha,
        rank=_whole(rank),
        by_root=str(given.get("rs_lora", "")).lower() in ("true", "1"),
        is_kohyas=True,
        names_trainer="ss_network_module" in metadata,
        of_kernels=None if of_kernels == (None, None) else of_kernels,
    )


def _network_arguments(text: str) -> dict[str, Any]:
    """Reads `ss_network_args`, which mean nothing to most networks."""
    try:
        given = json.loads(text) if len(text) <= MOST_BYTES else None
    except (ValueError, RecursionError):
        given = None
    return given if isinstance(given, dict) else {}


def _number(source: Mapping[str, Any], *names: str) -> float | None:
    """Returns the first number that is said, which may be a text."""
    for name in names:
        value = source.get(name)
        if value is None:
            continue
        number = math.nan if isinstance(value, bool) else float(value)
        if not (math.isfinite(number) and number > 0):
            raise ValueError(f"{name}={value!r} must be a positive number")
        return number
    return None


def _whole(number: float | None) -> int | None:
    if number is not None and number != int(number):
        raise ValueError(f"the rank {number} must be a whole number")
    return None if number is None else int(number)


def _patterns(stored: Mapping[str, Any], name: str) -> _Patterns:
    """Reads numbers by pattern of the module's name."""
    given = stored.get(name) or {}
    if len(given) > MOST_PATTERNS:
        raise ValueError(f"{name} has {len(given)} entries of {MOST_PATTERNS} at most")
    found = []
    for text in given:
        try:
            pattern = ModulePattern(text)
        except PatternError as error:
            raise ValueError(
                f"{name} has the pattern {shorten(text)!r}, which is not run: {error}"
            ) from error
        number = _number(given, text)
        if number is None:
            raise ValueError(f"{name} has no number for {shorten(text)!r}")
        found.append((pattern, number))
    if sum(pattern.num_atoms for pattern, _ in found) > MOST_ATOMS:
        raise ValueError(f"{name} has patterns that would take long")
    return tuple(found)


def _first_match(
    patterns: _Patterns, module: str, default: int | float | None
) -> int | float | None:
    for pattern, number in patterns:
        if pattern.matches(module):
            return number
    return default

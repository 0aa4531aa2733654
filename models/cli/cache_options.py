"""The options of step caches, made without importing jax."""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Names and types of a rule's values, in the order they are given in.
RULES: dict[str, dict[str, Callable[[str], Any]]] = {
    "easy": {"threshold": float, "first_steps": int},
    "mag": {"threshold": float, "max_skips": int, "retention": float},
}


@dataclasses.dataclass(frozen=True)
class CacheRequest:
    """A rule's name, and those of its constants that were given."""

    rule: str
    constants: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        values = ",".join(f"{value:g}" for _, value in self.constants)
        return f"{self.rule}:{values}" if values else self.rule


def add_cache_options(parser: argparse.ArgumentParser) -> None:
    """Adds which steps are skipped."""
    group = parser.add_argument_group("step cache")
    group.add_argument(
        "--cache",
        type=_rule_or_none,
        default=argparse.SUPPRESS,
        metavar="RULE[:VALUES]",
        help="skip steps that would compute nearly the same as one before; none "
        "computes every step, which is the default without --speed. "
        "easy[:THRESHOLD[,FIRST_STEPS]] decides from the latents (0.05,10 if left "
        "out); mag[:THRESHOLD[,MAX_SKIPS[,RETENTION]]] from measured ratios of the "
        "model (0.12,2,0.2). With --compare the dense run computes every step",
    )
    group.add_argument(
        "--cache-ratios",
        type=Path,
        metavar="FILE",
        help="ratios for --cache mag, as draft-video calibrate writes them; by "
        "default the list that ships or was published for the model, if there is one",
    )


def parse_cache(text: str) -> CacheRequest:
    """Returns the rule and the constants of "mag:0.12,2"."""
    rule, _, values = text.partition(":")
    if rule not in RULES:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be one of {', '.join(RULES)}, perhaps with values behind a "
            "colon, such as easy:0.05 or mag:0.12,2; none computes every step"
        )
    names, given = RULES[rule], values.split(",") if ":" in text else []
    try:
        constants = tuple(
            (name, names[name](value))
            for name, value in zip(names, given, strict=False)
        )
    except ValueError:
        constants = ()
    if len(constants) != len(given):
        raise argparse.ArgumentTypeError(
            f"{text!r}: the values of {rule} are {', '.join(names)}, numbers with "
            "commas between; the last ones may be left out"
        )
    return CacheRequest(rule, constants)


def _rule_or_none(text: str) -> CacheRequest | None:
    return None if text == "none" else parse_cache(text)

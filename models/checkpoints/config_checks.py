"""Checks that the configurations of several models make."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

FLOAT_NAMES = ("float32", "bfloat16", "float16")
LINEARS = ("bfloat16", "float8")


def is_positive_integer(value: Any) -> bool:
    """Returns whether a value is an integer of at least 1; booleans are not."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def check_positive_integers(config: Any, names: Iterable[str]) -> None:
    """Raises ValueError if a field of a configuration is no positive integer."""
    for name in names:
        value = getattr(config, name)
        if not is_positive_integer(value):
            raise ValueError(f"{name}={value!r} must be a positive integer")


def check_sizes(config: Any, name: str, length: int) -> None:
    """Raises ValueError if a field is no tuple of so many positive integers."""
    value = getattr(config, name)
    if (
        not isinstance(value, tuple)
        or len(value) != length
        or not all(map(is_positive_integer, value))
    ):
        raise ValueError(
            f"{name}={value!r} must be a tuple of {length} positive integers"
        )


def check_keys(
    published: Iterable[str],
    *,
    known: Collection[str],
    required: Iterable[str],
    what: str = "configuration",
) -> None:
    """Checks the keys of a `config.json`; those that start with "_" are ignored.

    Args:
      published: Keys of the parsed file.
      known: Keys that have a meaning.
      required: Keys that must be there.
      what: Name of the file for messages.

    Raises:
      ValueError: Names all keys that are unknown or missing.
    """
    given = {key for key in published if not key.startswith("_")}
    unknown = sorted(given.difference(known))
    missing = [key for key in required if key not in given]
    if unknown or missing:
        raise ValueError(f"{what} has {unknown=} and {missing=} keys")


def check_dtypes(
    config: Any, accepted: Collection[str] = FLOAT_NAMES, reason: str = ""
) -> None:
    """Raises ValueError if `dtype` or `param_dtype` is not among those accepted.

    Args:
      config: A configuration that has both fields.
      accepted: Names of the accepted dtypes.
      reason: The reason that others are refused, for the message.
    """
    for name in ("dtype", "param_dtype"):
        value = getattr(config, name)
        if value not in accepted:
            because = f"; {reason}" if reason else ""
            raise ValueError(f"{name}={value!r} must be one of {accepted}{because}")


def check_linears(config: Any) -> None:
    """Raises ValueError if `linears` names no precision, or `dtype` does not suit."""
    if config.linears not in LINEARS:
        raise ValueError(f"linears={config.linears!r} must be one of {LINEARS}")
    if config.linears == "float8" and config.dtype == "float16":
        raise ValueError(
            "linears='float8' needs dtype 'bfloat16' or 'float32', not "
            f"{config.dtype!r}: products before they are scaled pass its largest number"
        )


def check_published(
    published: Mapping[str, Any],
    *,
    fixed: Mapping[str, Any],
    required: Iterable[str],
) -> None:
    """Checks a `config.json` of transformers.

    Args:
      published: The parsed file.
      fixed: Keys that change the result, and the only value that is computed here;
        a key that is left out has it.
      required: Keys that must be there and not null.

    Raises:
      ValueError: Names all keys at fault.
    """
    other = {
        key: published[key]
        for key, value in fixed.items()
        if published.get(key, value) != value
    }
    if other:
        expected = {key: fixed[key] for key in other}
        raise ValueError(f"configuration has {other}; this port needs {expected}")
    missing = [key for key in required if published.get(key) is None]
    if missing:
        raise ValueError(f"configuration lacks the keys {missing}")

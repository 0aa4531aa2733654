"""Lists in error messages, short whatever a file holds."""

from collections.abc import Iterable, Sequence

MOST_LINES = 80
MOST_CHARACTERS = 300  # of a line
_MOST_NAMES = 8


def list_problems(problems: Sequence[str]) -> str:
    """Returns problems in lines of their own, sorted; the last counts those left out.

    A checkpoint of a wrong kind has a problem in each of its thousand keys, and keys
    of a damaged one may have any length.
    """
    lines = [shorten(problem) for problem in sorted(problems)[:MOST_LINES]]
    if more := len(problems) - len(lines):
        lines.append(f"and {more} more")
    return "".join(f"\n  {line}" for line in lines)


def list_names(names: Iterable[str]) -> str:
    """Returns the first names with commas between, and how many are left out."""
    names = list(names)
    shown = ", ".join(shorten(name) for name in names[:_MOST_NAMES])
    more = len(names) - _MOST_NAMES
    return f"{shown} and {more} more" if more > 0 else shown


def shorten(text: str) -> str:
    """Returns a text without its middle if it is longer than a line may be."""
    if len(text) <= MOST_CHARACTERS:
        return text
    half = MOST_CHARACTERS // 2
    return f"{text[:half]} [...] {text[-half:]}"

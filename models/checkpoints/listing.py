"""Lists in error messages, short whatever a file holds."""

from collections.abc import Iterable, Sequence

MOST_LINES = 80
MOST_CHARACTERS = 300  # of a line
MOST_IN_ALL = 1_300  # characters of a list of problems
_MOST_NAMES = 8
_MOST_OF_A_KIND = 3
_BREAK = "\n  "


def list_problems(problems: Sequence[str]) -> str:
    """Returns problems in lines of their own, sorted; the last counts those left out.

    A checkpoint of a wrong kind has a problem in each of its thousand keys, and keys
    of a damaged one may have any length. A list that would be long holds the first of
    each kind, which is what stands before a colon, and how many more there are.
    """
    lines = [shorten(problem) for problem in sorted(problems)]
    more = max(0, len(lines) - MOST_LINES)
    if _length(lines[:MOST_LINES]) > MOST_IN_ALL:
        return _first_of_each_kind(lines)
    lines[MOST_LINES:] = [f"and {more} more"] if more else []
    return "".join(_BREAK + line for line in lines)


def _first_of_each_kind(lines: Sequence[str]) -> str:
    """Returns a few lines of each kind, as far as they fit, and the kinds' counts."""
    waiting: dict[str, list[str]] = {}
    for line in lines:
        waiting.setdefault(line.partition(": ")[0], []).append(line)
    shown: dict[str, list[str]] = {kind: [] for kind in waiting}
    room = MOST_IN_ALL - _length(f"{kind}: and {len(lines)} more" for kind in waiting)
    for turn in range(_MOST_OF_A_KIND):
        for kind, own in waiting.items():
            if turn < len(own) and (room := room - _length([own[turn]])) >= 0:
                shown[kind].append(own[turn])
        if room < 0:
            break
    listed = []
    for kind, own in waiting.items():
        listed += shown[kind]
        if more := len(own) - len(shown[kind]):
            listed.append(f"{kind}: {f'and {more} more' if shown[kind] else more}")
    return "".join(_BREAK + line for line in listed)[: MOST_IN_ALL + MOST_CHARACTERS]


def _length(lines: Iterable[str]) -> int:
    return sum(len(_BREAK) + len(line) for line in lines)


def list_names(names: Iterable[str]) -> str:
    """Returns the first names with commas between, and how many are left out."""
    names = list(names)
    shown = ", ".join(shorten(name) for name in names[:_MOST_NAMES])
    more = len(names) - _MOST_NAMES
    return f"{shown} and {more} more" if more > 0 else shown


def shorten(text: str, most: int = MOST_CHARACTERS) -> str:
    """Returns a text without its middle if it is longer than it may be."""
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]} [...] {text[-half:]}"

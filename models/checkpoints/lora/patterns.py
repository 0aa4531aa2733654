"""Patterns of module names in adapters' settings, matched without `re`'s worst cases.

PEFT takes the keys of `rank_pattern` and `alpha_pattern` for regular expressions. Those
of a file are another person's: one such as "(a+)+$" would run for years. The parts of
regular expressions that name modules are read here, and matched in time that grows
with the length of the pattern times that of the name. Others are refused.
"""

import itertools
import re
from collections.abc import Iterator
from typing import NamedTuple

MOST_CHARACTERS = 512  # of a pattern
MOST_ALTERNATIVES = 64  # of a pattern, all combinations of its groups
# Most patterns are names, their dots escaped or not; for these no atoms are read.
_NAME = re.compile(r"(?:[A-Za-z0-9_.-]|\\\.)*")
_ANYTHING = "\0"  # for a dot that is not escaped; no module's name holds it
_QUANTIFIERS = {"*": (0, True), "+": (1, True), "?": (0, False)}
_DIGITS = frozenset("0123456789")
_WORD = _DIGITS | frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_")
_SPECIAL = frozenset("{}[]()|*+?^$\\")


class PatternError(ValueError):
    """A pattern is none of those that are read."""


class _Atom(NamedTuple):
    """One character, repeated or not."""

    characters: frozenset[str]
    excluded: bool  # whether `characters` are those that do not match
    least: int = 1  # 0 or 1
    many: bool = False

    def accepts(self, character: str) -> bool:
        return (character in self.characters) != self.excluded


_ANY = _Atom(frozenset("\n"), excluded=True)
type _Sequence = tuple[_Atom, ...]


class ModulePattern:
    r"""A pattern of module names, as PEFT reads the keys of `rank_pattern`.

    It matches a whole name, or what follows one of the name's dots. It may hold
    characters, `.`, `\.`, `\d`, `\w`, sets such as `[0-9]`, groups such as `(q|k)`
    without quantifiers and not within others, `*`, `+` and `?` after a character, and
    `^` and `$` at the ends.

    Args:
      text: The pattern.

    Attributes:
      num_atoms: Measure of the time that a match takes; 0 for a name.

    Raises:
      PatternError: It holds something else, or is too long.
    """

    def __init__(self, text: str) -> None:
        if len(text) > MOST_CHARACTERS:
            raise PatternError(f"it has more than {MOST_CHARACTERS} characters")
        self._whole = text.startswith("^")
        body = text.removeprefix("^")
        if body.endswith("$") and not body.endswith("\\$"):
            body = body[:-1]
        self._name: str | None = None
        self._sequences: tuple[_Sequence, ...] = ()
        if _NAME.fullmatch(body):
            self._name = ".".join(
                part.replace(".", _ANYTHING) for part in body.split("\\.")
            )
        else:
            self._sequences = tuple(_read(body))
        self.num_atoms = sum(map(len, self._sequences))

    def matches(self, name: str) -> bool:
        """Returns whether the pattern means the module of this name."""
        if self._name is not None:
            return self._is_end_of(name, self._name)
        starts = {0}
        if not self._whole:
            starts |= {i + 1 for i, character in enumerate(name) if character == "."}
        return any(_matches(sequence, name, starts) for sequence in self._sequences)

    def _is_end_of(self, name: str, own: str) -> bool:
        before = len(name) - len(own)
        if before < 0 or (before > 0 and (self._whole or name[before - 1] != ".")):
            return False
        return all(a in (b, _ANYTHING) for a, b in zip(own, name[before:], strict=True))


def _matches(sequence: _Sequence, name: str, starts: set[int]) -> bool:
    """Steps through the atoms with every place in `name` that is reached so far."""
    reached = starts
    for atom in sequence:
        after = set(reached) if atom.least == 0 else set()
        for place in sorted(reached):
            while place < len(name) and atom.accepts(name[place]):
                place += 1
                if place in after:
                    break  # whatever follows has been reached from there
                after.add(place)
                if not atom.many:
                    break
        reached = after
        if not reached:
            return False
    return len(name) in reached


def _read(text: str) -> Iterator[_Sequence]:
    """Reads a pattern; groups are written out as one sequence for each choice."""
    for branch in _split(text):
        choices, place = [], 0
        while place < len(branch):
            if branch[place] != "(":
                end = branch.find("(", place)
                end = len(branch) if end < 0 else end
                choices.append([_atoms(branch[place:end])])
            else:
                end = branch.find(")", place) + 1
                inner = branch[place + 1 : end - 1].removeprefix("?:")
                if not end or "(" in inner or branch[end : end + 1] in (*"*+?{",):
                    raise PatternError("a group is nested, repeated or not closed")
                choices.append([_atoms(choice) for choice in inner.split("|")])
            place = end
        count = 0
        for count, parts in enumerate(itertools.product(*choices), start=1):
            if count > MOST_ALTERNATIVES:
                raise PatternError(f"it has more than {MOST_ALTERNATIVES} alternatives")
            yield tuple(itertools.chain(*parts))


def _split(text: str) -> list[str]:
    """Splits a pattern at the bars that stand in no group."""
    branches, depth = [""], 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if character == "|" and depth == 0:
            branches.append("")
        else:
            branches[-1] += character
    if len(branches) > MOST_ALTERNATIVES:
        raise PatternError(f"it has more than {MOST_ALTERNATIVES} alternatives")
    return branches


def _atoms(text: str) -> _Sequence:
    """Reads a part of a pattern that has no groups."""
    atoms: list[_Atom] = []
    place = 0
    while place < len(text):
        character = text[place]
        if character == "\\":
            atom, place = _escaped(text[place + 1 : place + 2]), place + 2
        elif character == "[":
            end = text.find("]", place)
            atom, place = _set(text[place + 1 : end] if end > 0 else ""), end + 1
        elif character == ".":
            atom, place = _ANY, place + 1
        elif character in _SPECIAL:
            raise PatternError(f"{character!r} has no meaning there")
        else:
            atom, place = _Atom(frozenset(character), excluded=False), place + 1
        if (quantifier := text[place : place + 1]) in _QUANTIFIERS and quantifier:
            least, many = _QUANTIFIERS[quantifier]
            atom, place = atom._replace(least=least, many=many), place + 1
            place += text[place : place + 1] == "?"  # a lazy one matches the same
            if text[place : place + 1] in (*"*+?",):
                raise PatternError("quantifiers follow each other")
        atoms.append(atom)
    return tuple(atoms)


def _escaped(character: str) -> _Atom:
    if character == "d":
        return _Atom(_DIGITS, excluded=False)
    if character == "w":
        return _Atom(_WORD, excluded=False)
    if not character or character.isalnum():
        raise PatternError(f"'\\{character}' is not read")
    return _Atom(frozenset(character), excluded=False)


def _set(text: str) -> _Atom:
    """Reads the inside of a set, such as "0-9" or "^.": ranges have an order."""
    inside = text.removeprefix("^").replace("\\.", ".").replace("\\d", "0-9")
    if not inside or "\\" in inside or "[" in inside:
        raise PatternError(f"the set [{text}] is not read")
    characters: set[str] = set()
    place = 0
    while place < len(inside):
        first, last = inside[place], inside[place]
        if inside[place + 1 : place + 2] == "-" and place + 2 < len(inside):
            last = inside[place + 2]
            place += 2
        if not (first.isascii() and last.isascii() and first <= last):
            raise PatternError(f"the set [{text}] is not read")
        characters |= set(map(chr, range(ord(first), ord(last) + 1)))
        place += 1
    return _Atom(frozenset(characters), excluded=text.startswith("^"))

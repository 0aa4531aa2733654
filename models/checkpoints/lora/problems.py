"""Reasons why a part of an adapter cannot be merged."""

from typing import NamedTuple


class Problem(NamedTuple):
    """One reason.

    Attributes:
      kind: Kind of problem, in two words at most.
      text: Key and reason, to be read after the kind.
      may_skip: Whether the part has no meaning for the model, so that the rest is
        whole without it.
    """

    kind: str
    text: str
    may_skip: bool = False

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"

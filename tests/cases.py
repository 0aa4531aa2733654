"""Parameters of tests, most of which only the nightly suite runs."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def mostly_nightly(cases: Iterable[Any], quick: Collection[Any]) -> list[Any]:
    """Marks all cases nightly but those that the quick suite runs, too.

    Args:
      cases: Values of one parameter.
      quick: Those of them that stand for the others.

    Returns:
      What `pytest.mark.parametrize` takes.

    Raises:
      ValueError: A quick case is none of the cases.
    """
    cases = list(cases)
    if missing := [case for case in quick if case not in cases]:
        raise ValueError(f"quick={missing} must be among {cases}")
    return [
        case if case in quick else pytest.param(case, marks=pytest.mark.nightly)
        for case in cases
    ]

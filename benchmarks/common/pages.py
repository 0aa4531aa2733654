"""What records say on a page of the site, between marks that a test holds to them."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

BEGIN, END = "<!-- measured: begin -->\n", "<!-- measured: end -->\n"


def written(page: str, section: str) -> str:
    """Returns a page with a section between its marks."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + section + END + rest.split(END)[1]


def commits_of(environments: Iterable[Mapping[str, Any]]) -> str:
    """Returns the commits that records were measured at."""
    *others, last = dict.fromkeys(each["commit"] for each in environments)
    return f"{', '.join(others)} and {last}" if others else last


def where_measured(environments: Iterable[Mapping[str, Any]]) -> str:
    """Returns date, commits, jax and driver of records of one machine."""
    environments = list(environments)
    first = environments[0]
    return (
        f"{first['date'][:10]}, commit {commits_of(environments)}, jax "
        f"{first['versions']['jax']}, driver {driver_of(first['gpus'])}"
    )


def driver_of(gpus: Sequence[str]) -> str:
    """Returns the driver, from what nvidia-smi says of a machine's GPUs."""
    return gpus[0].split(", ")[-1]


def paragraph(text: str) -> str:
    """Returns lines as long as those of a page; nothing for nothing."""
    if not text:
        return ""
    return textwrap.fill(text, 92, break_on_hyphens=False) + "\n"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Returns a table."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)

"""Reads from a compiled program what devices send each other, and what runs meanwhile.

A record stands for all operations of one kind and size at one place in the order of
work:

  kind         such as "all-to-all"
  bytes        of its result on each device
  times        how often a call of the program runs them, loops counted
  meanwhile    work between start and end: a product of matrices, a kernel or another
               fused operation, and how many; missing where the device waits
"""

import collections
import math
import re
from typing import Any, NamedTuple

Record = dict[str, Any]

KINDS = r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
# "%name = f32[2]{0} operation(%operands), attributes", or a tuple of results.
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"([a-z]+)(\d*)\w*\[([\d,]*)\]")
_COLLECTIVE = re.compile(rf"^(?:ragged-)?({KINDS})(-start)?$")
_CALLED = re.compile(r"\b(body|to_apply|calls)=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_TARGET = re.compile(r'custom_call_target="([^"]+)"')
_PRODUCT = re.compile(r"gemm|dot|cublas|convolution", re.I)
# Small sums may be kernels of XLA's own, which are fusions.
_CALLS = ("call", "while", "conditional", "async-start", "fusion")


class _Line(NamedTuple):
    """An instruction."""

    name: str
    result: str
    operation: str
    rest: str


def traffic(text: str) -> list[Record]:
    """Returns what a program sends.

    Args:
      text: Of the compiled program, whose instructions stand in the order of work.
    """
    computations, entry = _computations(text)
    times = _times(computations, entry)
    found: dict[tuple, Record] = {}
    for name, lines in computations.items():
        for place, line in enumerate(lines):
            kind = _COLLECTIVE.match(line.operation)
            if kind is None or name not in times:
                continue
            record = {"kind": kind[1], "bytes": _result_bytes(line, bool(kind[2]))}
            if kind[2] and (meanwhile := _meanwhile(lines, place)):
                record["meanwhile"] = meanwhile
            key = (name, *map(str, record.values()))
            found.setdefault(key, record | {"times": 0})["times"] += times[name]
    return list(found.values())


def totals(records: list[Record]) -> Record:
    """Returns operations and bytes of each kind in a call of the program.

    "overlapped" is the share of the bytes during whose transfer there is a product of
    matrices or a kernel.
    """
    found: Record = {}
    for record in records:
        total = found.setdefault(
            record["kind"], {"times": 0, "bytes": 0, "overlapped": 0.0}
        )
        num_bytes = record["times"] * record["bytes"]
        total["times"] += record["times"]
        total["bytes"] += num_bytes
        if {"product", "kernel"} & set(record.get("meanwhile", ())):
            total["overlapped"] += num_bytes
    for total in found.values():
        total["overlapped"] = total["overlapped"] / max(total["bytes"], 1)
    return found


def _computations(text: str) -> tuple[dict[str, list[_Line]], str]:
    """Returns instructions by computation, and the name of the first to run."""
    found: dict[str, list[_Line]] = {}
    current: list[_Line] = []
    entry = ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            current = found[match[2]] = []
            entry = match[2] if match[1] else entry
        elif match := _LINE.match(line):
            current.append(_Line(*match.groups()))
    return found, entry


def _times(computations: dict[str, list[_Line]], entry: str) -> dict[str, int]:
    """Returns how often each computation runs."""
    times: collections.Counter[str] = collections.Counter()
    pending = [(entry, 1)]
    while pending:
        name, count = pending.pop()
        times[name] += count
        for line in computations.get(name, ()):
            if line.operation not in _CALLS:
                continue
            trips = _TRIPS.search(line.rest)
            inner = count * (int(trips[1]) if trips else 1)
            pending += [(called, inner) for _, called in _CALLED.findall(line.rest)]
    return dict(times)


def _meanwhile(lines: list[_Line], place: int) -> Record:
    """Counts the work between the start of an operation and its end."""
    start = re.compile(rf"%?{re.escape(lines[place].name)}\b(?![.\-])")
    kinds: collections.Counter[str] = collections.Counter()
    for line in lines[place + 1 :]:
        if line.operation.endswith("-done") and start.match(line.rest):
            break
        if line.operation == "custom-call":
            target = _TARGET.search(line.rest)
            product = target is not None and _PRODUCT.search(target[1])
            kinds["product" if product else "kernel"] += 1
        elif line.operation in ("dot", "convolution"):
            kinds["product"] += 1
        elif line.operation == "fusion":
            kinds["product" if _PRODUCT.search(line.name) else "fusion"] += 1
    return dict(kinds)


def _result_bytes(line: _Line, starts: bool) -> int:
    """Returns the bytes of a result; a start has operands before results."""
    arrays = _ARRAY.findall(line.result)
    if starts and line.result.startswith("("):
        if line.operation.startswith("collective-permute"):
            arrays = arrays[1:2]
        else:
            arrays = arrays[len(arrays) // 2 :]
    return sum(
        math.prod(int(size) for size in sizes.split(",") if size)
        * (int(bits) if bits else 8)
        // 8
        for _, bits, sizes in arrays
    )

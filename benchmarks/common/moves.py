"""What a compiled program moves: gathers, copies and the like of large arrays."""

import math
import re

MOVES = (
    "gather",
    "scatter",
    "transpose",
    "copy",
    "copy-start",
    "concatenate",
    "pad",
    "reverse",
    "slice",
    "sort",
    "dynamic-slice",
    "dynamic-update-slice",
)
ARRAY = re.compile(r"\w+\[([\d,]+)\]")
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%([\w.-]+) = (.+?) ([\w-]+)\((.*)$", re.M)


def token_sized_moves(text: str, num_elements: int) -> list[str]:
    """Instructions of a compiled program that rearrange arrays as large as Q.

    Instructions with several results (a sort with values, `copy-start`) count by the
    largest; `dynamic-update-slice` by what it writes, not by the array that it writes
    into, which XLA updates in place or copies by a `copy` of its own.
    """
    instructions = INSTRUCTION.findall(text)
    types = {name: type_ for name, type_, _, _ in instructions}
    found = []
    for _, type_, name, operands in instructions:
        if name not in MOVES:
            continue
        if name == "dynamic-update-slice":
            _, update, *_ = re.findall(r"%([\w.-]+)", operands)
            type_ = types[update]
        shape = max(ARRAY.findall(type_), key=_size, default="")
        if shape and _size(shape) >= num_elements:
            found.append(f"{name} [{shape}]")
    return found


def _size(shape: str) -> int:
    return math.prod(int(n) for n in shape.split(","))

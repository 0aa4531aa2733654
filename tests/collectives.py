"""What a compiled program sends from device to device."""

import dataclasses
import math
import re

# "%name = f32[2,3]{1,0} all-gather(...", or a tuple of such results.
_LINE = re.compile(
    r"= (\(?[a-z]\w*\[.*?) ((?:ragged-)?all-\w+(?:-\w+)?|collective-\w+|reduce-scatter)"
    r"(-start)?\("
)
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_WIDTH = re.compile(r"(\d+)")


@dataclasses.dataclass(frozen=True, order=True)
class Collective:
    """One operation of a program that every device takes part in.

    Attributes:
      kind: Its name, such as "all-to-all".
      num_bytes: Bytes of its result on each device.
      in_loop: Whether it is within a loop, such as that over layers.
    """

    kind: str
    num_bytes: int
    in_loop: bool


def collectives(text: str) -> list[Collective]:
    """Lists the collectives in the text of a compiled program, sorted."""
    found = []
    for line in text.splitlines():
        match = _LINE.search(line)
        if match is None or match[2].endswith("-done"):
            continue
        arrays = _ARRAY.findall(match[1])
        if match[3] and match[1].startswith("("):
            arrays = arrays[len(arrays) // 2 :]  # operands stand before results
        num_bytes = sum(map(_bytes, arrays))
        found.append(Collective(match[2], num_bytes, "/while/" in line))
    return sorted(found)


def _bytes(array: tuple[str, str]) -> int:
    kind, sizes = array
    width = _WIDTH.search(kind)
    bits = int(width[1]) if width else 8
    return math.prod(int(s) for s in sizes.split(",") if s) * bits // 8

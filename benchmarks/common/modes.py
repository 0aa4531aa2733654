"""Ways to run self-attention in a denoising step, by name.

"dense", or a sparsity such as "0.9". After a sparsity, "+layer0" or "+layers0,1" keeps
these layers dense, and "+reuse" uses the masks of the step before again.
"""

import argparse
import dataclasses
import re

NAME = re.compile(r"(dense|0\.\d+)(?:\+layers?(\d+(?:,\d+)*))?(\+reuse)?")


@dataclasses.dataclass(frozen=True)
class Mode:
    """One way; the module says what each name means."""

    name: str
    sparsity: float | None  # None is dense
    dense_layers: tuple[int, ...] = ()
    reuse: bool = False

    @property
    def program(self) -> tuple[bool, tuple[int, ...], bool]:
        """Properties that decide on a program: modes alike in them share one."""
        return self.sparsity is None, self.dense_layers, self.reuse

    @classmethod
    def parse(cls, name: str) -> "Mode":
        """Reads a name.

        Raises:
          argparse.ArgumentTypeError: There is no such mode.
        """
        match = NAME.fullmatch(name)
        if match is None or (match[1] == "dense" and name != "dense"):
            raise argparse.ArgumentTypeError(
                f"mode {name!r} must be 'dense', or a sparsity such as '0.9' with "
                "'+layer0' (or '+layers0,1') or '+reuse' or both after it"
            )
        sparsity = None if match[1] == "dense" else float(match[1])
        layers = tuple(map(int, match[2].split(","))) if match[2] else ()
        return cls(name, sparsity, layers, match[3] is not None)

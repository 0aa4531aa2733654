"""Tables that say which key of a published checkpoint is which parameter of ours.

A row of a table names a module in the two published layouts and here. Its kind says
which parameters it has and how they are stored. A layout's rules follow from the rows,
one for each parameter. They serve both directions.
"""

import dataclasses
import functools
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import einops

_NUMBER = "{}"


@dataclasses.dataclass(frozen=True)
class Layout:
    """The order of an array's axes in a checkpoint, and here.

    Attributes:
      stored: Axes in the checkpoint in einops' words, such as "outputs inputs".
      ours: The same axes here. An axis of size 1, which is written as 1, may be absent.
    """

    stored: str
    ours: str

    def load(self, array: Any) -> Any:
        """Moves the axes of a stored array, of NumPy or traced by JAX, to ours."""
        return einops.rearrange(array, f"{self.stored} -> {self.ours}")

    def save(self, array: Any) -> Any:
        """Moves the axes of our array to the stored ones; undoes `load`."""
        return einops.rearrange(array, f"{self.ours} -> {self.stored}")


keep = Layout("...", "...")
transpose = Layout(
    "outputs inputs", "inputs outputs"
)  # PyTorch's linear layers store [out, in]
conv_2d = Layout("outputs inputs h w", "h w inputs outputs")
conv_3d = Layout("outputs inputs f h w", "f h w inputs outputs")
# Tables that are stored with a leading axis of size 1 for the batch.
drop_batch_axis = Layout("1 ...", "...")


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of a table: checkpoint key, our path, change of layout.

    Args:
      key: A key of the checkpoint, each `{}` in it a number: `blocks.{}.q.weight`.
      path: Our parameter's path, dots between attributes, with as many numbers, in
        the same order. A number in it is a layer: `blocks.3.to_q.kernel` is slice 3
        of the stacked parameter `blocks.to_q.kernel`.
      layout: Change of layout.

    Raises:
      ValueError: Key and path differ in how many numbers they have, or hold other
        braces.
    """

    key: str
    path: str
    layout: Layout = keep

    def __post_init__(self) -> None:
        literals = (self.key + self.path).replace(_NUMBER, "")
        if self.key.count(_NUMBER) != self.path.count(_NUMBER) or (
            set("{}") & set(literals)
        ):
            raise ValueError(
                f"{self.key=} with {self.path=} cannot be turned round: use as many "
                "{} in both, and no other braces"
            )

    def path_of(self, key: str) -> str | None:
        """Returns our path for a checkpoint key; None if the rule does not match."""
        return _translate(key, self.key, self.path)

    def key_of(self, path: str) -> str | None:
        """Returns the checkpoint key for one of our paths; None without a match."""
        return _translate(path, self.path, self.key)


def _translate(name: str, template: str, other: str) -> str | None:
    """Fills the numbers of a name into another template."""
    match = _compile(template).fullmatch(name)
    return None if match is None else other.format(*match.groups())


@functools.cache
def _compile(template: str) -> re.Pattern[str]:
    return re.compile(r"(\d+)".join(map(re.escape, template.split(_NUMBER))))


class Parameter(NamedTuple):
    """A parameter of a kind of module; a table that is no module has no names.

    Attributes:
      stored: Its name in a checkpoint.
      ours: Its name here.
      layout: Change of layout.
    """

    stored: str
    ours: str
    layout: Layout = keep


Kind = tuple[Parameter, ...]


def weight_and_bias(layout: Layout) -> Kind:
    """Returns the parameters of a linear layer or convolution."""
    return Parameter("weight", "kernel", layout), Parameter("bias", "bias")


LINEAR = weight_and_bias(transpose)
MATRIX = LINEAR[:1]  # a linear layer without bias
CONV_2D = weight_and_bias(conv_2d)
CONV_3D = weight_and_bias(conv_3d)
EMBEDDING = (Parameter("weight", "embedding"),)
RMS_NORM = (Parameter("weight", "scale"),)
LAYER_NORM = (*RMS_NORM, Parameter("bias", "bias"))
BATCHED_TABLE = (Parameter("", "", drop_batch_axis),)


class Row(NamedTuple):
    """A module by its names, each `{}` in them a number.

    Attributes:
      original: Name in the layout of the authors' own code.
      library: Name in the layout of diffusers or transformers.
      path: Name here.
      kind: Its parameters.
    """

    original: str
    library: str
    path: str
    kind: Kind


def within(original: str, library: str, path: str, rows: Iterable[Row]) -> list[Row]:
    """Puts the names of a module before those of its parts."""
    return [
        Row(
            f"{original}.{row.original}",
            f"{library}.{row.library}",
            f"{path}.{row.path}",
            row.kind,
        )
        for row in rows
    ]


def original_rules(rows: Iterable[Row]) -> tuple[Rule, ...]:
    """Returns a rule for each parameter, for the layout of the authors' own code."""
    return expand((row.original, row.path, row.kind) for row in rows)


def library_rules(rows: Iterable[Row]) -> tuple[Rule, ...]:
    """Returns a rule for each parameter, for diffusers' or transformers' layout."""
    return expand((row.library, row.path, row.kind) for row in rows)


def expand(modules: Iterable[tuple[str, str, Kind]]) -> tuple[Rule, ...]:
    """Returns a rule for each parameter of some modules.

    Args:
      modules: Name in the checkpoint, name here, and kind of each.
    """
    return tuple(
        Rule(_join(name, stored), _join(path, ours), layout)
        for name, path, kind in modules
        for stored, ours, layout in kind
    )


def _join(module: str, parameter: str) -> str:
    return f"{module}.{parameter}" if parameter else module

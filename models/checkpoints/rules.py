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
_NUMBERS = re.compile(r"(?:\d|\{\})+")


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
    """One line of a table: checkpoint key, our path or paths, change of layout.

    Args:
      key: A key of the checkpoint, each `{}` in it a number: `blocks.{}.q.weight`.
      path: Our parameter's path, dots between attributes, with as many numbers, in
        the same order. A number in it is a layer: `blocks.3.to_q.kernel` is slice 3
        of the stacked parameter `blocks.to_q.kernel`.
      layout: Change of layout.
      others: Paths of further parameters, where one array of the checkpoint holds
        several: the rows (entries of the first axis) of the first, then of the others.

    Raises:
      ValueError: Key and a path differ in how many numbers they have, or hold other
        braces.
    """

    key: str
    path: str
    layout: Layout = keep
    others: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for path in self.paths:
            literals = (self.key + path).replace(_NUMBER, "")
            if self.key.count(_NUMBER) != path.count(_NUMBER) or (
                set("{}") & set(literals)
            ):
                raise ValueError(
                    f"{self.key=} with {path=} cannot be turned round: use as many "
                    "{} in both, and no other braces"
                )

    @functools.cached_property
    def paths(self) -> tuple[str, ...]:
        """Paths of all parameters of the key, in the order of their rows."""
        return (self.path, *self.others)

    def path_of(self, key: str) -> str | None:
        """Returns our (first) path for a checkpoint key; None without a match."""
        return _translate(key, self.key, self.path)

    def paths_of(self, key: str) -> tuple[str, ...]:
        """Returns our paths for a checkpoint key; none if the rule does not match."""
        found = (_translate(key, self.key, path) for path in self.paths)
        return tuple(path for path in found if path is not None)

    def key_of(self, path: str) -> str | None:
        """Returns the checkpoint key for one of our paths; None without a match."""
        found = (_translate(path, own, self.key) for own in self.paths)
        return next((key for key in found if key is not None), None)


def _translate(name: str, template: str, other: str) -> str | None:
    """Fills the numbers of a name into another template."""
    match = _compile(template).fullmatch(name)
    return None if match is None else other.format(*match.groups())


@functools.cache
def _compile(template: str) -> re.Pattern[str]:
    return re.compile(r"(\d+)".join(map(re.escape, template.split(_NUMBER))))


class Lookup:
    """A table's rules by the names that they match: none but the likely is tried.

    A checkpoint has a thousand keys, and a table hundreds of rules.
    """

    def __init__(self, rules: Iterable[Rule]) -> None:
        # By what a template and all names that it matches have in common.
        self._by_key: dict[str, list[Rule]] = {}
        self._by_path: dict[str, list[Rule]] = {}
        for rule in rules:
            outline = _NUMBERS.sub(_NUMBER, rule.key)
            self._by_key.setdefault(outline, []).append(rule)
            for outline in {_NUMBERS.sub(_NUMBER, path) for path in rule.paths}:
                self._by_path.setdefault(outline, []).append(rule)

    def of_key(self, key: str) -> list[tuple[tuple[str, ...], Rule]]:
        """Returns the rules that match a checkpoint key, in order, and our paths."""
        return [
            (paths, rule)
            for rule in self._by_key.get(_NUMBERS.sub(_NUMBER, key), ())
            if (paths := rule.paths_of(key))
        ]

    def of_path(self, path: str) -> list[tuple[str, Rule]]:
        """Returns the rules that fill one of our paths, in order, and their keys."""
        return [
            (key, rule)
            for rule in self._by_path.get(_NUMBERS.sub(_NUMBER, path), ())
            if (key := rule.key_of(path)) is not None
        ]


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

    Rows of one name in a layout are one module there: its rows of weights are those of
    ours one after the other, in the order of the table.

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
    """Returns a rule for each parameter of some modules in a checkpoint.

    Args:
      modules: Name in the checkpoint, name here, and kind of each. Modules of one name
        are parts of one in the checkpoint; see `Row`.
    """
    parts: dict[tuple[str, Layout], list[str]] = {}
    for name, path, kind in modules:
        for stored, ours, layout in kind:
            key = _join(name, stored), layout
            parts.setdefault(key, []).append(_join(path, ours))
    return tuple(
        Rule(key, first, layout, tuple(others))
        for (key, layout), (first, *others) in parts.items()
    )


def _join(module: str, parameter: str) -> str:
    return f"{module}.{parameter}" if parameter else module

"""The changes that the tensors of one module mean, checked by their shapes."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from models.checkpoints.lora.formulas import Change, Factors, Rescaled, Sum
from models.checkpoints.lora.keys import Part, Parts
from models.checkpoints.lora.problems import Problem
from models.checkpoints.lora.strengths import DisagreementError, Strengths

_LOW_RANK = ("down", "up", "core", "up_bias")
_LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_MAGNITUDES = ("magnitude", "dora_scale")


class _MissingError(Exception):
    """A part is not there, and need not be."""


class _MisfitError(Exception):
    """A part cannot be merged; holds the problem."""

    def __init__(self, kind: str, text: str, may_skip: bool = False) -> None:
        super().__init__(text)
        self.problem = Problem(kind, text, may_skip)


@dataclasses.dataclass
class ModuleReader:
    """Reads the tensors of a module of the model, by their roles.

    Attributes:
      base: The module's name in the model.
      parts: Its tensors.
      weights: The model's weights.
      strengths: What the adapter says of its strength.
      problems: Everything that cannot be merged.
      notes: Doubts about strengths.
      num_unknown: Number of factors that are not said; they are 1.
    """

    base: str
    parts: Parts
    weights: Mapping[str, Any]
    strengths: Strengths
    problems: list[Problem] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    num_unknown: int = 0

    def read(self) -> list[tuple[str, Change]]:
        """Returns the changes by key of the model's weights."""
        target = self.base if self.base in self.weights else f"{self.base}.weight"
        bias = f"{self.base}.bias"
        found: list[tuple[str, Change]] = []
        for role, key in (("diff", target), ("diff_b", bias)):
            found += [(key, change) for change in self._read(self._whole, role, key)]
        matrices: list[Sum] = []
        for roles, read in (
            (_LOW_RANK, self._low_rank),
            (_LOKR, self._kronecker),
            (_LOHA, self._hadamard),
        ):
            if any(role in self.parts for role in roles):
                matrices += self._read(read, target)
        if "up_bias" in self.parts and matrices:
            changes = self._read(self._whole, "up_bias", bias)
            found += [(bias, change.scaled(matrices[0].factor)) for change in changes]
        if not matrices and not self.problems:
            self._check_no_half()
        return found + [(target, change) for change in self._rescaled(target, matrices)]

    def _read[**P](
        self, read: Callable[P, Sum], *args: P.args, **kwargs: P.kwargs
    ) -> list[Sum]:
        """Returns what `read` does; nothing if it is missing or finds problems."""
        count = len(self.problems)
        try:
            found = read(*args, **kwargs)
        except _MissingError:
            return []
        except _MisfitError as misfit:
            self.problems.append(misfit.problem)
            return []
        return [found] if len(self.problems) == count else []

    def _whole(self, role: str, target: str) -> Sum:
        """Returns the difference of a weight or bias."""
        if role not in self.parts:
            raise _MissingError
        part = self.parts[role]
        if target not in self.weights:
            text = f"{part.key} belongs to no weight of the model"
            raise _MisfitError("unmatched", text, may_skip=True)
        shape = tuple(self.weights[target].shape)
        # A table may lack the axis of size 1 that the model has for the batch.
        without = shape[1:] if shape[:1] == (1,) and len(shape) > 1 else shape
        self._check(part, shape, without)
        return Sum(1.0, (Factors(part.value),))

    def _low_rank(self, target: str) -> Sum:
        """Returns the product of two matrices, with or without a core."""
        down, up = self._both("down", "up")
        rows, columns, kernel = self._shape_of(target, down)
        self._check_magnitude(down)
        rank = max((1, *down.value.shape[:1]))
        core = self.parts.get("core")
        if core is not None:
            self._check(core, (rank, rank, *kernel))
            kernel = (1,) * len(kernel)
        flat = columns * math.prod(kernel)
        self._check(down, (rank, columns, *kernel), (rank, flat))
        self._check(up, (rows, rank, *(1 for _ in kernel)), (rows, rank))
        factors = Factors(up.value, down.value, None if core is None else core.value)
        return Sum(self._factor(down, rank, kernel), (factors,))

    def _kronecker(self, target: str) -> Sum:
        """Returns the Kronecker product of two matrices, each whole or in factors."""
        first, second = self._matrix("lokr_w1"), self._matrix("lokr_w2")
        core = self.parts.get("lokr_t2") if len(second) == 2 else None
        whole_rows, whole_columns, kernel = self._shape_of(target, first[0])
        rows, columns = _size(first[0], 0), _size(first[-1], 1)
        if whole_rows % rows or whole_columns % columns:
            text = f"{first[0].key} has {rows} rows and {columns} columns"
            expected = f"divisors of {whole_rows} and {whole_columns}"
            raise _MisfitError("shape", f"{text}; expected {expected}", may_skip=True)
        rank = (
            self._check_factors(first, rows, columns, ()) if len(first) == 2 else None
        )
        if len(first) == 1:
            self._check(first[0], (rows, columns))
        rows, columns = whole_rows // rows, whole_columns // columns
        if len(second) == 1:
            flat = columns * math.prod(kernel)
            self._check(second[0], (rows, columns, *kernel), (rows, flat))
        else:
            rank = self._check_factors(second, rows, columns, kernel, core)
        matrices = (
            Factors(*(part.value for part in first)),
            Factors(
                *(part.value for part in second),
                **({} if core is None else {"core": core.value}),
            ),
        )
        return Sum(self._factor(first[0], rank, kernel), matrices, "kronecker")

    def _hadamard(self, target: str) -> Sum:
        """Returns the product, entry by entry, of two matrices in factors."""
        pairs = [
            self._both(f"hada_{name}_a", f"hada_{name}_b") for name in ("w1", "w2")
        ]
        has_cores = "hada_t1" in self.parts or "hada_t2" in self.parts
        cores = self._both("hada_t1", "hada_t2") if has_cores else (None, None)
        rows, columns, kernel = self._shape_of(target, pairs[0][0])
        ranks, matrices = [], []
        for (left, right), core in zip(pairs, cores, strict=True):
            ranks.append(
                self._check_factors((left, right), rows, columns, kernel, core)
            )
            value = None if core is None else core.value
            matrices.append(Factors(left.value, right.value, value))
        factor = self._factor(pairs[0][0], ranks[0], kernel)
        return Sum(factor, tuple(matrices), "hadamard")

    def _check_factors(
        self,
        factors: tuple[Part, ...],
        rows: int,
        columns: int,
        kernel: tuple[int, ...],
        core: Part | None = None,
    ) -> int:
        """Checks a matrix's factors as LyCORIS has them; returns their rank."""
        left, right = factors
        rank = _size(right, 0)
        if core is None:
            self._check(left, (rows, rank))
            self._check(right, (rank, columns * math.prod(kernel)))
        else:
            self._check(left, (rank, rows))
            self._check(right, (rank, columns))
            self._check(core, (rank, rank, *kernel))
        return rank

    def _rescaled(self, target: str, matrices: list[Sum]) -> Sequence[Change]:
        """Returns the changes within DoRA, if the module has a magnitude."""
        given = [self.parts[role] for role in _MAGNITUDES if role in self.parts]
        if not given or not matrices:
            return matrices
        part, count = given[0], len(self.problems)
        others = given[1:] + [
            self.parts[role] for role in ("diff",) if role in self.parts
        ]
        if others:
            text = f"{part.key} and {others[0].key} exclude each other"
            self.problems.append(Problem("twice", text))
        shape = tuple(self.weights[target].shape)
        ones = (1,) * (len(shape) - 1)
        by_row, by_column = (shape[0], *ones), (1, shape[1], *ones[1:])
        if "magnitude" in self.parts:  # PEFT has rows alone; kernels' are [1, out, ...]
            self._check(part, by_row[:1], by_row, (1, shape[0], *ones[1:]))
            is_row = True
        else:
            self._check(part, by_row, by_column, by_row[:1])
            is_row = tuple(part.value.shape) in (by_row, by_row[:1])
        if len(self.problems) > count:
            return []
        return [Rescaled(tuple(matrices), part.value, by_row=is_row)]

    def _check_no_half(self) -> None:
        has_difference = "diff" in self.parts or "diff_b" in self.parts
        for role, part in self.parts.items():
            if role in ("alpha", "diff", "diff_b") and has_difference:
                continue
            text = f"{part.key} stands without its matrices"
            self.problems.append(Problem("half", text))

    def _check_magnitude(self, part: Part) -> None:
        """Finds DoRA whose magnitude the file has lost."""
        for settings in self.strengths.settings:
            if settings.with_magnitudes and not any(map(self.parts.get, _MAGNITUDES)):
                text = f"{part.key} stands without the magnitude that {settings.place} "
                self.problems.append(Problem("half", text + "promises by use_dora"))
                break

    def _check(self, part: Part, *accepted: Sequence[int]) -> None:
        """Finds tensors of another shape than those accepted, and of integers."""
        key, value = part.key, part.value
        if not jnp.issubdtype(value.dtype, jnp.floating):
            text = f"{key} is {value.dtype}; expected floating-point numbers"
            self.problems.append(Problem("dtype", text))
        elif tuple(value.shape) not in {tuple(shape) for shape in accepted}:
            text = f"{key} is {tuple(value.shape)}; expected {tuple(accepted[0])}"
            self.problems.append(Problem("shape", text, may_skip=True))

    def _both(self, first: str, second: str) -> tuple[Part, Part]:
        """Returns two tensors that make one matrix."""
        for role, other in ((first, second), (second, first)):
            if other not in self.parts:
                given = self.parts.get(role) or next(iter(self.parts.values()))
                raise _MisfitError(
                    "half", f"{given.key} stands without its other matrix"
                )
        return self.parts[first], self.parts[second]

    def _matrix(self, name: str) -> tuple[Part, ...]:
        """Returns a matrix of LoKr: one tensor, or its two factors."""
        if name not in self.parts:
            return self._both(f"{name}_a", f"{name}_b")
        if f"{name}_a" in self.parts:
            both = f"{self.parts[name].key} and {self.parts[f'{name}_a'].key}"
            raise _MisfitError("twice", f"{both} mean the same")
        return (self.parts[name],)

    def _shape_of(self, target: str, part: Part) -> tuple[int, int, tuple[int, ...]]:
        """Returns rows, columns and kernel of the matrix to change."""
        if target not in self.weights or len(self.weights[target].shape) < 2:
            text = f"{part.key} belongs to no matrix of the model"
            raise _MisfitError("unmatched", text, may_skip=True)
        rows, columns, *kernel = self.weights[target].shape
        return rows, columns, tuple(kernel)

    def _factor(self, part: Part, rank: int | None, kernel: tuple[int, ...]) -> float:
        """Returns the factor of a module's matrices; see `Strengths.of`."""
        alpha = None
        if "alpha" in self.parts:
            key, _, value = self.parts["alpha"]
            number = float(np.ravel(value)[0]) if np.size(value) == 1 else math.nan
            if not math.isfinite(number):
                raise _MisfitError("alpha", f"{key} must be one finite number")
            if number == 0 and rank is not None:
                raise _MisfitError(
                    "alpha", f"{key} is 0, which tools read as 0 or as rank"
                )
            alpha = key, number
        try:
            strength = self.strengths.of(
                part.module,
                rank,
                alpha=alpha,
                has_kernel=bool(kernel),
                renamed=".lora_A" in part.key,
            )
        except DisagreementError as error:
            raise _MisfitError("strength", str(error)) from error
        self.num_unknown += not strength.is_known
        if strength.note:
            self.notes.append(strength.note)
        return strength.factor


def _size(part: Part, axis: int) -> int:
    """Returns a size of a tensor; 1 if it has no such axis, or nothing in it."""
    shape = part.value.shape
    return max(1, shape[axis]) if len(shape) > axis else 1

"""Mutants: places where a small change is planted, found by cosmic-ray's operators.

Left out are changes that say nothing about tests: of annotations, docstrings, messages
of errors and our own assertions, and those that leave the syntax tree as it was.
"""

import ast
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import parso
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator
from cosmic_ray.operators.provider import OperatorProvider

# Code whose tests are tried. Kernels' own programs are not: interpret mode takes
# minutes where a mutant has seconds.
AREAS = {
    "method": ("draft_jax/**/*.py",),
    "kernels": tuple(
        f"pallas_kernels/**/{name}.py"
        for name in (
            *("api", "dense_api", "xla", "dense_xla", "reference", "interfaces"),
            *("validation", "batching", "device", "slow_paths", "lazy_modules"),
            *("backend", "dense_backend", "plan", "geometry", "partition_lists"),
            *("schedule", "keys", "packed_bits"),
        )
    ),
    "checkpoints": ("models/checkpoints/**/*.py",),
    "samplers": ("models/diffusion/schedulers.py", "models/diffusion/sampler.py"),
}

_SWAPS = {
    "ReplaceBinaryOperator": [
        *("Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "FloorDiv_Mul", "Mod_Mul"),
        *("Pow_Mul", "RShift_LShift", "LShift_RShift", "BitOr_BitAnd"),
        *("BitAnd_BitOr", "BitXor_BitAnd"),
    ],
    "ReplaceComparisonOperator": [
        *("Eq_NotEq", "NotEq_Eq", "Lt_LtE", "Lt_GtE", "LtE_Lt", "LtE_Gt"),
        *("Gt_GtE", "Gt_LtE", "GtE_Gt", "GtE_Lt", "Is_IsNot", "IsNot_Is"),
    ],
    "ReplaceUnaryOperator": ["USub_UAdd", "Invert_UAdd", "Delete_Not"],
}
_OPERATORS = [
    *(f"{family}_{swap}" for family, swaps in _SWAPS.items() for swap in swaps),
    *("ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ReplaceAndWithOr"),
    *("ReplaceOrWithAnd", "ReplaceBreakWithContinue", "ReplaceContinueWithBreak"),
    *("AddNot", "ExceptionReplacer", "NumberReplacer", "ZeroIterationForLoop"),
]


class DropKeyword(Operator):
    """Calls a function without one of its keyword arguments."""

    def mutation_positions(self, node):
        """Yields the keyword arguments of a call with several arguments."""
        if node.type == "arglist":
            for child in self._keywords(node):
                yield child.start_pos, child.end_pos

    def mutate(self, node, index):
        """Removes an argument and the comma before or after it."""
        place = node.children.index(self._keywords(node)[index])
        first = max(0, place - 1)
        del node.children[first : first + 2]
        return node

    @classmethod
    def examples(cls):
        """Returns none: the base class asks for the method."""
        return ()

    @staticmethod
    def _keywords(node) -> list:
        return [
            child
            for child in node.children
            if child.type == "argument" and child.children[1] == "="
        ]


class DropCall(Operator):
    """Leaves out a statement that only calls something, such as a check."""

    def mutation_positions(self, node):
        """Yields such a statement."""
        if node.type == "simple_stmt" and node.children[0].type == "atom_expr":
            yield node.start_pos, node.end_pos

    def mutate(self, node, index):
        """Puts `pass` in its place."""
        prefix = node.get_first_leaf().prefix
        node.children[0] = parso.parse(f"{prefix}pass").children[0]
        return node

    @classmethod
    def examples(cls):
        """Returns none: the base class asks for the method."""
        return ()


class _Site(NamedTuple):
    """A place that operators can change."""

    path: str
    start: tuple[int, int]
    choices: list[tuple[str, int]]  # operator and its occurrence in the file


def sample_mutants(root: Path, size: int, seed: int) -> list[dict[str, Any]]:
    """Draws mutants, a share from each module that follows its number of places.

    Args:
      root: The checkout.
      size: How many; every module has at least one.
      seed: Of the draw.

    Returns:
      For each mutant its id, area, path, line, operator, the edit (start, end and new
      text, as offsets in the file), the text it replaces, the file's number of lines,
      and the lines before and after.
    """
    rng = random.Random(seed)
    sites = {
        (area, path): list(_sites(root, path)) for area, path in files_of_areas(root)
    }
    sites = {key: found for key, found in sites.items() if found}
    total = sum(map(len, sites.values()))
    mutants = []
    for (area, _), found in sites.items():
        wanted = max(1, round(size * len(found) / total))
        rng.shuffle(found)
        of_module: list[dict[str, Any]] = []
        for site in found:
            if len(of_module) == wanted:
                break
            mutant = _mutate(root, site, rng.choice(site.choices))
            if mutant is not None:
                of_module.append({"area": area, **mutant})
        mutants += of_module
    return mutants


def files_of_areas(root: Path) -> list[tuple[str, str]]:
    """Returns each area's files, relative to the root."""
    return [
        (area, path.relative_to(root).as_posix())
        for area, patterns in AREAS.items()
        for path in sorted({p for pattern in patterns for p in root.glob(pattern)})
        if path.name != "__init__.py"
    ]


def _operators() -> Mapping[str, Operator]:
    provider = OperatorProvider()
    return {name: provider[name]() for name in _OPERATORS} | {
        "DropKeyword": DropKeyword(),
        "DropCall": DropCall(),
    }


def _sites(root: Path, path: str) -> Iterator[_Site]:
    source = (root / path).read_text()
    left_out = list(_spans_left_out(ast.parse(source)))
    nodes = list(_nodes(parso.parse(source)))
    # They say how arguments are passed, and multiply nothing.
    markers = {node.start_pos for node in nodes if _is_in_signature(node)}
    sites: dict[tuple[int, int], _Site] = {}
    for name, operator in _operators().items():
        positions = [at for node in nodes for at in operator.mutation_positions(node)]
        for occurrence, (start, _) in enumerate(positions):
            if start in markers or any(a <= start < b for a, b in left_out):
                continue
            site = sites.setdefault(start, _Site(path, start, []))
            site.choices.append((name, occurrence))
    yield from (sites[start] for start in sorted(sites))


def _nodes(node) -> Iterator[Any]:
    """Walks as cosmic-ray's visitor does, so that occurrences count alike."""
    yield node
    for child in getattr(node, "children", ()):
        yield from _nodes(child)


def _is_in_signature(node) -> bool:
    parent = node.parent
    return parent is not None and parent.type == "parameters"


def _spans_left_out(tree: ast.Module) -> Iterator[tuple[tuple, tuple]]:
    """Returns the spans of annotations, aliases, raised errors and assertions."""
    for node in ast.walk(tree):
        parts: list[ast.AST | None] = []
        if isinstance(node, ast.arg | ast.AnnAssign):
            parts.append(node.annotation)
        elif isinstance(node, ast.FunctionDef):
            parts += [node.returns, *node.type_params]
        elif isinstance(node, ast.Raise | ast.Assert | ast.TypeAlias):
            parts.append(node)
        elif isinstance(node, ast.Call) and _is_message(node.func):
            parts += node.args
        for part in parts:
            if part is not None:
                yield (
                    (part.lineno, part.col_offset),  # type: ignore[attr-defined]
                    (part.end_lineno, part.end_col_offset),  # type: ignore[attr-defined]
                )


def _is_message(function: ast.expr) -> bool:
    name = ast.unparse(function)
    return name.endswith(("Error", "Var")) or name.startswith(("_logger", "warn"))


def _mutate(root: Path, site: _Site, choice: tuple[str, int]) -> dict[str, Any] | None:
    """Returns the mutant, or None if the operator changes nothing that is read."""
    name, occurrence = choice
    source = (root / site.path).read_text()
    try:
        mutated = mutate_code(source, _operators()[name], occurrence)
        is_same = ast.dump(ast.parse(mutated)) == ast.dump(ast.parse(source))
    except (AttributeError, SyntaxError):  # it knows no `except module.Error`
        return None
    if is_same:
        return None
    start = _common(source, mutated)
    same = _common(source[start:][::-1], mutated[start:][::-1])
    end, new_end = len(source) - same, len(mutated) - same
    line, column = site.start
    return {
        "id": f"{site.path}:{line}:{column} {name}",
        "path": site.path,
        "line": source.count("\n", 0, start) + 1,
        "operator": name,
        "edit": [start, end, mutated[start:new_end]],
        "old": source[start:end],
        "length": source.count("\n"),
        "before": _lines(source, start, end),
        "after": _lines(mutated, start, new_end),
    }


def _common(a: str, b: str) -> int:
    """Returns how many characters two texts have in common at their start."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def _lines(source: str, start: int, end: int) -> str:
    """Returns the lines that hold a part of a file."""
    stop = source.find("\n", end)
    return source[source.rfind("\n", 0, start) + 1 : stop].strip()

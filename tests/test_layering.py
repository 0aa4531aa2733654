"""Arrows between files go down only: read from their syntax, nothing is imported.

    models.app -> models.cli
    benchmarks, models.cli -> models -> draft_jax -> pallas_kernels

Every import counts, also one inside of a function; one for annotations alone (below
`if TYPE_CHECKING:`) does not.
"""

import ast
import functools
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("pallas_kernels", "draft_jax", "models", "benchmarks")

# What each part may import besides itself and the standard library's like. The longest
# name that fits a module is its part.
MODEL_FAMILIES = (
    "models.wan",
    "models.hunyuan",
    "models.mini",
    "models.umt5",
    "models.clip",
)
MODEL_BASE = (
    "models.diffusion",
    "models.media",
    "models.checkpoints",
    "models.float8",
    "models.files",
)
LIBRARY = ("draft_jax", "pallas_kernels")
ARROWS: dict[str, tuple[str, ...]] = {
    "pallas_kernels": (),
    "pallas_kernels.common": (),
    "pallas_kernels.ranking": ("pallas_kernels.common",),
    "pallas_kernels.pooling": ("pallas_kernels.common",),
    "pallas_kernels.tile_scores": ("pallas_kernels.common",),
    "pallas_kernels.attention": ("pallas_kernels.common", "pallas_kernels.ranking"),
    "draft_jax": ("pallas_kernels",),
    "models": (*MODEL_FAMILIES, *MODEL_BASE, *LIBRARY),
    "models.files": (),
    "models.float8": ("pallas_kernels",),
    "models.checkpoints": ("models.files", "models.float8"),
    "models.media": ("models.files",),
    "models.diffusion": (
        "models.media",
        "models.checkpoints",
        "models.float8",
        "models.files",
        *LIBRARY,
    ),
    "models.report": MODEL_BASE,
    "models.umt5": (*MODEL_BASE, *LIBRARY),
    "models.clip": (*MODEL_BASE, *LIBRARY),
    "models.mini": ("models.wan", *MODEL_BASE, *LIBRARY),
    "models.hunyuan": (*MODEL_BASE, *LIBRARY),
    "models.wan": ("models.umt5", "models.clip", *MODEL_BASE, *LIBRARY),
    "models.cli": ("models", *LIBRARY),
    "models.app": ("models", "models.cli", *LIBRARY),
    "benchmarks": ("models", *LIBRARY),
}
# Where packages above may take names of the kernels from: what these export.
EXPORTING = (
    "pallas_kernels",
    "pallas_kernels.common",
    "pallas_kernels.float8_rows",
    "pallas_kernels.pooling",
    "pallas_kernels.ranking",
    "pallas_kernels.tile_scores",
)


def module_of(file: Path) -> str:
    """The dotted name of a file; of an `__init__.py`, that of its package."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def files() -> dict[str, Path]:
    """Every file of the four packages, by module."""
    found = (f for package in PACKAGES for f in sorted((ROOT / package).rglob("*.py")))
    return {module_of(file): file for file in found}


def imports(file: Path) -> Iterator[tuple[str, str | None]]:
    """Module and name of each import; the name is None for `import module`."""
    pending: list[ast.AST] = [ast.parse(file.read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
            continue
        pending += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports name their package"
            yield from ((str(node.module), alias.name) for alias in node.names)


def imported_modules(file: Path) -> set[str]:
    """Modules of the four packages, or of tests, that a file imports."""
    found = set()
    for module, name in imports(file):
        full = f"{module}.{name}"
        if full in files():
            found.add(full)
        elif module.split(".")[0] in (*PACKAGES, "tests"):
            found.add(module)
    return found


def is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def part_of(module: str) -> str:
    """The most special part that a module belongs to."""
    return max((part for part in ARROWS if is_in(module, part)), key=len)


def may_import(module: str, other: str) -> bool:
    """Whether an arrow leads from one module to another.

    The modules of a package that are in none of its parts, such as its `__init__`, may
    import all parts of it, which may not import them.
    """
    own, target = part_of(module), part_of(other)
    if own == target:
        return True
    if target == "models.app":  # nothing but its command's name is known outside
        return False
    if own in ("pallas_kernels", "models") and is_in(target, own):
        return target != "models.cli" or module.count(".") == 0
    return any(is_in(target, allowed) for allowed in ARROWS[own]) and not (
        own in MODEL_FAMILIES + MODEL_BASE and target == "models"
    )


def test_every_package_has_files():
    counts = {p: sum(is_in(m, p) for m in files()) for p in PACKAGES}
    assert min(counts.values()) > 10, counts


@pytest.mark.parametrize(
    "package",
    [
        "pallas_kernels",
        "draft_jax",
        "models",
        "benchmarks",
    ],
)
def test_arrows_go_down(package):
    upward = [
        f"{module} imports {other}"
        for module, file in files().items()
        if is_in(module, package)
        for other in sorted(imported_modules(file))
        if not is_in(other, "tests") and not may_import(module, other)
    ]
    assert not upward


def test_no_package_imports_tests():
    """But for the name under which tests record what they measured."""
    found = {
        (module, other)
        for module, file in files().items()
        for other in imported_modules(file)
        if is_in(other, "tests")
    }
    assert found <= {("benchmarks.gpu.run", "tests.tolerances")}


def test_no_file_imports_itself_through_others():
    graph = {
        module: imported_modules(file) - {module} for module, file in files().items()
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


def exported(module: str) -> set[str]:
    """The names in `__all__` of a package."""
    for node in ast.parse(files()[module].read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    raise AssertionError(f"{module} has no __all__")


def modules_below(package: str) -> set[str]:
    """Packages of a package that have exports of their own."""
    prefix = f"{package}."
    return {m.removeprefix(prefix) for m in EXPORTING if m.startswith(prefix)}


@pytest.mark.parametrize("package", ["draft_jax", "models"])
def test_kernels_are_used_by_exported_names(package):
    allowed = {module: exported(module) for module in EXPORTING}
    used, private = 0, []
    for module, file in files().items():
        if not is_in(module, package):
            continue
        for source, name in imports(file):
            if is_in(source, "pallas_kernels"):
                used += 1
                # A module that its package exports may be read from, too.
                package_of_source, _, last = source.rpartition(".")
                is_exported = last in allowed.get(package_of_source, ())
                names = {*allowed.get(source, ()), *modules_below(source)}
                if name not in names and not is_exported:
                    private.append(f"{module}: {source}.{name}")
    assert used > 0
    assert not private


def test_tests_of_packages_do_without_benchmarks():
    """Expected values and orders come from the packages, not from tools above them."""
    own = sorted((ROOT / "tests").rglob("*.py"))
    assert len(own) > 100
    wrong = [
        str(file.relative_to(ROOT))
        for file in own
        if not file.is_relative_to(ROOT / "tests" / "benchmarks")
        and any(is_in(module, "benchmarks") for module in imported_modules(file))
    ]
    assert not wrong


# Files that break a rule, and by it one of the tests above.
@pytest.mark.parametrize(
    ("module", "other", "allowed"),
    [
        ("draft_jax.attention", "pallas_kernels", True),
        ("draft_jax.attention", "models.wan.config", False),
        ("pallas_kernels.attention.api", "pallas_kernels.common.device", True),
        ("pallas_kernels.attention.api", "pallas_kernels", False),
        ("pallas_kernels.common.device", "pallas_kernels.attention.api", False),
        ("pallas_kernels", "pallas_kernels.attention.api", True),
        ("models.loading", "models.wan.config", True),
        ("models.loading", "models.cli.entry", False),
        ("models.wan.pipeline", "models.loading", False),
        ("models.wan.pipeline", "models.mini.config", False),
        ("models.wan.pipeline", "models.diffusion.sampler", True),
        ("models.diffusion.sampler", "models.wan.config", False),
        ("models.cli.entry", "models.loading", True),
        ("models.cli.entry", "models.app.command", False),
        ("models", "models.app.command", False),
        ("models.app.form", "models.cli.model", True),
        ("models.app.form", "models.loading", True),
        ("models.wan.config", "benchmarks.wan.run", False),
        ("benchmarks.wan.run", "models.wan.config", True),
    ],
)
def test_the_rule_itself(module, other, allowed):
    assert may_import(module, other) == allowed


def test_syntax_of_imports(tmp_path):
    """Imports in functions count, those for annotations do not."""
    file = tmp_path / "x.py"
    file.write_text(
        "from typing import TYPE_CHECKING\n"
        "import draft_jax.config as c\n"
        "if TYPE_CHECKING:\n    from models.wan import config\n"
        "def f():\n    from benchmarks.common import shapes\n"
    )
    found = imported_modules(file)
    assert found == {"draft_jax.config", "benchmarks.common.shapes"}

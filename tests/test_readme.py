"""The examples that people copy: Python and shell blocks of the README, docstrings."""

import ast
import re
import shlex
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.cli.parser import build_parser
from tests.wan_folders import TEXT_TO_VIDEO

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PACKAGES = ("draft_jax", "pallas_kernels", "models")
SIDES = ("frames", "height", "width")
# Larger grids are the point of the examples but not of this test.
MAX_TOKENS = 4096
SMALL_VIDEO = {"frames": 5, "height": 32, "width": 48, "num_steps": 2}


def blocks(language):
    """Fenced blocks of the README in one language."""
    pattern = rf"^```{language}[^\n]*\n(.*?)^```"
    return re.findall(pattern, README.read_text(), flags=re.M | re.S)


MOST_TIME = {"models/diffusion/recording.py:AttentionRecorder"}  # over 10 seconds


def docstring_examples():
    """Fenced code below "Example:" in any docstring of the packages."""
    found = []
    pattern = r"(?m)^Examples?:\n {4}```python\n((?: {4}.*\n|\n)+?) {4}```$"
    for file in (f for name in PACKAGES for f in sorted((ROOT / name).rglob("*.py"))):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                text = (ast.get_docstring(node) or "") + "\n"
                for code in re.findall(pattern, text):
                    name = f"{file.relative_to(ROOT)}:{getattr(node, 'name', '')}"
                    marks = [pytest.mark.nightly] if name in MOST_TIME else []
                    code = textwrap.dedent(code)
                    found.append(pytest.param(code, id=name, marks=marks))
    return found


class Shrink(ast.NodeTransformer):
    """Cuts the frames of each `VideoGrid(...)` so that few tokens are left.

    Models on the hub become the tiny one of the fixtures, with videos to suit.
    """

    def visit_Constant(self, node):
        on_hub = isinstance(node.value, str) and node.value.startswith("Wan-AI/")
        return ast.Constant(str(TEXT_TO_VIDEO)) if on_hub else node

    def visit_Call(self, node):
        self.generic_visit(node)
        if ast.unparse(node.func) == "wan_sampling":
            small = [ast.keyword(k, ast.Constant(v)) for k, v in SMALL_VIDEO.items()]
            kept = [k for k in node.keywords if k.arg not in SMALL_VIDEO]
            return ast.Call(node.func, node.args, kept + small)
        if not isinstance(node.func, ast.Name) or node.func.id != "VideoGrid":
            return node
        sides = dict(zip(SIDES, node.args, strict=False))
        sides |= {k.arg: k.value for k in node.keywords if k.arg in SIDES}
        frames, height, width = (ast.literal_eval(sides[name]) for name in SIDES)
        frames = max(1, min(frames, MAX_TOKENS // (height * width)))
        sides["frames"] = ast.Constant(frames)
        rest = [k for k in node.keywords if k.arg not in SIDES]
        return ast.Call(node.func, [sides[name] for name in SIDES], rest)


def shrink(code):
    """The same code on grids of a few thousand tokens, and on a tiny model."""
    tree = Shrink().visit(ast.parse(code))
    return ast.unparse(ast.fix_missing_locations(tree))


def not_finite(scope):
    """Names of what an example made with NaN or infinity in it."""
    return [
        name
        for name, value in scope.items()
        if isinstance(value, jax.Array | np.ndarray)
        and jnp.issubdtype(value.dtype, jnp.inexact)
        and not jnp.isfinite(value).all()
    ]


def test_examples_are_found():
    assert blocks("python")
    assert docstring_examples()
    assert shell_commands()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64"])
def test_nan_of_any_type_is_noticed(dtype):
    scope = {"good": jnp.ones(3, dtype), "count": 3, "mask": jnp.ones(3, bool)}
    assert not_finite(scope) == []
    assert not_finite(scope | {"bad": jnp.full(3, jnp.nan, dtype)}) == ["bad"]


@pytest.mark.parametrize("code", [*blocks("python"), *docstring_examples()])
def test_python_examples_run(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for what they write
    scope = {"__name__": "example"}
    exec(compile(shrink(code), "example", "exec"), scope)
    assert not_finite(scope) == []


def shell_commands():
    """Calls of draft-video in the README's shell blocks, comments cut off."""
    lines = [
        line.strip()
        for block in blocks("(?:sh|bash|console|shell)")
        for line in re.sub(r"\\\n", " ", block).splitlines()
    ]
    lines = [line.removeprefix("$ ") for line in lines]
    return [line for line in lines if line.startswith("draft-video ")]


@pytest.mark.parametrize("line", shell_commands())
def test_commands_are_accepted(line):
    """Parsed only: each would need minutes and the shipped weights."""
    _, *arguments = shlex.split(line, comments=True)
    assert build_parser().parse_args(arguments).command == arguments[0]


def test_files_that_the_readme_links_to_exist():
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", README.read_text())
    local = [link for link in links if not re.match(r"[a-z]+:", link)]
    assert local
    missing = [link for link in local if not (README.parent / link).exists()]
    assert not missing

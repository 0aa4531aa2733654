"""The Python and the commands of the documentation's pages.

Blocks of a page run in their order and share their names. A block that is not run has a
comment above it, `<!-- not run: reason -->`; a page counts these in `NOT_RUN`.
"""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from models.cli.parser import build_parser
from tests.cases import mostly_nightly
from tests.test_readme import shrink

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
OURS = (
    "benchmarks/",
    "draft_jax/",
    "examples/",
    "models/",
    "pallas_kernels/",
    "tests/",
)
RESULTS = ROOT / "benchmarks" / "results"
PAGES = sorted(DOCS.rglob("*.md"))
BLOCK = re.compile(
    r"^(<!-- not run: [^\n]+ -->\n)?```python[^\n]*\n(.*?)^```", re.M | re.S
)
SHELL = re.compile(r"^```(?:sh|bash|console|shell)\n(.*?)^```", re.M | re.S)
NOT_RUN = {"other_models.md": 2, "scaling.md": 1}


MODULE = re.compile(r"python -m ([\w.]+)")


def names(page):
    return page.relative_to(DOCS).as_posix()


def blocks(page):
    """The code of a page that runs, and how many blocks say that they do not."""
    found = BLOCK.findall(page.read_text())
    running = [code for skipped, code in found if not skipped]
    return running, len([skipped for skipped, _ in found if skipped])


def commands():
    """Every command of the pages' shell blocks, as words."""
    for page in [ROOT / "README.md", *PAGES]:
        for block in SHELL.findall(page.read_text()):
            for line in re.sub(r"\\\n", " ", block).splitlines():
                if words := shlex.split(line.removeprefix("$ "), comments=True):
                    yield pytest.param(words, id=f"{page.stem}: {' '.join(words)[:50]}")


def test_there_are_pages_and_commands():
    assert len(PAGES) > 10
    assert sum(len(blocks(page)[0]) for page in PAGES) > 10
    assert len(list(commands())) > 10


WITH_PYTHON = [page for page in PAGES if any(blocks(page))]
MOST_TIME = {"caches.md", "other_models.md", "wan.md", "your_dit.md"}  # over 10 seconds


@pytest.mark.parametrize(
    "page",
    mostly_nightly(WITH_PYTHON, [p for p in WITH_PYTHON if names(p) not in MOST_TIME]),
    ids=names,
)
def test_python_of_pages_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for what they write
    running, skipped = blocks(page)
    assert skipped == NOT_RUN.get(names(page), 0)
    scope = {"__name__": "page"}
    for index, code in enumerate(running):
        exec(compile(shrink(code), f"{names(page)}, block {index}", "exec"), scope)


def test_modules_that_pages_name_exist():
    texts = [page.read_text() for page in [ROOT / "README.md", *PAGES]]
    modules = {name for text in texts for name in MODULE.findall(text)}
    assert "benchmarks.attention.run" in modules
    assert not [name for name in sorted(modules) if not importlib.util.find_spec(name)]


def test_files_that_pages_name_exist():
    """In backquotes: whole paths, names of test files, and JSON files of results."""
    found = []
    for page in PAGES:
        for path in re.findall(r"`([\w./*]+\.(?:py|json))`", page.read_text()):
            if path.startswith(OURS):
                found += [(page.name, path, any(ROOT.glob(path)))]
            elif path.startswith("test_"):
                found += [(page.name, path, any((ROOT / "tests").rglob(path)))]
            elif path.endswith("_h100.json"):
                found += [(page.name, path, (RESULTS / path).is_file())]
    assert len(found) > 10
    assert not [(page, path) for page, path, exists in found if not exists]


def test_the_readme_is_a_front_page():
    readme = (ROOT / "README.md").read_text()
    assert 300 < len(readme.split()) <= 1300
    assert "docs/" in readme


@pytest.mark.parametrize("words", list(commands()))
def test_commands_exist(words):
    """Commands are parsed or found, not run: some need a GPU, some minutes."""
    while "=" in words[0]:  # VARIABLE=value command
        words = words[1:]
    match words:
        case ["draft-video", *arguments]:
            assert build_parser().parse_args(arguments).command == arguments[0]
        case ["./run", job, *_]:
            assert re.search(rf"^{job}\)", (ROOT / "run").read_text(), re.M)
        case ["python", "-m", module, *_]:
            assert importlib.util.find_spec(module)
        case ["python", file, *_] | [file, *_] if (ROOT / file).is_file():
            pass
        case ["pip" | "git" | "mkdocs" | "pre-commit", *_]:
            pass
        case _:
            pytest.fail(f"no such command is known: {' '.join(words)}")

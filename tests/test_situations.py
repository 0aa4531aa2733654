"""The page of situations names tests that exist."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
NAMED_TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def rows_of_page() -> list[str]:
    lines = (ROOT / "docs" / "situations.md").read_text().splitlines()
    is_title = ("| Situation ", "| --- ")
    return [
        line for line in lines if line.startswith("|") and not line.startswith(is_title)
    ]


def test_each_situation_names_tests_that_exist():
    wrong = []
    for row in rows_of_page():
        named = NAMED_TEST.findall(row)
        if not named:
            wrong.append(f"names no test: {row}")
        for file, function in named:
            path = ROOT / file
            tree = ast.parse(path.read_text()) if path.is_file() else ast.Module([], [])
            nodes = ast.walk(tree)
            if function not in {getattr(node, "name", None) for node in nodes}:
                wrong.append(f"{file} has no {function}")
    assert not wrong, "\n".join(wrong)

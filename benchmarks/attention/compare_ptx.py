"""Compares the PTX of two trees: is a kernel the same after a refactoring?

    python -m benchmarks.attention.compile_hopper --output before    # in each tree
    python -m benchmarks.attention.compile_hopper --output after
    python -m benchmarks.attention.compare_ptx before after

Programs are compared in the order in which they were compiled. Names of symbols, line
information, debug sections and comments do not count. Where the rest differs, the
registers, spills and memory that ptxas reports are compared. The exit status is 1 if
some program differs in these too.
"""

import argparse
import pathlib
import re
import sys

_DEBUG_SECTION = re.compile(r"\.section\s+\.debug\w+\s*\{.*?\n\s*\}", re.DOTALL)
_SYMBOL = re.compile(r"\.(?:entry|func)\s+(?:\([^)]*\)\s*)?([\w$.]+)")
_RESOURCES = re.compile(r"\d+ (?:registers|bytes \w+(?: \w+)?|barriers)")


def instructions(ptx: str) -> str:
    """Returns PTX without comments and line information, its symbols numbered."""
    lines = (
        line.split("//")[0].strip() for line in _DEBUG_SECTION.sub("", ptx).split("\n")
    )
    text = "\n".join(
        line for line in lines if line and not re.match(r"\.(loc|file)\b", line)
    )
    for number, symbol in enumerate(dict.fromkeys(_SYMBOL.findall(text))):
        text = re.sub(
            rf"(?<![\w$]){re.escape(symbol)}(?![\w$])", f"symbol_{number}", text
        )
    return text


def verdict(before: pathlib.Path, after: pathlib.Path) -> str:
    """Compares two programs by their PTX files, beside which ptxas' reports lie.

    Returns:
      "equal", "same resources" or "different".
    """
    if instructions(before.read_text()) == instructions(after.read_text()):
        return "equal"
    used = [
        _RESOURCES.findall(ptx.with_suffix(".ptxas").read_text())
        for ptx in (before, after)
    ]
    return "same resources" if used[0] == used[1] else "different"


def _programs(folder: pathlib.Path) -> list[pathlib.Path]:
    """Lists the dumps in the order in which they were made."""
    found = sorted(folder.glob("*.ptx"), key=lambda path: path.stat().st_mtime_ns)
    if not found:
        raise SystemExit(f"{folder} has no PTX: make it with compile_hopper --output")
    return found


def main() -> None:
    """Prints a verdict for each program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=pathlib.Path)
    parser.add_argument("after", type=pathlib.Path)
    arguments = parser.parse_args()
    before, after = _programs(arguments.before), _programs(arguments.after)
    if len(before) != len(after):
        raise SystemExit(f"{len(before)} programs before, {len(after)} after")
    verdicts = []
    for old, new in zip(before, after, strict=True):
        verdicts.append(verdict(old, new))
        print(f"{verdicts[-1]}: {old.name}, {new.name}")
    sys.exit("different" in verdicts)


if __name__ == "__main__":
    main()

"""Options that the command lines of several benchmarks share."""

import argparse

from models.files import output_file


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    """Makes a parser that a module's first line describes."""
    return argparse.ArgumentParser(description=(doc or "").split("\n")[0])


def add_output(parser: argparse.ArgumentParser, what: str = "JSON file") -> None:
    """Adds --output, which is None where it is not given."""
    parser.add_argument("--output", type=output_file, help=what)


def add_turns(
    parser: argparse.ArgumentParser, *, rounds: int, settle: float, block: float
) -> None:
    """Adds the options of `benchmarks.common.timing.take_turns`."""
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--settle", type=float, default=settle, help="seconds")
    parser.add_argument("--block", type=float, default=block, help="seconds")


def height_by_width(text: str) -> tuple[int, int]:
    """Reads HEIGHTxWIDTH.

    Raises:
      ValueError: The text is not two integers around an x.
    """
    height, width = map(int, text.split("x"))
    return height, width

"""Parses the command line, runs a command, and turns errors into one line."""

import argparse
import contextlib
import platform
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import NoReturn

import jax
from tqdm import tqdm

from models.cli.progress import status_lines
from models.umt5.embeddings import UnknownPromptError

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
DISTRIBUTION = "draft-attention-jax"
# Bad values, a missing extra, files, damaged weights, prompts without embeddings, and
# videos too large for the device's memory. Anything else is a bug and shows its
# traceback.
USER_ERRORS = (
    ValueError,
    ImportError,
    OSError,
    FloatingPointError,
    MemoryError,
    UnknownPromptError,
    jax.errors.JaxRuntimeError,
)


class OneLineParser(argparse.ArgumentParser):
    """Reports errors in one line, without repeating the usage."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments") and " -" not in message:
            message += " (put the prompt in quotes)"
        self.exit(EXIT_BAD_INPUT, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `draft-video` with these arguments, by default the process's own.

    Returns:
      The exit status: 0, 2 for bad input, 130 after Ctrl-C.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        arguments = build_parser().parse_args(argv)
        arguments.argv = argv
        return _run(arguments)
    except SystemExit as stop:  # argparse has printed its line
        return stop.code if isinstance(stop.code, int) else EXIT_BAD_INPUT
    except KeyboardInterrupt:
        _print_error("interrupted")
        return EXIT_INTERRUPTED


def _run(arguments: argparse.Namespace) -> int:
    """Runs the chosen command; an error a user can cause becomes one line."""
    try:
        with _one_line_warnings(), status_lines():
            arguments.run(arguments)
    except USER_ERRORS as error:
        if arguments.debug:
            traceback.print_exc()
        else:
            _print_error(f"error: {_one_line(error)}")
        return EXIT_BAD_INPUT
    return 0


def package_version() -> str:
    """Version of the installed distribution."""
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "(not installed)"


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    from models.cli import generate, inspect

    parser = OneLineParser(
        prog="draft-video",
        description="Generates videos with draft attention (block-sparse attention "
        "guided by a low-resolution draft) and shows what it skips.",
        epilog="Each command has its own --help, with examples.",
    )
    version = f"draft-video {package_version()}, Python {platform.python_version()}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", required=True, parser_class=OneLineParser
    )
    generate.add_parser(commands)
    inspect.add_parser(commands)
    return parser


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _print_error(text: str) -> None:
    tqdm.write(f"draft-video: {text}", file=sys.stderr)


@contextlib.contextmanager
def _one_line_warnings() -> Iterator[None]:
    """Shows each warning once, in a line of its own above the progress bar."""

    def show(message, category, filename, lineno, file=None, line=None):
        tqdm.write(f"draft-video: note: {_one_line(message)}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.filterwarnings("once", category=UserWarning)
        warnings.showwarning = show
        yield

"""Parses the command line, runs a command, and turns errors into one line."""

import argparse
import importlib
import sys
import traceback
from collections.abc import Sequence

from models.cli.compile_cache import compile_cache
from models.cli.messages import one_line, one_line_warnings, status_lines, write_line
from models.cli.parser import EXIT_BAD_INPUT, build_parser

EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
# Bad values, a missing extra, files, damaged weights and too little memory; see
# `_is_for_users`.
_BUILT_IN_USER_ERRORS = (
    ValueError,
    ImportError,
    OSError,
    FloatingPointError,
    MemoryError,
)


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
        write_line("draft-video: interrupted")
        return EXIT_INTERRUPTED


def _run(arguments: argparse.Namespace) -> int:
    """Runs the chosen command; an error a user can cause becomes one line."""
    try:
        cache = compile_cache(enabled=not arguments.no_compile_cache)
        # jax is imported now: parsing, the help and the version do without.
        with one_line_warnings(), status_lines(), cache:
            command = importlib.import_module(f"models.cli.{arguments.command}")
            command.run(arguments)
    except Exception as error:
        if not _is_for_users(error):
            raise
        if arguments.debug:
            traceback.print_exc()
        else:
            write_line(f"draft-video: error: {one_line(error)}")
        return EXIT_BAD_INPUT
    return 0


def _is_for_users(error: Exception) -> bool:
    """Returns whether a user can cause an error; others are bugs.

    Beside built-in errors these are prompts without embeddings, and videos too large
    for the device's memory.
    """
    if isinstance(error, _BUILT_IN_USER_ERRORS):
        return True
    import jax

    from models.umt5.embeddings import UnknownPromptError

    return isinstance(error, UnknownPromptError | jax.errors.JaxRuntimeError)

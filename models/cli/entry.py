"""Parses the command line, runs a command, and turns errors into one line."""

import argparse
import importlib
import signal
import sys
import traceback
from collections.abc import Sequence

from models.cli.compile_cache import compile_cache
from models.cli.messages import (
    EXIT_BAD_INPUT,
    EXIT_INCOMPLETE,
    escape_unprintable,
    flush_output,
    one_line,
    one_line_warnings,
    status_lines,
    write_line,
)
from models.cli.parser import UsageError, build_parser
from models.cli.signals import Terminated, quiet_imports, say_stopped, take_over
from models.files import MissingFilesError

_MODULES = {
    "generate": "models.cli.generate",
    "inspect": "models.cli.inspect",
    "calibrate": "models.cli.calibrate",
    "decode": "models.cli.decode",
    "app": "models.app.command",
}
# Bad values, a missing extra, files, damaged weights and too little memory; see
# `_is_for_users`.
_BUILT_IN_USER_ERRORS = (
    ValueError,
    ImportError,
    OSError,
    FloatingPointError,
    MemoryError,
)


def run_process() -> int:
    """Runs `draft-video` as this process, whose signals and streams are its own.

    Returns:
      The exit status: that of `main`, or 143 after SIGTERM and 129 after SIGHUP.
    """
    take_over()
    escape_unprintable()
    return flush_output(main())


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `draft-video` with these arguments, by default the process's own.

    Returns:
      The exit status: 0, 2 for bad input, 3 if some of the files could not be
      written, 130 after Ctrl-C.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        arguments = build_parser().parse_args(argv)
        arguments.argv = argv
        return _run(arguments)
    except KeyboardInterrupt:
        return say_stopped(signal.SIGINT)
    except Terminated as stop:
        return say_stopped(stop.signal_number)
    except UsageError as error:
        write_line(error.line)
        return EXIT_BAD_INPUT
    except SystemExit as stop:  # argparse has printed the help
        return stop.code if isinstance(stop.code, int) else EXIT_BAD_INPUT


def _run(arguments: argparse.Namespace) -> int:
    """Runs the chosen command; an error a user can cause becomes one line."""
    try:
        with one_line_warnings(), status_lines():
            # jax is imported now: parsing, the help and the version do without.
            with quiet_imports():
                command = importlib.import_module(_MODULES[arguments.command])
            with compile_cache(enabled=not arguments.no_compile_cache):
                command.run(arguments)
    except Exception as error:
        if not _is_for_users(error):
            raise
        if arguments.debug:
            traceback.print_exc()
        else:
            write_line(f"draft-video: error: {one_line(error)}")
        is_incomplete = isinstance(error, MissingFilesError)
        return EXIT_INCOMPLETE if is_incomplete else EXIT_BAD_INPUT
    return 0


def _is_for_users(error: Exception) -> bool:
    """Returns whether a user can cause an error; others are bugs.

    Beside built-in errors these are prompts without embeddings, and videos too large
    for the device's memory.
    """
    if isinstance(error, _BUILT_IN_USER_ERRORS):
        return True
    import jax

    from models.diffusion.embeddings import UnknownPromptError

    return isinstance(error, UnknownPromptError | jax.errors.JaxRuntimeError)

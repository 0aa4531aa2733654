"""Lines for a person on stderr: errors, notes, and the stage of a run."""

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator

EXIT_BAD_INPUT = 2
EXIT_INCOMPLETE = 3  # the run is over, but some of its files could not be written


def write_line(text: str) -> None:
    """Writes a line to stderr, above a progress bar, which printing would tear."""
    tqdm = sys.modules.get("tqdm")
    if tqdm is None:  # nobody has drawn a bar
        print(text, file=sys.stderr)
    else:
        tqdm.tqdm.write(text, file=sys.stderr)


def escape_unprintable() -> None:
    """Shows characters that a terminal's encoding lacks as escapes, as `repr` does.

    Python does so for stderr only, and fails where an ASCII terminal is to show a path.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def flush_output(status: int) -> int:
    """Writes what is still to be printed; at exit Python would show a traceback.

    Args:
      status: The exit status so far.

    Returns:
      The exit status: 2 instead of 0 if it cannot be written, on a full disk say.
    """
    try:
        print(end="", flush=True)
    except OSError as error:
        # Python would try again when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # `draft-video ... | head`
            return status
        write_line(f"draft-video: error: the output cannot be printed: {error}")
        return status or EXIT_BAD_INPUT
    return status


def one_line(message: object) -> str:
    """Returns a message without line breaks; the name of its class if it is empty.

    It may quote a file or a prompt, so characters that steer a terminal become escapes.
    """
    line = " ".join(str(message).split()) or type(message).__name__
    return "".join(
        character if character.isprintable() else repr(character)[1:-1]
        for character in line
    )


@contextlib.contextmanager
def one_line_warnings() -> Iterator[None]:
    """Shows each warning once, in a line of its own above the progress bar."""

    def show(message, category, filename, lineno, file=None, line=None):
        write_line(f"draft-video: note: {one_line(message)}")

    with warnings.catch_warnings():
        warnings.filterwarnings("once", category=UserWarning)
        warnings.showwarning = show
        yield


@contextlib.contextmanager
def status_lines() -> Iterator[None]:
    """Shows the stages that `models` logs on a terminal, and nothing elsewhere."""
    if not sys.stderr.isatty():
        yield
        return
    log, handler = logging.getLogger("models"), _LineHandler(logging.INFO)
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.setLevel(level)
        log.removeHandler(handler)


class _LineHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        write_line(f"draft-video: {one_line(record.getMessage())}")

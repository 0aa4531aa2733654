"""Lines for a person on stderr: errors, notes, and the stage of a run."""

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator


def write_line(text: str) -> None:
    """Writes a line to stderr, above a progress bar, which printing would tear."""
    tqdm = sys.modules.get("tqdm")
    if tqdm is None:  # nobody has drawn a bar
        print(text, file=sys.stderr)
    else:
        tqdm.tqdm.write(text, file=sys.stderr)


def one_line(message: object) -> str:
    """Returns a message without line breaks; the name of its class if it is empty."""
    return " ".join(str(message).split()) or type(message).__name__


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
        write_line(f"draft-video: {record.getMessage()}")

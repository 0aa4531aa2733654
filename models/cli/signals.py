"""Ctrl-C and termination of the process: no partial file, no child, no traceback."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import NoReturn

from models.cli.messages import write_line

# Seconds for the main thread to remove what it was writing. It may wait in XLA, for a
# step or a compilation of minutes, where Python runs no handler; nothing is being
# written then.
GRACE_SECONDS = 3.0
# What a process is stopped by, and what is said then. Windows has no SIGHUP.
_WORDS: dict[int, str] = {
    getattr(signal, name): word
    for name, word in (
        ("SIGINT", "interrupted"),
        ("SIGTERM", "terminated"),
        ("SIGHUP", "terminated: its terminal has gone"),
    )
    if hasattr(signal, name)
}


class Terminated(SystemExit):
    """The process was asked to end; `finally` blocks run on the way out."""

    def __init__(self, signal_number: int):
        super().__init__(exit_status(signal_number))
        self.signal_number = signal_number


class _Process:
    """State of this process, which threads and handlers share."""

    importing = False  # nothing was begun yet
    told = False  # what stopped it
    leaving = threading.Lock()  # taken once and for all


def exit_status(signal_number: int) -> int:
    """Returns the status with which shells report a signal."""
    return 128 + signal_number


def say_stopped(signal_number: int) -> int:
    """Says what has stopped the command, and returns its exit status."""
    _Process.told = True
    write_line(_line(signal_number))
    return exit_status(signal_number)


def take_over() -> None:
    """Handles the signals that stop this process, for as long as it lives.

    A signal that the parent has had ignored stays so: that is how `nohup` works, and
    how shells protect jobs in the background from Ctrl-C.
    """
    defaults = (signal.SIG_DFL, signal.default_int_handler)
    taken = [number for number in _WORDS if signal.getsignal(number) in defaults]
    if not taken:
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    # Python writes there at once, also while the main thread is in XLA.
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(reader, frozenset(taken)))
    watcher.daemon = True
    watcher.start()
    for number in taken:
        signal.signal(number, _stop)


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Leaves at once when a signal comes, where nothing was begun yet.

    An exception in the middle of an import may become another, or a traceback from
    where Python ignores exceptions.
    """
    _Process.importing = True
    try:
        yield
    finally:
        _Process.importing = False


def _stop(signal_number: int, frame: object) -> None:
    """Raises the exception of a signal."""
    if _Process.importing:
        _leave(signal_number)
    if signal_number == signal.SIGINT:
        raise KeyboardInterrupt
    raise Terminated(signal_number)


def _watch(reader: int, taken: frozenset[int]) -> None:
    """Ends the process some time after a signal if the main thread has not."""
    while (number := os.read(reader, 1)[0]) not in taken:
        pass
    if not _Process.importing:
        time.sleep(GRACE_SECONDS)
    _leave(number)


def _leave(signal_number: int) -> NoReturn:
    """Ends the process without waiting for threads."""
    _Process.leaving.acquire()
    if not _Process.told:
        with contextlib.suppress(OSError):
            os.write(2, f"{_line(signal_number)}\n".encode())
    os._exit(exit_status(signal_number))


def _line(signal_number: int) -> str:
    return f"draft-video: {_WORDS[signal_number]}"

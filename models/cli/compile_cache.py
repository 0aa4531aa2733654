"""Keeps compiled programs between runs, in the user's cache folder.

This is JAX's own persistent compilation cache, which the library leaves alone: only the
command line turns it on, for its own process. Its key knows the program, the versions
of jax and XLA, and the device, but little of a CPU's instructions; so each machine has
a folder of its own.
"""

import contextlib
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

from models.cli.messages import one_line, write_line

MOST_BYTES = 2 * 2**30  # 1.5 MB hold the programs of one size of the shipped model
# All programs are kept, also small ones: a run has some 150 of them.
_KEEP_ALL = {
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": 0,
}
_ABOUT_THE_CACHE = "persistent compilation cache"  # in each of JAX's warnings of it


@contextlib.contextmanager
def compile_cache(*, enabled: bool = True) -> Iterator[None]:
    """Uses compiled programs of earlier runs inside of the block.

    Settings of JAX that the user has made stay as they are. A folder that cannot be
    used costs a note, not the run.

    Args:
      enabled: Whether the cache is used; if not, neither is the user's own.
    """
    import jax

    if not enabled:
        with _settings({"jax_enable_compilation_cache": False}):
            yield
        return
    theirs = jax.config.jax_compilation_cache_dir
    if theirs is not None or not jax.config.jax_enable_compilation_cache:
        with _settings(_KEEP_ALL):
            yield
        return
    try:
        folder = _prepared_folder()
    except (OSError, RuntimeError, ImportError) as error:
        write_line(
            f"draft-video: note: compiled programs are not kept: {one_line(error)}"
        )
        yield
        return
    own = {
        "jax_compilation_cache_dir": str(folder),
        "jax_compilation_cache_max_size": MOST_BYTES,
    }
    with _settings(_KEEP_ALL | own), _one_note_of_failures(folder):
        yield


def cache_folder() -> Path:
    """Returns the folder of this machine's programs, below the user's cache folder.

    Raises:
      RuntimeError: There is no home folder.
    """
    return _user_cache() / "draft-video" / "compiled" / _machine()


def _user_cache() -> Path:
    """Returns the folder that the system means for caches."""
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return Path(local) if local else Path.home() / "AppData" / "Local"
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The specification has relative paths ignored.
    return given if given.is_absolute() else Path.home() / ".cache"


def _machine() -> str:
    """Returns a name that machines with other CPU instructions do not share."""
    features = platform.processor()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        text = information.read_text(errors="replace")
        lines = re.findall(r"^(?:model name|flags|Features)\s*:.*$", text, re.M)
        features = "\n".join(sorted(set(lines)))
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:12]}"


def _prepared_folder() -> Path:
    """Makes the folder and tries it.

    Raises:
      ImportError: JAX cannot bound a cache without filelock.
      OSError: The folder cannot be made, written to or locked.
      RuntimeError: There is no home folder.
    """
    if importlib.util.find_spec("filelock") is None:
        raise ImportError("JAX needs filelock to bound them: pip install filelock")
    import filelock

    folder = cache_folder()
    # Others must not write here: programs in it are run.
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        tempfile.TemporaryFile(dir=folder).close()
        # JAX's own file; some network file systems have no locks.
        with (
            contextlib.suppress(filelock.Timeout),  # it works, and another has it
            filelock.FileLock(folder / ".lockfile", timeout=0),
        ):
            pass
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise OSError(f"{folder} cannot be used ({reason})") from error
    return folder


@contextlib.contextmanager
def _settings(values: Mapping[str, object]) -> Iterator[None]:
    """Sets options of JAX that no environment variable has set, and then resets them.

    JAX decides once in a process whether there is a cache, so it is told to forget.
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    values = {
        name: value for name, value in values.items() if name.upper() not in os.environ
    }
    before = {name: getattr(jax.config, name) for name in values}
    try:
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


@contextlib.contextmanager
def _one_note_of_failures(folder: Path) -> Iterator[None]:
    """Shows JAX's first warning of the cache only, and drops a damaged cache at last.

    JAX does not write files of the cache at once, so a full disk or a kill leaves a
    part of one, of which it would warn in every run.
    """
    failures: list[str] = []
    shown = warnings.showwarning

    def show(message, *arguments, **options):
        if _ABOUT_THE_CACHE not in str(message):
            shown(message, *arguments, **options)
            return
        if not failures:
            where = f"(in {folder}; --no-compile-cache does without)"
            write_line(f"draft-video: note: {one_line(message)} {where}")
        failures.append(str(message))

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = shown
        damaged = [failure for failure in failures if "Error reading" in failure]
        # A lock that others hold for long is no damage.
        if any("Timeout" not in failure for failure in damaged):
            shutil.rmtree(folder, ignore_errors=True)

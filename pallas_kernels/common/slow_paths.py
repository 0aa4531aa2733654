"""Warnings that are issued once, such as that a call is slower than it could be."""

import os
import pathlib
import warnings

# The packages that lie beside each other: the warning shows the line that called them.
_ROOT = pathlib.Path(__file__).parents[2]
_OURS = tuple(
    f"{_ROOT / package}{os.sep}"
    for package in ("pallas_kernels", "draft_jax", "models")
)


class SlowBackendWarning(UserWarning):
    """`backend="auto"` took a path that is slower than the device allows."""


_warned: set[str] = set()


def warn_once(message: str, category: type[UserWarning] = SlowBackendWarning) -> None:
    """Issues a warning unless the same message was issued before.

    It is shown with the line outside this project that led here, however many of our
    functions lie between.
    """
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, category, skip_file_prefixes=_OURS)

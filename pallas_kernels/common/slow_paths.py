"""Warnings that are issued once, such as that a call is slower than it could be."""

import os
import pathlib
import warnings

import jax

# The packages that lie beside each other, and jax, which may call them for the user:
# the warning shows the line that called.
_ROOT = pathlib.Path(__file__).parents[2]
_PASSED_OVER = tuple(
    f"{folder}{os.sep}"
    for folder in (
        *(_ROOT / package for package in ("pallas_kernels", "draft_jax", "models")),
        pathlib.Path(jax.__file__).parent,
    )
)


class SlowBackendWarning(UserWarning):
    """`backend="auto"` took a path that is slower than the device allows."""


_warned: set[str] = set()


def warn_once(message: str, category: type[UserWarning] = SlowBackendWarning) -> None:
    """Issues a warning unless the same message was issued before.

    It is shown with the line outside this project and jax that led here, however many
    functions lie between.
    """
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, category, skip_file_prefixes=_PASSED_OVER)

"""The warning that a call runs slower than its device allows, issued once."""

import warnings


class SlowBackendWarning(UserWarning):
    """`backend="auto"` took a path that is slower than the device allows."""


_warned: set[str] = set()


def warn_once(message: str) -> None:
    """Issues a SlowBackendWarning unless the same message was issued before."""
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, SlowBackendWarning, stacklevel=3)

"""Lets a test see a warning that is issued once, whatever ran before."""

from pallas_kernels.common import slow_paths


def forget_warnings() -> None:
    """Makes every SlowBackendWarning be issued once more."""
    slow_paths._warned.clear()

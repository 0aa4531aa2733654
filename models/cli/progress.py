"""A progress bar for sampler steps, and a line for each stage around them."""

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator

from tqdm import tqdm

from models.diffusion.pipeline import StepReport


@contextlib.contextmanager
def progress_bar(name: str, num_steps: int) -> Iterator[Callable[[StepReport], None]]:
    """Shows steps done and time left on a terminal, and nothing elsewhere.

    Args:
      name: What runs.
      num_steps: Steps until it is done.

    Yields:
      A callback for `VideoPipeline.generate`.
    """
    with tqdm(
        total=num_steps,
        desc=f"{name}: compiling",
        unit="step",
        file=sys.stderr,
        disable=None,  # off where stderr is no terminal
        dynamic_ncols=True,
    ) as bar:

        def show(report: StepReport) -> None:
            if bar.disable:
                return
            if report.index == 0:
                # Compiling is over and says nothing about the time left.
                bar.start_t = bar.last_print_t = time.time() - 1e-3 * report.time_ms
            share = report.kept_density.mean()
            bar.set_description(f"{name}: {100 * share:.0f} % of pairs", refresh=False)
            bar.update()

        yield show


@contextlib.contextmanager
def status_lines() -> Iterator[None]:
    """Shows what `models` logs of its stages on a terminal, and nothing elsewhere."""
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
    """Writes above a progress bar, which printing would tear."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(f"draft-video: {record.getMessage()}", file=sys.stderr)

"""A progress bar for the steps of a sampler."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from models.diffusion.results import StepReport
from models.media.video import check_video_extra


@contextlib.contextmanager
def progress_bar(name: str, num_steps: int) -> Iterator[Callable[[StepReport], None]]:
    """Shows steps done and time left on a terminal, and nothing elsewhere.

    Args:
      name: Shown before the bar.
      num_steps: Steps until it is done.

    Yields:
      A callback for `VideoPipeline.generate`.

    Raises:
      MissingExtraError: tqdm is not installed.
    """
    check_video_extra()
    from tqdm import tqdm

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
            bar.set_description(f"{name}: {_work_of(report)}", refresh=False)
            bar.update()

        yield show


def _work_of(report: StepReport) -> str:
    """Returns whether a step was dense, sparse or skipped, and what it computed."""
    if report.work == "skipped":
        return "skipped step"
    share = 100 * report.kept_density.mean()
    precision = ", weights alone in FP8" if report.weight_only else ""
    return f"{report.work} step, {share:.0f} % of pairs{precision}"

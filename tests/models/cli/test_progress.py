"""The progress bar on a terminal that keeps what is written."""

import io
import sys
import time

import numpy as np

from models.cli.progress import progress_bar
from models.diffusion.results import StepReport


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_bar_says_what_each_step_is(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    steps = [("dense", 1.0), ("sparse", 0.25), ("skipped", 0.0), ("sparse", 0.5)]
    with progress_bar("sparse", len(steps)) as show:
        for index, (work, share) in enumerate(steps):
            time.sleep(0.12)  # the bar is drawn ten times a second
            show(
                StepReport(
                    index=index,
                    num_steps=len(steps),
                    timestep=500.0,
                    time_ms=120.0,
                    kept_density=np.full(2, share),
                    work=work,
                    weight_only=index == len(steps) - 1,
                    estimate=None,
                )
            )
    shown = sys.stderr.getvalue()
    words = ["dense step, 100 %", "sparse step, 25 %", "skipped step", "step, 50 %"]
    words.append("of pairs, weights alone in FP8")
    places = [shown.index(text) for text in words]
    assert places == sorted(places)

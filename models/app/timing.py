"""How long a run will take, told by the reports of earlier ones."""

import dataclasses
import statistics
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from models.diffusion.sampling import Sampling

Bound = Literal["about", "at least", "at most"]
Mode = Literal["compare", "sparse", "dense"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Expected:
    """Time that the steps of a run are expected to take.

    Attributes:
      seconds: The time, without loading, compiling and decoding.
      bound: Whether it was measured at this size, or at another one: a larger video
        takes at least the share of its size longer.
    """

    seconds: float
    bound: Bound


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Measured:
    """Median time of a dense and of a sparse step at one size, in milliseconds."""

    pixels: int  # of all frames
    guided: bool
    linears: str
    dense: float | None
    sparse: float | None


class TimeBook:
    """Times of steps of one model on this machine.

    Args:
      checkpoint: The model, as reports name it.
      hardware: The machine, as reports describe it; entries that a report lacks are
        not compared.
    """

    def __init__(self, checkpoint: str, hardware: Mapping[str, Any]):
        self._checkpoint = checkpoint
        self._hardware = dict(hardware)
        self._measured: list[_Measured] = []

    def add(self, reports: Iterable[Mapping[str, Any]]) -> None:
        """Takes what reports say of this model on this machine; the last counts most.

        Reports of another form, or that lack something, say nothing.
        """
        for report in reports:
            try:
                if self._is_ours(report):
                    self._measured.append(_read(report))
            except (KeyError, TypeError, ValueError, IndexError):
                continue

    def expect(
        self,
        sampling: Sampling,
        mode: Mode,
        *,
        linears: str = "bfloat16",
        may_skip: bool = False,
    ) -> Expected | None:
        """Returns the time of a run's steps; None if no earlier run tells it.

        Sparse steps that were never measured are taken to be as slow as dense ones,
        and so are the dense steps of a sparse run.

        Args:
          sampling: Settings of the run.
          mode: Which runs are made.
          linears: Precision of linear layers, of which times are their own.
          may_skip: Whether a step cache may skip steps: it takes at most that long.
        """
        pixels = sampling.frames * sampling.height * sampling.width
        kind = sampling.guided, linears
        known = [m for m in self._measured if (m.guided, m.linears) == kind and m.dense]
        if not known:
            return None
        nearest = min(reversed(known), key=lambda m: abs(m.pixels - pixels))
        assert nearest.dense is not None  # those without were left out
        sparse = nearest.dense if nearest.sparse is None else nearest.sparse
        step = {"dense": nearest.dense, "sparse": sparse}
        step["compare"] = nearest.dense + sparse
        seconds = 1e-3 * step[mode] * sampling.num_steps * pixels / nearest.pixels
        bound: Bound = "about"
        if pixels != nearest.pixels:
            bound = "at least" if pixels > nearest.pixels else "at most"
        if may_skip:
            if bound == "at least":
                return None  # more for the size, and less for steps that are skipped
            bound = "at most"
        return Expected(seconds=seconds, bound=bound)

    def _is_ours(self, report: Mapping[str, Any]) -> bool:
        hardware = report["hardware"]
        if not isinstance(hardware, Mapping):
            return False
        return report["checkpoint"] == self._checkpoint and all(
            hardware.get(name, value) == value for name, value in self._hardware.items()
        )


def _read(report: Mapping[str, Any]) -> _Measured:
    sampling = report["sampling"]
    dense: list[float] = []
    sparse: list[float] = []
    for run in (report.get("dense"), report.get("sparse"), report):
        if not isinstance(run, Mapping) or "time_ms_per_step" not in run:
            continue
        shares = run["kept_share_per_step_and_layer"]
        for time_ms, layers in zip(run["time_ms_per_step"], shares, strict=True):
            if max(layers) > 0.0:  # a step cache skips the others
                (dense if min(layers) == 1.0 else sparse).append(float(time_ms))
    return _Measured(
        pixels=sampling["frames"] * sampling["height"] * sampling["width"],
        guided=sampling["guidance"] != 1.0,
        linears=report.get("linears", "bfloat16"),
        dense=statistics.median(dense) if dense else None,
        sparse=statistics.median(sparse) if sparse else None,
    )


def in_words(seconds: int | float) -> str:
    """Returns a time as people say it, such as "40 s", "3 min 20 s" or "2 h 5 min"."""
    seconds = max(1, round(seconds))
    if seconds < 100:
        return f"{seconds} s"
    minutes, rest = divmod(seconds, 60)
    if minutes < 100:
        return f"{minutes} min {rest} s" if rest and minutes < 10 else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"

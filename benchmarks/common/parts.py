"""Records of a benchmark's parts, written as they grow, and the clock of its run."""

import functools
import json
import math
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.common.records import environment, recorded, write_json

Record = dict[str, Any]


class Parts:
    """Parts of one file, each with the environment that it was measured in.

    The file is written anew whenever a part has grown. Parts that it has already stay
    until something of them is measured again: errors alone replace nothing.

    Attributes:
      document: What the file has: facts, `parts` and `summary`.
      measured: The parts of this run.
    """

    def __init__(
        self,
        path: pathlib.Path | None,
        facts: Mapping[str, Any],
        *,
        summarise: Callable[[Mapping[str, Any]], Mapping[str, float]],
        show: Callable[[Record], object] | None = None,
        limit: float = math.inf,
    ) -> None:
        """Reads the parts that the file has.

        Args:
          path: The file; None for none.
          facts: What all parts of a file have in common.
          summarise: Returns the summary of parts.
          show: Returns what of a record is printed; None to print nothing.
          limit: Seconds after which no part begins.

        Raises:
          SystemExit: The file is of other facts.
        """
        self.path, self.limit, self.start = path, limit, time.perf_counter()
        self._summarise, self._show = summarise, show
        self.measured: dict[str, Record] = {}
        self.document: Record = {}
        if path is not None and path.exists():
            self.document = json.loads(path.read_text())
        for name, value in facts.items():
            if (found := self.document.setdefault(name, value)) != value:
                raise SystemExit(
                    f"{path} is of {name} {found!r}, not {value!r}: give another file "
                    "as --output"
                )
        common = self.document.pop("environment", None)
        for record in self.document.setdefault("parts", {}).values():
            record.setdefault("environment", common)

    @property
    def parts(self) -> dict[str, Record]:
        """All parts, those of earlier runs as well."""
        return self.document["parts"]

    @functools.cached_property
    def environment(self) -> Record:
        """That of this run; JAX takes the device for it."""
        return environment()

    def passed_s(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.start

    def left_s(self) -> float:
        """Seconds until the limit."""
        return self.limit - self.passed_s()

    def say(self, text: str) -> None:
        """Prints a line with the time so far."""
        print(f"[{self.passed_s():6.1f} s] {text}", flush=True)

    def keep(self, part: str, record: Record) -> None:
        """Keeps a part's record, prints what is worth it, and writes the file anew."""
        if "environment" not in record:
            record = {"environment": self.environment, **record}
        self.measured[part] = record
        if has_figures(record) or not has_figures(self.parts.get(part, {})):
            self.parts[part] = record
        self.document["summary"] = dict(self._summarise(self.parts))
        if self._show is not None:
            self.say(f"{part}: {json.dumps(self._show(record))}")
        if self.path is not None:
            write_json(self.path, self.document)

    def measure(
        self, part: str, function: Callable[..., None], *arguments: Any
    ) -> None:
        """Measures a part; one that fails, or begins too late, stops no other.

        Args:
          part: Its name.
          function: Takes the arguments, and a function that adds to the record.
          *arguments: Of the function.
        """
        if self.left_s() <= 0:
            not_begun = f"not begun: the limit was {self.limit} s"
            self.say(f"{part}: {not_begun}")
            self.keep(part, {"error": not_begun})
            return
        grown: Record = {}

        def report(record: Record) -> None:
            grown.update(record)
            self.keep(part, dict(grown))

        failure: Record = {}
        with recorded(failure):
            function(*arguments, report)
        if failure:
            report(failure)


def has_figures(record: Mapping[str, Any]) -> bool:
    """Returns whether a part, or one of its cases, has more than an error."""
    own = {
        name: x for name, x in record.items() if name not in ("environment", "error")
    }
    return any(
        has_figures(value) if isinstance(value, Mapping) else True
        for value in own.values()
    )

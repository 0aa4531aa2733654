"""Earlier runs in the outputs folder, read from their reports."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from models.media.run_folder import REPORT

MOST_RUNS = 200  # that a page lists, the newest
_MOST_REPORT_BYTES = 2**24


@dataclasses.dataclass(frozen=True, kw_only=True)
class EarlierRun:
    """One run of `generate` that lies in the outputs folder.

    Attributes:
      folder: Its folder.
      name: The folder's name below the outputs folder.
      report: What its report says.
    """

    folder: Path
    name: str
    report: dict[str, Any]

    @property
    def title(self) -> str:
        """The run in a line: when, what, and how sparse."""
        sampling = self.report.get("sampling", {})
        parts = [
            str(self.report.get("date", ""))[:16].replace("T", " "),
            str(self.report.get("prompt", self.name)),
            f"seed {sampling.get('seed')}, {self.kind}",
        ]
        return " · ".join(part for part in parts if part)

    @property
    def kind(self) -> str:
        """How attention was computed, and how sparse."""
        if self.report.get("attention") == "dense":
            return "dense"
        draft = self.report.get("draft", {})
        kind = f"{draft.get('selection')} at sparsity {draft.get('sparsity')}"
        return f"dense and {kind}" if "psnr_db" in self.report else kind


def list_runs(outputs: Path) -> list[EarlierRun]:
    """Returns the runs in folders of the folder, and one level below, newest first.

    A folder whose report is missing or damaged is no run.
    """
    found = []
    for file in _reports(outputs):
        with contextlib.suppress(OSError, ValueError):
            modified = file.stat().st_mtime
            if file.stat().st_size > _MOST_REPORT_BYTES:
                continue
            report = json.loads(file.read_text(encoding="utf-8"))
            if isinstance(report, dict) and "prompt" in report:
                name = file.parent.relative_to(outputs).as_posix()
                run = EarlierRun(folder=file.parent, name=name, report=report)
                found.append((modified, name, run))
    return [run for _, _, run in sorted(found, key=lambda each: each[:2])[::-1]][
        :MOST_RUNS
    ]


def _reports(outputs: Path) -> Iterator[Path]:
    """Yields reports of runs and of runs of several seeds; links are left out."""
    for depth in ("*", "*/*"):
        with contextlib.suppress(OSError):
            for folder in outputs.glob(depth):
                file = folder / REPORT
                links = map(os.path.islink, (folder.parent, folder, file))
                if not any(links) and file.is_file():
                    yield file


def reserve_folder(outputs: Path, name: str) -> Path:
    """Makes a new folder for a run, which no other run has.

    Args:
      outputs: The outputs folder.
      name: Name of the run; the second of the same settings gets "-2" after it.
    """
    count = 1
    while True:
        folder = outputs / (name if count == 1 else f"{name}-{count}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            count += 1
        else:
            return folder

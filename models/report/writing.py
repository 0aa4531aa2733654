"""Writes the page of a run, or of two earlier runs side by side.

A page has everything in it: videos, settings, times, and the explorer of draft maps.
Where that would be too large, videos become previews with links to the files beside it.
"""

import base64
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models.files import write_whole
from models.media.metrics import finite_or_null, psnr, psnr_per_frame
from models.media.run_folder import PAGE, REPORT
from models.media.video import encode_preview, read_json, read_mp4
from models.report.page import read_page, render_page

MOST_BYTES = 60_000_000  # of a page
LABELS = {"dense.mp4": "Dense", "sparse.mp4": "Sparse", "video.mp4": "Video"}
_FRAME_BYTES = 300_000  # of a page: its viewer, settings and numbers


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """A run as its page shows it.

    Attributes:
      report: Content of its report.json.
      videos: Files, the dense one first.
      explorer: Draft maps, from `explorer_data`; None without.
    """

    report: dict[str, Any]
    videos: tuple[Path, ...] = ()
    explorer: dict[str, Any] | None = None


def write_report(
    path: Path,
    report: dict[str, Any],
    *,
    videos: Sequence[str] = (),
    explorer: dict[str, Any] | None = None,
    most_bytes: int = MOST_BYTES,
) -> None:
    """Writes the page of one run.

    Args:
      path: HTML file to write.
      report: Content of the run's report.json: settings, times and kept shares.
      videos: Names of files beside the page, a dense one first; see `LABELS`.
      explorer: From `explorer_data`; None if nothing was recorded.
      most_bytes: Bytes that the page may take.

    Raises:
      FileNotFoundError: A video is missing.
      ValueError: A number of the report is infinite or NaN.
    """
    files = tuple(path.parent / name for name in videos)
    run = Run(report=report, videos=files, explorer=explorer)
    pairs = [_own_pair(run, 0)] if len(files) == 2 else []
    _write(path, [run], pairs, title=str(report["prompt"]), most_bytes=most_bytes)


def write_comparison(
    path: Path, first: Path, second: Path, *, most_bytes: int = MOST_BYTES
) -> None:
    """Writes a page that shows two earlier runs side by side.

    Their last videos, which are the sparse ones if there are two, are compared frame by
    frame if both have the same size and length.

    Args:
      path: HTML file to write.
      first: Folder of a run.
      second: Folder of another run.
      most_bytes: Bytes that the page may take.

    Raises:
      FileNotFoundError: A folder has no report.json.
      ValueError: A report.json is damaged, or is not that of a run.
    """
    runs = [read_run(first), read_run(second)]
    counts = [len(run.videos) for run in runs]
    pairs = []
    if all(counts):
        pairs.append(_pair_of_runs(runs, counts))
    for start, run in zip((0, counts[0]), runs, strict=True):
        if len(run.videos) == 2:
            pairs.append(_own_pair(run, start))
    title = " / ".join(str(run.report["prompt"]) for run in runs)
    _write(path, runs, pairs, title=title, most_bytes=most_bytes)


def read_run(folder: Path) -> Run:
    """Reads what `draft-video generate` has left in a folder.

    Raises:
      FileNotFoundError: There is no report.json.
      ValueError: It is damaged, or is not that of a run.
    """
    file = folder / REPORT
    if not file.is_file():
        raise FileNotFoundError(
            f"folder {folder} has no {REPORT}; expected one that draft-video generate "
            "has written"
        )
    report = read_json(file)
    if "prompt" not in report:
        raise ValueError(f"{file} is not the report of a run: it has no prompt")
    page, explorer = folder / PAGE, None
    if page.is_file():
        explorer = read_page(page.read_text("utf-8")).get("explorer-0")
    videos = (folder / name for name in LABELS)
    return Run(
        report=report,
        videos=tuple(video for video in videos if video.is_file()),
        explorer=explorer,
    )


def _own_pair(run: Run, start: int) -> dict[str, Any]:
    keys = ("psnr_db", "psnr_db_per_frame", "ssim")
    measures = {key: run.report.get(key) for key in keys}
    return {
        "left": start,
        "right": start + 1,
        "of": "before compression",
        **measures,
    }


def _pair_of_runs(runs: list[Run], counts: list[int]) -> dict[str, Any]:
    pair = {"left": counts[0] - 1, "right": sum(counts) - 1, "of": "as compressed"}
    left, right = (read_mp4(run.videos[-1]) for run in runs)
    if left.shape != right.shape:
        note = "The videos differ in size or length: no difference is shown."
        return pair | {"note": note}
    one, other = (video.astype(np.float32) / 255 for video in (left, right))
    return pair | {
        "psnr_db": finite_or_null([psnr(other, one)])[0],
        "psnr_db_per_frame": finite_or_null(psnr_per_frame(other, one)),
    }


def _write(
    path: Path,
    runs: list[Run],
    pairs: list[dict[str, Any]],
    *,
    title: str,
    most_bytes: int,
) -> None:
    """Writes runs with as much of their videos as fits."""
    elements: dict[str, Any] = {"report": {}}
    room = most_bytes - _FRAME_BYTES
    for index, run in enumerate(runs):
        if run.explorer is not None:
            elements[f"explorer-{index}"] = run.explorer
            room -= len(json.dumps(run.explorer))
        room -= len(json.dumps(run.report))
    files = [(index, file) for index, run in enumerate(runs) for file in run.videos]
    whole = sum(_as_text(file.stat().st_size) for _, file in files) <= room
    videos: list[dict[str, Any]] = []
    for index, file in files:
        content = file.read_bytes() if whole else None
        if content is None:
            most = max(room, 0) // len(files) * 3 // 4
            content = encode_preview(file, most_bytes=most)
        if content is not None:
            data = base64.b64encode(content).decode("ascii")
            elements[f"video-{len(videos)}"] = data
        videos.append(
            _video_entry(file, runs[index], index, path)
            | {"shown": "none" if content is None else "whole" if whole else "preview"}
        )
    elements["report"] = {
        "format": 1,
        "title": title,
        "runs": [{"report": run.report} for run in runs],
        "videos": videos,
        "pairs": pairs,
    }
    write_whole(path, render_page(title, elements))


def _video_entry(file: Path, run: Run, index: int, page: Path) -> dict[str, Any]:
    sampling = run.report["sampling"]
    return {
        "run": index,
        "label": LABELS[file.name],
        "frames": sampling["frames"],
        "size": [sampling["width"], sampling["height"]],
        "fps": run.report.get("fps"),
        # Files of other runs lie where a page cannot know.
        "file": file.name if file.parent == page.parent else None,
    }


def _as_text(size: int) -> int:
    """Returns how long so many bytes are in base64."""
    return 4 * -(-size // 3)

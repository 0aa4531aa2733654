"""`draft-video generate`: a video from a prompt, and dense against sparse."""

import argparse
import contextlib
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from draft_jax import AttentionPlan
from models.cli import options, outputs
from models.cli.caching import cache_from
from models.cli.latents import keep_latents
from models.cli.mesh import joined_processes, mesh_from
from models.cli.model import Request, read_request
from models.cli.progress import progress_bar
from models.cli.report import device_details
from models.diffusion.caches import StepCache
from models.diffusion.comparison import Comparison, run_report
from models.diffusion.dtypes import choose_linears
from models.diffusion.pipeline import VideoPipeline
from models.diffusion.recording import AttentionRecorder
from models.diffusion.results import DecodingError, GenerationResult, StepReport
from models.files import MissingFilesError
from models.media import metrics, plots
from models.media import video as video_io
from models.media.run_folder import KEPT_SHARE, PAGE, REPORT, RunFolder
from models.report.explorer import explorer_data
from models.report.writing import LABELS, write_report

# Takes what is shown before the bar and the number of steps; gives the callback.
Progress = Callable[[str, int], AbstractContextManager[Callable[[StepReport], None]]]
_DENSE, _DRAFT = {"attention": "dense"}, {"attention": "draft"}  # of one video


def run(arguments: argparse.Namespace) -> None:
    """Generates and writes; everything that can be wrong is checked first."""
    with joined_processes(mesh_from(arguments), arguments):
        _run(arguments)


def _run(arguments: argparse.Namespace) -> None:
    video_io.check_video_extra()
    video_io.check_ffmpeg()
    _check_options(arguments)
    folder = getattr(arguments, "output", None)
    folders = []
    if folder is None:
        outputs.check_writable(outputs.FOLDER)
    else:
        seeds = getattr(arguments, "seeds", ())
        folders = outputs.folders_of_seeds(folder, seeds)
        _check_folders(folders, arguments)
    requests = read_run(arguments).for_each_seed()
    if folder is None:
        names = [
            outputs.run_name(arguments, each.sampling, each.info.published)
            for each in requests
        ]
        folders = [outputs.FOLDER / name for name in names]
        _check_folders(folders, arguments)
    details = [each.details() for each in requests]
    for line in requests[0].describe():
        print(line)
    pipeline = requests[0].load()
    for each in details:
        each["hardware"] |= device_details()
        each["linears"] = choose_linears(arguments.linears)
    missing: dict[Path, Exception] = {}
    for folder, request, each in zip(folders, requests, details, strict=True):
        try:
            make_run(RunFolder(folder), pipeline, request, each)
        except MissingFilesError as error:
            missing |= error.reasons
            if any(path.suffix == ".mp4" for path in error.reasons):
                break  # a full disk, say: other seeds would run for nothing
    if missing:
        raise MissingFilesError(missing) from next(iter(missing.values()))


def _check_folders(folders: list[Path], arguments: argparse.Namespace) -> None:
    for folder in folders:
        outputs.check_run_folder(folder, overwrite=arguments.overwrite)


def read_run(arguments: argparse.Namespace) -> Request:
    """Checks all about a run but where it is written; see `read_request`.

    Raises:
      CheckpointError: As `read_request`.
      OSError: As `read_request`; or ratios of a step cache cannot be read.
      ValueError: As `read_request`; or the draft's or the step cache's settings are
        wrong, or videos of the size cannot be written or compared.
    """
    _check_options(arguments)
    request = read_request(arguments)
    cache_from(arguments, request.info, request.sampling)
    height, width = request.sampling.height, request.sampling.width
    if arguments.compare:
        metrics.check_ssim_size(height, width)
        width *= 2
    video_io.check_frame_size(height, width)
    return request


def _check_options(arguments: argparse.Namespace) -> None:
    """Checks what needs no model."""
    options.draft_from(arguments)
    if arguments.fps is not None:
        video_io.check_fps(arguments.fps)


def make_run(
    files: RunFolder,
    pipeline: VideoPipeline,
    request: Request,
    details: dict[str, Any],
    progress: Progress = progress_bar,
) -> None:
    """Makes and writes what one seed gives, bit for bit as it would alone.

    Args:
      files: The folder.
      pipeline: The model.
      request: Settings, of which the seed in `sampling` is taken.
      details: Entries to put in front of the report.
      progress: Shows each step. Its callback may raise `StopGeneration`: what was
        computed is written.

    Raises:
      MissingFilesError: Some of the files could not be written. A video that could not
        be decoded is such; its latents are in their place.
    """
    details = details | {"fps": _fps(pipeline, request)}
    make = _compare if request.arguments.compare else _make_video
    try:
        # Which video is missing, and why, is said when `files` is left.
        with files, contextlib.suppress(DecodingError):
            make(files, pipeline, request, details, progress)
    finally:  # also if something went wrong later: they are what was computed
        for file in files.written:
            print(file, flush=True)


def _generate(
    pipeline: VideoPipeline,
    request: Request,
    attention: AttentionPlan,
    progress: Progress,
    recorder: AttentionRecorder | None = None,
    cache: StepCache | None = None,
) -> GenerationResult:
    arguments, sampling = request.arguments, request.sampling
    name = "dense" if attention.is_dense else "sparse"
    if len(getattr(arguments, "seeds", ())) > 1:
        name += f", seed {sampling.seed}"
    with progress(name, sampling.num_steps) as callback:
        return pipeline.generate(
            arguments.prompt,
            sampling,
            image=request.image,
            attention=attention,
            guidance_batching=arguments.guidance_batching,
            cache=cache,
            callback=callback,
            recorder=recorder,
        )


def _compare(
    files: RunFolder,
    pipeline: VideoPipeline,
    request: Request,
    details: dict[str, Any],
    progress: Progress,
) -> None:
    """Makes and writes a dense and a sparse video; the first before the second."""
    fps, recorder = details["fps"], AttentionRecorder()
    with keep_latents(files, "video.mp4", request, details | _DENSE):
        dense = _generate(pipeline, request, AttentionPlan.dense(), progress)
    if dense.stopped:  # there will be nothing to compare it with
        _write_video(files, request, details | _DENSE, dense, recorder)
        return
    video = functools.partial(video_io.write_mp4, video=dense.video[0], fps=fps)
    files.write("dense.mp4", video)
    plan, cache = _draft_plan(request), request.cache
    with keep_latents(files, "sparse.mp4", request, details | _DRAFT):
        sparse = _generate(pipeline, request, plan, progress, recorder, cache)
    comparison = Comparison(dense=dense, sparse=sparse)
    for name, writer in comparison.writers(fps=fps, details=details).items():
        files.write(name, writer)
    _write_page(files, lambda: details | comparison.report(), recorder, sparse)
    print(_times("dense", dense))
    print(_times("sparse", sparse))
    if files.path / REPORT in files.written:  # else its numbers failed, or the disk
        print(_difference(comparison.report()))


def _make_video(
    files: RunFolder,
    pipeline: VideoPipeline,
    request: Request,
    details: dict[str, Any],
    progress: Progress,
) -> None:
    attention, kind = _draft_plan(request), _DRAFT
    if request.arguments.dense:
        attention, kind = AttentionPlan.dense(), _DENSE
    recorder, cache, details = AttentionRecorder(), request.cache, details | kind
    with keep_latents(files, "video.mp4", request, details):
        result = _generate(pipeline, request, attention, progress, recorder, cache)
    _write_video(files, request, details, result, recorder)


def _write_video(
    files: RunFolder,
    request: Request,
    details: dict[str, Any],
    result: GenerationResult,
    recorder: AttentionRecorder,
) -> None:
    video = functools.partial(
        video_io.write_mp4, video=result.video[0], fps=details["fps"]
    )
    files.write("video.mp4", video)
    if details["attention"] == "draft" or result.skipped.any():
        picture = functools.partial(
            plots.plot_kept_share,
            kept_density=result.kept_density,
            timesteps=result.timesteps,
            title=request.arguments.prompt,
            extra_work=result.extra_work,
            skipped=result.skipped,
        )
        files.write(KEPT_SHARE, picture)

    report = details | run_report(result)
    files.write(REPORT, functools.partial(video_io.write_json, content=report))
    _write_page(files, lambda: report, recorder, result)
    print(_times("video", result))


def _write_page(
    files: RunFolder,
    report: Callable[[], dict[str, Any]],
    recorder: AttentionRecorder,
    result: GenerationResult,
) -> None:
    """Writes the page that shows the videos that were written before it."""

    def write(path: Path) -> None:
        record = recorder.record()
        write_report(
            path,
            report(),
            videos=[name for name in LABELS if files.path / name in files.written],
            explorer=(
                None if record is None else explorer_data(record, result.video[0])
            ),
        )

    files.write(PAGE, write)


def _draft_plan(request: Request) -> AttentionPlan:
    return AttentionPlan.draft(*request.draft)


def _fps(pipeline: VideoPipeline, request: Request) -> float:
    fps = request.arguments.fps
    return pipeline.fps if fps is None else fps


def _difference(report: dict[str, Any]) -> str:
    decibel = report["psnr_db"]
    lines = [
        "sparse against dense: "
        + ("equal videos" if decibel is None else f"PSNR {decibel:.1f} dB")
        + f", SSIM {report['ssim']:.3f}",
    ]
    if report["speed_up_of_sparse_steps"] is not None:
        lines.append(
            f"speed: sparse steps {report['speed_up_of_sparse_steps']:.2f} x as fast "
            f"as dense ones, the whole run {report['speed_up_of_all_steps']:.2f} x"
        )
    return "\n".join(lines)


def _times(name: str, result: GenerationResult) -> str:
    return (
        f"{name}: {1e-3 * result.time_ms.sum():.1f} s in {len(result.time_ms)} steps "
        f"(and {1e-3 * result.compile_ms:.1f} s to compile), "
        f"{100 * result.kept_density.mean():.0f} % of token pairs"
        + (
            f", with means and exact rows {100 * result.work_share:.0f} % of the work"
            if result.extra_work
            else ""
        )
    )

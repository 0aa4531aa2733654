"""`draft-video generate`: a video from a prompt, and dense against sparse."""

import argparse
from pathlib import Path

from draft_jax import AttentionPlan
from models.cli import options
from models.cli.model import Request, read_request
from models.cli.progress import progress_bar
from models.diffusion.comparison import Comparison, run_report
from models.diffusion.pipeline import VideoPipeline
from models.diffusion.results import GenerationResult
from models.media import metrics, plots
from models.media import video as video_io


def run(arguments: argparse.Namespace) -> None:
    """Generates and writes; everything that can be wrong is checked first."""
    video_io.check_video_extra()
    sparse = AttentionPlan.draft(*options.draft_from(arguments))
    fps = arguments.fps
    if fps is not None and not 0 < fps < float("inf"):
        raise ValueError(f"--fps {fps} must be a positive, finite number")
    seed = options.sampling_from(arguments).seed
    folder = getattr(arguments, "output", None)
    if folder is None:
        folder = Path("outputs") / f"{options.slug(arguments.prompt)}-{seed}"
    options.check_writable(folder)
    request = read_request(arguments)
    if arguments.compare:
        metrics.check_ssim_size(request.sampling.height, request.sampling.width)
    pipeline = request.load()
    fps = pipeline.fps if fps is None else fps
    if request.image is not None:
        print(request.describe_image())
    if arguments.compare:
        comparison = Comparison(
            dense=_generate(pipeline, request, AttentionPlan.dense()),
            sparse=_generate(pipeline, request, sparse),
        )
        files = comparison.write(folder, fps=fps, details=request.details())
        print(_compare_summary(comparison))
    else:
        attention = AttentionPlan.dense() if arguments.dense else sparse
        result = _generate(pipeline, request, attention)
        files = _write_single(folder, result, request, fps)
        print(_times("video", result))
    for file in files:
        print(file)


def _generate(
    pipeline: VideoPipeline, request: Request, attention: AttentionPlan
) -> GenerationResult:
    arguments, sampling = request.arguments, request.sampling
    name = "dense" if attention.is_dense else "sparse"
    with progress_bar(name, sampling.num_steps) as callback:
        return pipeline.generate(
            arguments.prompt,
            sampling,
            image=request.image,
            attention=attention,
            guidance_batching=arguments.guidance_batching,
            callback=callback,
        )


def _write_single(
    folder: Path, result: GenerationResult, request: Request, fps: float
) -> list[Path]:
    arguments = request.arguments
    (folder / "report.json").unlink(missing_ok=True)  # it describes the files beside it
    files = [folder / "video.mp4"]
    video_io.write_mp4(files[0], result.video[0], fps=fps)
    if not arguments.dense:
        files.append(folder / "kept_share.png")
        plots.plot_kept_share(
            files[-1], result.kept_density, result.timesteps, title=arguments.prompt
        )
    files.append(folder / "report.json")
    attention = "dense" if arguments.dense else "draft"
    report = request.details() | {"attention": attention} | run_report(result)
    video_io.write_json(files[-1], report)
    return files


def _compare_summary(comparison: Comparison) -> str:
    report = comparison.report()
    decibel = report["psnr_db"]
    lines = [
        _times("dense", comparison.dense),
        _times("sparse", comparison.sparse),
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
    )

"""`draft-video decode`: the video of latents that were kept."""

import argparse
import time
from pathlib import Path

from models.cli.tiles import check_tile, with_tiles
from models.diffusion.decoding import KeptLatents, decode_video
from models.diffusion.folders.part_files import PartFiles
from models.diffusion.interfaces import Codec
from models.loading import load_codec
from models.media import video as video_io
from models.media.run_folder import LATENTS, PAGE, REPORT
from models.report.writing import LABELS, write_report


def run(arguments: argparse.Namespace) -> None:
    """Decodes and writes; everything that can be wrong is checked first."""
    video_io.check_video_extra()
    video_io.check_ffmpeg()
    if arguments.vae_tile is not None:
        check_tile(arguments.vae_tile)
    file = arguments.latents
    file = file / LATENTS if file.is_dir() else file
    kept = KeptLatents.read(file)
    if kept.video not in LABELS:
        raise ValueError(f"{file}: {kept.video!r} must be one of {', '.join(LABELS)}")
    names = (kept.video, REPORT, PAGE)
    path, report_file, page = (file.parent / name for name in names)
    for earlier in (path, report_file, page):
        if earlier.exists() and not arguments.overwrite:
            raise FileExistsError(f"{earlier} exists; --overwrite replaces it")
    codec = _load_codec(arguments, kept)
    start = time.perf_counter()
    video = decode_video(codec, kept.latents)[0]
    report = kept.report | {"decode_ms": 1e3 * (time.perf_counter() - start)}
    video_io.write_mp4(path, video, fps=report["fps"])
    print(path, flush=True)
    # In the folder of a comparison they are of this video alone.
    video_io.write_json(report_file, report)
    write_report(page, report, videos=[kept.video])
    print(report_file, page, sep="\n", flush=True)


def _load_codec(arguments: argparse.Namespace, kept: KeptLatents) -> Codec:
    checkpoint, revision = arguments.checkpoint, None
    if checkpoint is None and kept.model["checkpoint"] is not None:
        checkpoint, revision = Path(kept.model["checkpoint"]), kept.model["revision"]
    vae = arguments.vae
    if vae is None and kept.model["vae"] is not None:
        vae = Path(kept.model["vae"])
    codec = load_codec(
        checkpoint,
        files=PartFiles(vae=vae),
        revision=revision,
        tile=arguments.vae_tile,
        dtype=arguments.vae_dtype,
    )
    return with_tiles(codec, arguments)

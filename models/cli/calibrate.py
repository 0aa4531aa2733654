"""`draft-video calibrate`: ratios of a model, by which `--cache mag` skips steps."""

import argparse
from pathlib import Path

import numpy as np

from draft_jax import AttentionPlan
from models.cli import options, outputs
from models.cli.caching import checkpoint_name, expert_starts
from models.cli.model import read_request
from models.cli.progress import progress_bar
from models.cli.report import device_details
from models.diffusion.caches import MagCache, MagRatios, write_ratios
from models.diffusion.calibration import measure_ratios
from models.media import video as video_io


def run(arguments: argparse.Namespace) -> None:
    """Runs the steps of a video, all computed, and writes the ratios."""
    video_io.check_video_extra()
    options.draft_from(arguments)
    seeds = getattr(arguments, "seeds", ())
    if len(seeds) > 1:
        raise ValueError(
            f"--seed {','.join(map(str, seeds))}: calibrate runs once; give one seed"
        )
    path = getattr(arguments, "output", None)
    if path is None:
        outputs.check_writable(outputs.FOLDER)
    else:
        outputs.check_ratios(path, overwrite=arguments.overwrite)
    request = read_request(arguments)
    if path is None:
        name = outputs.run_name(arguments, request.sampling, request.info.published)
        path = outputs.FOLDER / f"{name}-ratios.json"
        outputs.check_ratios(path, overwrite=arguments.overwrite)
    details = request.details()
    pipeline = request.load()
    details["hardware"] |= device_details()
    attention = AttentionPlan.dense()
    if not arguments.dense:
        attention = AttentionPlan.draft(*request.draft)
    with progress_bar("calibrating", request.sampling.num_steps) as callback:
        ratios = measure_ratios(
            pipeline,
            arguments.prompt,
            request.sampling,
            model=checkpoint_name(arguments),
            image=request.image,
            attention=attention,
            guidance_batching=arguments.guidance_batching,
            callback=callback,
        )
    write_ratios(Path(path), ratios, details)
    print(_summary(ratios, expert_starts(request.sampling)))
    print(path)


def _summary(ratios: MagRatios, starts: tuple[int, ...]) -> str:
    """Returns how many steps usual settings would skip."""
    values = np.asarray(ratios.values)[:, 1:]
    lines = []
    if values.size:
        lines.append(f"ratios: {values.min():.5f} to {values.max():.5f}")
    for threshold, most in ((0.06, 2), (0.12, 2), (0.12, 4), (0.24, 6)):
        rule = MagCache(ratios=ratios, threshold=threshold, max_skips=most)
        skipped = rule.skippable(ratios.num_steps, starts).sum()
        lines.append(
            f"--cache mag:{threshold:g},{most} skips {skipped} of {ratios.num_steps}"
        )
    return "\n".join(lines)

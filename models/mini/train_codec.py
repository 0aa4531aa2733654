"""Trains the codec of the model that ships with the project.

    python -m models.mini.train_codec --sources sources.npz --minutes 5 --output codec

The output folder gets `codec.json` and `codec.safetensors`, which `models.mini.train`
reads, and `log.json`; all are written anew every minute. `codec_report.json` says how
well it restores videos that it was not trained on. From `state.npz`, `--resume codec`
goes on where a stopped run was; `--continue-from codec` needs weights and log only.
"""

# Worker processes import this file: what needs JAX is imported inside functions.
import argparse
import dataclasses
import time

from models.mini.stages import Stage, VideoSize
from models.mini.train import (
    add_common_options,
    optimizer_options,
    run_as_asked,
    start_state,
)

SMALL = VideoSize(frames=9, height=96, width=128, batch=32)
LARGE = VideoSize(frames=5, height=256, width=384, batch=8)
DEFAULT_STAGES = (Stage(share=1.0, turns=(*[SMALL] * 3, LARGE)),)
# Videos that the report is about: as many frames as the model makes.
REPORTED = VideoSize(frames=25, height=96, width=128, batch=16)
REPORTED_BATCHES = 4


def main(arguments: list[str] | None = None) -> None:
    """Trains as the command line asks."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(description="Trains the small model's codec.")
    add_common_options(parser)
    options = parser.parse_args(arguments)
    from models.media.video import write_json
    from models.mini.codec_training import (
        CodecConfig,
        CodecTrainer,
        held_out_videos,
        measure_codec,
    )
    from models.mini.data_parallel import DataParallel
    from models.mini.renderer import device_sources
    from models.mini.sources import Sources

    config = CodecConfig(seed=options.seed)
    optimizer = dataclasses.replace(config.optimizer, **optimizer_options(options))
    config = dataclasses.replace(config, optimizer=optimizer)
    trainer = CodecTrainer(
        config,
        device_sources(Sources.load(options.sources)),
        DataParallel.of(options.devices),
    )
    state, progress = start_state(trainer, options.resume, options.continue_from)
    stages = tuple(options.stage or DEFAULT_STAGES)
    state = run_as_asked(trainer, state, progress, stages, options, started)
    videos = held_out_videos(trainer.sources, REPORTED, batches=REPORTED_BATCHES)
    report = measure_codec(trainer.module(state), videos)
    write_json(options.output / "codec_report.json", report)
    print(report, flush=True)


if __name__ == "__main__":
    main()

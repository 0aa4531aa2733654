"""Trains the transformer of the model that ships with the project.

    python -m models.mini.train --sources sources.npz --codec codec --minutes 25 \
        --output outputs/mini

`models.mini.sources` makes sources.npz, `models.mini.train_codec` the folder `codec`.
The output folder gets `weights`, which `MiniCheckpoint.load` and `draft-video
--checkpoint` read, and `log.json`; both are written anew every minute. A stopped run
goes on from `state.npz` exactly where it was, with `--resume outputs/mini`. Where only
`weights` and `log.json` are left, `--continue-from outputs/mini` takes the averaged
weights and starts the optimizer afresh. docs/mini_model.md says how the shipped weights
were made.
"""

# Worker processes import this file: what needs JAX is imported inside functions.
import argparse
import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.files import output_folder
from models.mini.captions import SAMPLE_PROMPTS
from models.mini.stages import Length, Stage, VideoSize

if TYPE_CHECKING:
    from models.mini.codec_training import CodecTrainer
    from models.mini.compilation import Task
    from models.mini.run import Progress
    from models.mini.training import TrainConfig, Trainer

SHEET_PROMPTS = SAMPLE_PROMPTS[:12]  # shown on a contact sheet
SMALL = VideoSize(frames=25, height=96, width=128, batch=32)
SHORT = VideoSize(frames=9, height=96, width=128, batch=96)
LARGE = VideoSize(frames=25, height=256, width=384, batch=8)
DEFAULT_STAGES = (
    Stage(share=0.2, turns=(SHORT,)),
    Stage(share=0.45, turns=(SMALL,)),
    Stage(share=0.35, turns=(*[SMALL] * 4, LARGE)),
)


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of every training: data, length, and what is written when."""
    add = parser.add_argument
    add("--sources", type=Path, required=True, help="what models.mini.sources wrote")
    add("--output", type=output_folder, required=True, help="folder to write to")
    add("--resume", type=Path, help="output folder of a stopped run to go on from")
    add(
        "--continue-from",
        type=Path,
        help="output folder with weights and log.json; the optimizer starts afresh",
    )
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument(
        "--minutes", type=float, help="length of all runs together, as time of stepping"
    )
    length.add_argument("--steps", type=int, help="length, as a number of steps")
    add(
        "--seconds",
        type=float,
        default=float("inf"),
        help="stop this run so long after its start, compilation included",
    )
    add("--save-every", type=float, default=60.0, metavar="SECONDS")
    add(
        "--stage",
        type=Stage.parse,
        action="append",
        metavar="SHARE=FRAMESxHEIGHTxWIDTH*BATCH[*STEPS]+...",
        help="a part of the training, in which sizes take turns; in order",
    )
    add("--learning-rate", type=float)
    add("--warmup-steps", type=int)
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=8, help="processes that draw scenes")
    add(
        "--devices",
        type=int,
        default=1,
        help="GPUs of this machine that share the videos of each step",
    )


def length_of(options: argparse.Namespace) -> Length:
    """Returns the length of the whole training."""
    if options.minutes is None:
        return Length(steps=options.steps)
    return Length(seconds=60.0 * options.minutes)


def optimizer_options(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the fields of `OptimizerConfig` that the command line sets."""
    names = ("learning_rate", "warmup_steps")
    given = {name: getattr(options, name) for name in names}
    return {name: value for name, value in given.items() if value is not None}


def make_parser() -> argparse.ArgumentParser:
    """Makes the parser of the command line."""
    parser = argparse.ArgumentParser(description="Trains the small video model.")
    add_common_options(parser)
    parser.add_argument(
        "--codec",
        type=Path,
        required=True,
        help="folder with codec.json and codec.safetensors, of models.mini.train_codec",
    )
    parser.add_argument(
        "--optimizer",
        choices=("adamw", "muon"),
        default="adamw",
        help="what moves the kernels of the blocks; see OptimizerConfig",
    )
    parser.add_argument(
        "--remat", action="store_true", help="less memory; see TrainConfig"
    )
    parser.add_argument(
        "--sheet",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="draw samples at the end of the run",
    )
    return parser


def make_config(options: argparse.Namespace) -> "TrainConfig":
    """Returns the configuration that the command line asks for."""
    from models.mini.optimization import OptimizerConfig
    from models.mini.training import TrainConfig

    return TrainConfig(
        optimizer=OptimizerConfig(kind=options.optimizer, **optimizer_options(options)),
        seed=options.seed,
        remat=options.remat,
    )


def make_trainer(
    config: "TrainConfig", sources: Path, codec: Path, devices: int
) -> "Trainer":
    """Reads sources and codec."""
    from models.mini.autoencoder import load_autoencoder, read_autoencoder_config
    from models.mini.checkpoint import read_json
    from models.mini.data_parallel import DataParallel
    from models.mini.renderer import device_sources
    from models.mini.scenes import all_captions
    from models.mini.sources import Sources
    from models.mini.text import Vocabulary
    from models.mini.training import Trainer

    stored = read_json(codec / "codec.json")
    autoencoder = read_autoencoder_config(stored, dtype=config.model.dtype)
    return Trainer(
        config,
        Vocabulary.from_captions(all_captions(), max_length=config.model.text_length),
        load_autoencoder(codec / "codec.safetensors", autoencoder),
        device_sources(Sources.load(sources)),
        DataParallel.of(devices),
    )


def start_state(
    trainer: "Trainer | CodecTrainer", resume: Path | None, continue_from: Path | None
) -> tuple[Any, "Progress"]:
    """Returns the state that a run starts from, and its record.

    Args:
      trainer: Structure of the model.
      resume: Folder to go on from exactly, or None.
      continue_from: Folder whose stored weights to go on from, or None.

    Raises:
      ValueError: Both are given, or what is stored is of another model.
    """
    from models.mini.optimization import load_state
    from models.mini.run import Progress

    if resume is not None and continue_from is not None:
        raise ValueError(
            f"--resume {resume} and --continue-from {continue_from} exclude each other"
        )
    if continue_from is not None:
        progress = Progress.read(continue_from)
        progress.starts.append(progress.steps)
        return trainer.state_of_weights(continue_from, progress.steps), progress
    state: Any = trainer.initial_state()
    if resume is None:
        return state, Progress()
    state, stored = load_state(resume, state)
    return state, Progress(**stored)


def run_as_asked(
    task: "Task",
    state: Any,
    progress: "Progress",
    stages: tuple[Stage, ...],
    options: argparse.Namespace,
    started: float,
) -> Any:
    """Trains as the common options ask, and writes all that a later run may need.

    Args:
      task: Model and data.
      state: State to start from.
      progress: Its record, which goes on.
      stages: Parts of the training, in order.
      options: Of `add_common_options`.
      started: Moment of `time.monotonic` from which `--seconds` count.

    Returns:
      The state at the end.
    """
    from models.mini.optimization import save_state
    from models.mini.run import Run

    run = Run(
        task,
        stages,
        length_of(options),
        options.output,
        workers=options.workers,
        progress=progress,
    )
    deadline = started + options.seconds
    state = run.train(state, deadline=deadline, save_every=options.save_every)
    run.save(state)
    save_state(options.output, state, dataclasses.asdict(progress))
    print(f"{progress.steps} steps, {progress.seconds:.0f} s of stepping", flush=True)
    return state


def main(arguments: list[str] | None = None) -> None:
    """Trains as the command line asks."""
    started = time.monotonic()
    options = make_parser().parse_args(arguments)
    from models.mini.samples import contact_sheet

    trainer = make_trainer(
        make_config(options), options.sources, options.codec, options.devices
    )
    state, progress = start_state(trainer, options.resume, options.continue_from)
    stages = tuple(options.stage or DEFAULT_STAGES)
    state = run_as_asked(trainer, state, progress, stages, options, started)
    if options.sheet:
        size = stages[-1].turns[0]
        contact_sheet(
            trainer.checkpoint(state.ema),
            SHEET_PROMPTS,
            options.output / f"samples_{progress.steps:06}.png",
            frames=size.frames,
            height=size.height,
            width=size.width,
        )


if __name__ == "__main__":
    main()

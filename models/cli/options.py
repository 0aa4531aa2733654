"""Options that several commands share, and the objects they stand for."""

import argparse
import dataclasses
import os
import platform
import re
import shlex
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, get_args

from draft_jax.config import DraftConfig, Pooling, Selection
from draft_jax.schedule import SparsitySchedule
from models.diffusion.sampling import WAN_PIXELS, Sampling
from models.diffusion.schedulers import EulerGrid, SolverName, UniPCGrid

_SAMPLING = Sampling()
_DRAFT = DraftConfig()
_SLUG_LENGTH = 48
_VERSIONS = ("jax", "jaxlib", "flax", "numpy")
_GRIDS: dict[str, tuple[str, ...]] = {
    "euler": get_args(EulerGrid),
    "unipc": get_args(UniPCGrid),
}
# Wrapped here: the formatter leaves descriptions as they are.
_DEFAULTS_OF_MODELS = """\
Defaults of the shipped model are in brackets. A Wan model takes those of Wan's
own code for its kind: 81 frames at 480p (1.3B) or 720p (14B; for I2V-14B-480P
give --size 480p), guidance 5, unipc; from text 50 steps and shift 5, from an
image 40 steps and shift 5, or 3 at 480p. In the diffusers layout solver, grid
and shift are those of the folder's scheduler, the shift at every size.
"""


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows defaults that say something, and examples as they were written."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        empty = isinstance(default, Sequence) and not default
        if empty or any(default is value for value in (argparse.SUPPRESS, None, False)):
            return action.help  # the seed 0 is shown
        return f"{action.help} (default: %(default)s)"


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """What is sampled: `Sampling`. What is not given depends on the checkpoint."""
    group = parser.add_argument_group(
        "video",
        _DEFAULTS_OF_MODELS,
    )

    def add(name: str, shipped: object, help: str, **options: Any) -> None:
        note = "" if shipped == "" else f" [{shipped}]"
        options.setdefault("default", argparse.SUPPRESS)
        group.add_argument(name, help=help + note, **options)

    size = f"{_SAMPLING.width}x{_SAMPLING.height}"
    add("--seed", _SAMPLING.seed, "of the noise", type=int)
    add("--steps", _SAMPLING.num_steps, "sampler steps", type=int, dest="num_steps")
    add(
        "--size",
        size,
        "width x height in pixels, multiples of 8 for the shipped model, of 16 for "
        "Wan; 480p is 832x480, 720p is 1280x720",
        type=parse_size,
        metavar="WxH",
    )
    add(
        "--frames",
        _SAMPLING.frames,
        "frames, a multiple of 2 for the shipped model, 4 n + 1 for Wan",
        type=int,
    )
    add(
        "--guidance",
        _SAMPLING.guidance,
        "strength of classifier-free guidance; 1 turns it off",
        type=float,
    )
    add(
        "--shift",
        _SAMPLING.shift,
        "shift of the noise levels; above 1 spends more steps at high noise",
        type=float,
    )
    add(
        "--solver",
        _SAMPLING.solver,
        "how a step moves the sample; unipc is the solver of Wan",
        choices=get_args(SolverName),
    )
    add(
        "--grid",
        _GRIDS[str(_SAMPLING.solver)][0],
        "whose noise levels: wan (Wan's own) or diffusers for unipc, linear or "
        "diffusers for euler; for a solver other than the checkpoint's wan and linear",
        choices=sorted({name for names in _GRIDS.values() for name in names}),
    )
    add(
        "--negative-prompt",
        _SAMPLING.negative_prompt,
        "what guidance leads away from",
        metavar="TEXT",
    )


def add_draft_options(parser: argparse.ArgumentParser) -> None:
    """What draft attention computes: `DraftConfig` and `SparsitySchedule`."""
    group = parser.add_argument_group("draft attention")
    group.add_argument(
        "--sparsity",
        type=float,
        default=_DRAFT.sparsity,
        help="share of block pairs that sparse steps skip, in [0, 1)",
    )
    group.add_argument(
        "--selection",
        choices=get_args(Selection),
        default=_DRAFT.selection,
        help="how blocks are chosen from the draft map",
    )
    group.add_argument(
        "--pooling",
        choices=get_args(Pooling),
        default=_DRAFT.pooling,
        help="how a tile becomes one draft token",
    )
    group.add_argument(
        "--top-p",
        type=float,
        default=_DRAFT.top_p,
        metavar="P",
        help="probability mass to keep; read by --selection top_p",
    )
    group.add_argument(
        "--dense-fraction",
        type=float,
        default=SparsitySchedule.paper().dense_fraction,
        metavar="SHARE",
        help="first share of the steps that stays dense",
    )
    group.add_argument(
        "--dense-layers",
        type=parse_indices,
        default=(),
        metavar="I,J",
        help="layers that are always dense, counted from 0",
    )
    group.add_argument(
        "--mask-refresh",
        type=int,
        default=1,
        metavar="N",
        help="recompute masks on every N-th sparse step and reuse them in between",
    )


def sampling_from(
    arguments: argparse.Namespace, default: Sampling | None = None
) -> Sampling:
    """The `Sampling` that the options describe, and the default where they are silent.

    Args:
      arguments: The parsed command line.
      default: Of the checkpoint. None while it is not known: that of the shipped model
        then, and a grid without a solver is not looked at.

    Raises:
      ValueError: A value is out of range, or the solver has no such grid.
    """
    fields = {field.name for field in dataclasses.fields(Sampling)}
    given = {name: value for name, value in vars(arguments).items() if name in fields}
    if "size" in arguments:
        given["width"], given["height"] = arguments.size
    if default is None and "solver" not in given:
        given.pop("grid", None)
    default = _SAMPLING if default is None else default
    solver = given.get("solver", default.solver)
    if solver != default.solver:
        given.setdefault("grid", None)
    grid = given.get("grid")
    if grid is not None and grid not in _GRIDS[solver]:
        raise ValueError(
            f"--grid {grid} is none of the solver {solver}, which has "
            f"{' and '.join(_GRIDS[solver])}"
        )
    return dataclasses.replace(default, **given)


def draft_from(arguments: argparse.Namespace) -> tuple[DraftConfig, SparsitySchedule]:
    """The `DraftConfig` and `SparsitySchedule` that the options describe."""
    config = DraftConfig(
        pooling=arguments.pooling,
        selection=arguments.selection,
        sparsity=arguments.sparsity,
        top_p=arguments.top_p,
    )
    schedule = SparsitySchedule(
        dense_fraction=arguments.dense_fraction,
        dense_layers=arguments.dense_layers,
        mask_refresh=arguments.mask_refresh,
    )
    return config, schedule


def parse_size(text: str) -> tuple[int, int]:
    """Width and height of "WxH", or of a name such as "480p", which is wide."""
    if text in WAN_PIXELS:
        height, width = WAN_PIXELS[text]
        return width, height
    match = re.fullmatch(r"(\d+)[xX](\d+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be WIDTHxHEIGHT in pixels, such as 128x96, or one of "
            f"{', '.join(WAN_PIXELS)}"
        )
    return int(match[1]), int(match[2])


def parse_lora(text: str) -> tuple[Path, float]:
    """File and strength of "FILE:STRENGTH"; the strength is 1 if left out."""
    name, _, strength = text.rpartition(":")
    try:
        return (Path(name), float(strength)) if name else (Path(text), 1.0)
    except ValueError:
        return Path(text), 1.0


def parse_indices(text: str) -> tuple[int, ...]:
    """Numbers of "0,3,5"; an empty text is none."""
    if not re.fullmatch(r"(\d+(,\d+)*)?", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} must be numbers from 0 with commas between, such as 0,3"
        )
    return tuple(int(part) for part in text.split(",") if part)


def slug(prompt: str) -> str:
    """A prompt as part of a file name."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")
    return words[:_SLUG_LENGTH].rstrip("-") or "video"


def check_writable(folder: Path) -> None:
    """Raises before any compute if `folder` cannot be made or written to.

    Raises:
      OSError: Names the folder that is in the way.
    """
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"--output {folder}: {existing} is not a folder")
    try:  # permissions alone do not tell of a read-only or special file system
        tempfile.TemporaryDirectory(dir=existing).cleanup()
    except OSError as error:
        raise OSError(
            f"--output {folder}: {existing} cannot be written to ({error.strerror})"
        ) from error


def run_details(arguments: argparse.Namespace, sampling: Sampling) -> dict[str, Any]:
    """What a reader of a report needs to repeat the run."""
    import jax

    from models.cli.entry import package_version

    config, schedule = draft_from(arguments)
    device = jax.devices()[0]
    checkpoint = arguments.checkpoint
    return {
        "prompt": arguments.prompt,
        "command": command_line(arguments.argv),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "checkpoint": "shipped" if checkpoint is None else str(checkpoint),
        "sampling": dataclasses.asdict(sampling),
        "loras": [[str(path), strength] for path, strength in arguments.lora],
        "draft": dataclasses.asdict(config),
        "schedule": dataclasses.asdict(schedule),
        "hardware": {
            "platform": device.platform,
            "device": device.device_kind,
            "processor": processor_name(),
            "cpu_cores": len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count(),
        },
        "versions": {
            "draft-attention-jax": package_version(),
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in _VERSIONS},
        },
    }


def command_line(argv: Sequence[str]) -> str:
    """The command as one would type it."""
    return shlex.join(["draft-video", *argv])


def processor_name() -> str:
    """Name of the processor as the system tells it."""
    information = Path("/proc/cpuinfo")
    if information.is_file():
        match = re.search(r"^model name\s*: (.*)$", information.read_text(), re.M)
        if match is not None:
            return match[1]
    return platform.processor() or platform.machine()

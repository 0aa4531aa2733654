"""The options of all commands and their help, made without importing jax.

Everything here is plain data and text; `options` and `model` turn what was parsed
into the objects that it stands for.
"""

import argparse
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from models.cli import choices
from models.cli.app_options import add_app
from models.cli.cache_options import add_cache_options
from models.cli.decode_options import add_decode
from models.cli.draft_options import add_draft_options
from models.cli.mesh_options import add_mesh_options
from models.cli.messages import EXIT_BAD_INPUT, one_line
from models.cli.model_options import add_model_options
from models.cli.pair_options import add_pair_options, parse_indices
from models.cli.speed import add_speed_option, settle
from models.cli.version import package_version

_SAMPLING = choices.SamplingDefaults()
_GENERATE_EXAMPLES = """examples:
  draft-video generate "a red ball bounces over a blue sea"
  draft-video generate "a red ball bounces" --compare --sparsity 0.9
  draft-video generate "a green box turns" --dense --seed 7 --output outputs/box
  draft-video generate "a red ball bounces" --compare --cache easy:0.1,4
  draft-video generate "a red ball bounces" --compare --speed fast
  draft-video generate "a cat" --size 192x128 --frames 33 --mask-refresh 4
  draft-video generate "a cat" --checkpoint DIR --size 720p --frames 81
  draft-video generate "it turns" --checkpoint DIR --image cat.jpg --size 480p
  draft-video generate "a cat" --checkpoint DIR --mesh sequence=2,guidance=2
"""
_INSPECT_EXAMPLES = """examples:
  draft-video inspect "a red ball bounces over a blue sea"
  draft-video inspect "a red ball bounces" --step 12 --layers 0,3,7 --heads 0
  draft-video inspect "a green box" --sparsity 0.9 --selection row_topk
"""
_CALIBRATE_EXAMPLES = """examples:
  draft-video calibrate "a red ball bounces over a blue sea" --output ratios.json
  draft-video generate "a green box" --cache mag:0.12,2 --cache-ratios ratios.json
"""
# Wrapped here: the formatter leaves descriptions as they are.
_DEFAULTS_OF_MODELS = """\
Defaults of the shipped model are in brackets. A Wan model takes those of Wan's
own code for its kind: 81 frames at 480p (1.3B) or 720p (14B; for I2V-14B-480P
give --size 480p), guidance 5, unipc; from text 50 steps and shift 5, from an
image 40 steps and shift 5, or 3 at 480p. In the diffusers layout solver, grid
and shift are those of the folder's scheduler, the shift at every size.
HunyuanVideo takes its own: 129 frames at 720p, 50 steps, guidance 1 (off),
embedded guidance 6, euler with shift 7.
"""


class UsageError(SystemExit):
    """The options are not such as the parser takes.

    Attributes:
      message: What is wrong with them.
      line: The same for a terminal, with the command in front.
    """

    def __init__(self, command: str, message: str):
        super().__init__(EXIT_BAD_INPUT)
        self.message = message
        self.line = f"{command}: error: {message}"


class OneLineParser(argparse.ArgumentParser):
    """Reports errors in one line, without repeating the usage."""

    def error(self, message: str) -> NoReturn:
        """Raises what makes one line on a terminal.

        Raises:
          UsageError: Always.
        """
        if message.startswith("unrecognized arguments") and " -" not in message:
            message += " (put the prompt in quotes)"
        raise UsageError(self.prog, one_line(message))


class _CommandParser(OneLineParser):
    """The parser of all commands, after which no option of a model is left open."""

    def parse_args(self, *args: Any, **options: Any) -> Any:
        arguments = super().parse_args(*args, **options)
        settle(arguments)
        return arguments


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows defaults that say something, and examples as they were written."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        empty = isinstance(default, Sequence) and not default
        if empty or any(default is value for value in (argparse.SUPPRESS, None, False)):
            return action.help  # the seed 0 is shown
        return f"{action.help} (default: %(default)s)"


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of all commands; `command` is the name of the chosen one."""
    parser = _CommandParser(
        prog="draft-video",
        description="Generates videos with draft attention (block-sparse attention "
        "guided by a low-resolution draft) and shows what it skips.",
        epilog="Each command has its own --help, with examples.",
    )
    version = f"draft-video {package_version()}, Python {platform.python_version()}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(
        title="commands",
        metavar="COMMAND",
        dest="command",
        required=True,
        parser_class=OneLineParser,
    )
    _add_generate(commands)
    _add_inspect(commands)
    _add_calibrate(commands)
    add_decode(commands, formatter_class=HelpFormatter)
    add_app(commands, formatter_class=HelpFormatter)
    return parser


def _add_generate(commands: Any) -> None:
    parser = commands.add_parser(
        "generate",
        help="make a video from a prompt",
        description="Makes a video from a prompt and writes it with a report.",
        epilog=_GENERATE_EXAMPLES,
        formatter_class=HelpFormatter,
    )
    _add_prompt(parser)
    add_model_options(parser)
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        default=argparse.SUPPRESS,
        help="folder to write to (default: outputs/<prompt>-<seed>-<hash of all "
        "settings>)",
    )
    _add_overwrite(parser, "the files of an earlier run in the folder")
    parser.add_argument(
        "--fps",
        type=float,
        help="frames per second (default: those the model was trained on)",
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--dense", action="store_true", help="full attention on every step"
    )
    mode.add_argument(
        "--compare",
        action="store_true",
        help="run dense and sparse from the same noise and write both videos, side by "
        "side too, with PSNR, SSIM, times and kept shares",
    )
    add_speed_option(parser)
    _add_sampling_options(parser)
    _add_guidance_batching(parser)
    add_draft_options(parser)
    add_pair_options(parser)
    add_cache_options(parser)
    add_mesh_options(parser)


def _add_inspect(commands: Any) -> None:
    parser = commands.add_parser(
        "inspect",
        help="draw draft maps and block masks",
        description="Generates up to a step and draws, per layer and head, the draft "
        "map and the block mask that follows from it.",
        epilog=_INSPECT_EXAMPLES,
        formatter_class=HelpFormatter,
    )
    _add_prompt(parser)
    add_model_options(parser)
    parser.add_argument(
        "--output",
        type=Path,
        metavar="PNG",
        default=argparse.SUPPRESS,
        help="picture to write (default: outputs/<prompt>-<seed>-<hash of all "
        "settings>-step<step>.png)",
    )
    _add_overwrite(parser, "an earlier picture of that name")
    parser.add_argument(
        "--step",
        type=int,
        default=argparse.SUPPRESS,
        help="step to look at, counted from 0 (default: the middle one)",
    )
    for name, default in (
        ("layers", "first, middle and last"),
        ("heads", "the first four"),
    ):
        parser.add_argument(
            f"--{name}",
            type=parse_indices,
            metavar="I,J",
            default=argparse.SUPPRESS,
            help=f"{name} to draw (default: {default})",
        )
    _add_sampling_options(parser)
    add_draft_options(parser)
    add_pair_options(parser)


def _add_calibrate(commands: Any) -> None:
    parser = commands.add_parser(
        "calibrate",
        help="measure the ratios that --cache mag skips steps by",
        description="Runs the steps of a video, all of them computed, and writes how "
        "much longer the residual of each is than that of the step before. Ratios "
        "belong to the checkpoint, the number of steps, the shift and the attention.",
        epilog=_CALIBRATE_EXAMPLES,
        formatter_class=HelpFormatter,
    )
    _add_prompt(parser)
    add_model_options(parser)
    parser.add_argument(
        "--output",
        type=Path,
        metavar="JSON",
        default=argparse.SUPPRESS,
        help="file to write (default: outputs/<prompt>-<seed>-<hash of all "
        "settings>-ratios.json)",
    )
    _add_overwrite(parser, "an earlier file of that name")
    parser.add_argument(
        "--dense",
        action="store_true",
        help="ratios of full attention, as the published ones are",
    )
    _add_sampling_options(parser)
    _add_guidance_batching(parser)
    add_draft_options(parser)
    add_pair_options(parser)


def _add_guidance_batching(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--guidance-batching",
        choices=choices.GUIDANCE_BATCHINGS,
        default="one_call",
        help="run prompt and negative prompt in one model call, or in two calls, "
        "which need less memory",
    )


def _add_overwrite(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help=f"replace {what}, which is refused otherwise",
    )


def _add_prompt(parser: argparse.ArgumentParser) -> None:
    """Adds what the video shows: the prompt, and the image that it starts from."""
    parser.add_argument("prompt", help="what the video shows, in quotes")
    parser.add_argument(
        "--image",
        type=Path,
        metavar="FILE",
        help="first frame of the video, for image-to-video models",
    )


def _add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Adds the fields of `Sampling`; the checkpoint says what is not given."""
    group = parser.add_argument_group("video", _DEFAULTS_OF_MODELS)

    def add(name: str, shipped: object, help: str, **options: Any) -> None:
        note = "" if shipped == "" else f" [{shipped}]"
        group.add_argument(name, help=help + note, default=argparse.SUPPRESS, **options)

    add(
        "--seed",
        _SAMPLING.seed,
        "of the noise; several, such as 3,4,5, give a video each (generate only)",
        type=parse_seeds,
        dest="seeds",
        metavar="I[,J]",
    )
    add("--steps", _SAMPLING.num_steps, "sampler steps", type=int, dest="num_steps")
    add(
        "--size",
        f"{_SAMPLING.width}x{_SAMPLING.height}",
        "width x height in pixels, multiples of 8 for the shipped model, of 16 for "
        "Wan and HunyuanVideo; 480p is 832x480, 540p is 960x544, 720p is 1280x720",
        type=parse_size,
        metavar="WxH",
    )
    add(
        "--frames",
        _SAMPLING.frames,
        "frames, 2 n + 1 for the shipped model, 4 n + 1 for others",
        type=int,
    )
    add(
        "--guidance",
        _SAMPLING.guidance,
        "strength of classifier-free guidance; 1 turns it off",
        type=float,
    )
    add(
        "--embedded-guidance",
        "",
        "strength of the guidance that a distilled model (HunyuanVideo) is told of; "
        "other models take none",
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
        choices=tuple(choices.GRIDS_OF_SOLVERS),
    )
    add(
        "--grid",
        choices.GRIDS_OF_SOLVERS[_SAMPLING.solver][0],
        "whose noise levels: wan (Wan's own) or diffusers for unipc, linear or "
        "diffusers for euler; for a solver other than the checkpoint's wan and linear",
        choices=sorted(set().union(*choices.GRIDS_OF_SOLVERS.values())),
    )
    add(
        "--negative-prompt",
        _SAMPLING.negative_prompt,
        "what guidance leads away from",
        metavar="TEXT",
    )


def parse_size(text: str) -> tuple[int, int]:
    """Returns width and height of "WxH", or of a name such as "480p", which is wide."""
    if text in choices.NAMED_SIZES:
        return choices.NAMED_SIZES[text]
    match = re.fullmatch(r"(\d+)[xX](\d+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be WIDTHxHEIGHT in pixels, such as 128x96, or one of "
            f"{', '.join(choices.NAMED_SIZES)}"
        )
    return int(match[1]), int(match[2])


def parse_seeds(text: str) -> tuple[int, ...]:
    """Returns the seeds of "3,4,5", each of which is there once."""
    if not re.fullmatch(r"-?\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} must be a seed, or seeds with commas between, such as 3,4"
        )
    seeds = tuple(map(int, text.split(",")))
    if len(set(seeds)) < len(seeds):
        raise argparse.ArgumentTypeError(f"{text!r} names a seed twice")
    return seeds

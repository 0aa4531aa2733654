"""The options of a model with two transformers, made without importing jax."""

import argparse
import re

# Where the options of a second transformer go, and what sets the first one's.
LOW_NOISE = {
    "low_sparsity": "sparsity",
    "low_dense_fraction": "dense_fraction",
    "low_dense_layers": "dense_layers",
}
_OF_PAIRS = ("boundary", "low_guidance", *LOW_NOISE)


def add_pair_options(parser: argparse.ArgumentParser) -> None:
    """Adds where transformers change, and how the one for low noise differs."""
    group = parser.add_argument_group(
        "two transformers",
        "Of models with a transformer for high noise and one for low (Wan2.2 A14B); "
        "others take none of these.",
    )
    group.add_argument(
        "--boundary",
        type=float,
        default=argparse.SUPPRESS,
        metavar="TIMESTEP",
        help="least timestep, of 1000, of the one for high noise (default: 875 from "
        "text, 900 from an image)",
    )
    group.add_argument(
        "--low-guidance",
        type=float,
        default=argparse.SUPPRESS,
        help="guidance at low noise (default: 3 from text, 3.5 from an image)",
    )
    group.add_argument(
        "--low-sparsity",
        type=float,
        default=argparse.SUPPRESS,
        metavar="SPARSITY",
        help="share of block pairs that sparse steps of low noise skip (default: that "
        "of --sparsity)",
    )
    group.add_argument(
        "--low-dense-fraction",
        type=float,
        default=argparse.SUPPRESS,
        metavar="SHARE",
        help="first share of the steps of low noise that stays dense (default: none, "
        "but for those that --preset makes so)",
    )
    group.add_argument(
        "--low-dense-layers",
        type=parse_indices,
        default=argparse.SUPPRESS,
        metavar="I,J",
        help="layers that are always dense at low noise (default: those of "
        "--dense-layers or --preset)",
    )


def check_one_transformer(arguments: argparse.Namespace) -> None:
    """Raises ValueError if an option of two transformers is given."""
    given = [name for name in _OF_PAIRS if name in arguments]
    if not given:
        return
    named = [f"--{name.replace('_', '-')} {_text(arguments, name)}" for name in given]
    fits = "fits" if len(named) == 1 else "fit"
    raise ValueError(
        f"{' and '.join(named)} {fits} models with two transformers only, such as "
        "Wan2.2 A14B: this one has one for all noise levels"
    )


def parse_indices(text: str) -> tuple[int, ...]:
    """Returns the numbers of "0,3,5"; an empty text is none."""
    if not re.fullmatch(r"(\d+(,\d+)*)?", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} must be numbers from 0 with commas between, such as 0,3"
        )
    return tuple(int(part) for part in text.split(",") if part)


def _text(arguments: argparse.Namespace, name: str) -> str:
    value = getattr(arguments, name)
    return ",".join(map(str, value)) if isinstance(value, tuple) else f"{value:g}"

"""The options of several devices, made without importing jax."""

import argparse
import re

from models.cli import choices


def add_mesh_options(parser: argparse.ArgumentParser) -> None:
    """Adds how the transformer is spread over devices."""
    group = parser.add_argument_group("several devices")
    group.add_argument(
        "--mesh",
        type=parse_mesh,
        default=argparse.SUPPRESS,
        metavar="AXIS=N[,AXIS=N]",
        help="devices that share the work: sequence=N those of a video's tokens and "
        "heads, guidance=2 those of prompt and negative prompt; both together, such as "
        "sequence=2,guidance=2, take their product. Several hosts run the same command "
        "each, and the first one writes",
    )
    group.add_argument(
        "--shard-weights",
        action="store_true",
        default=argparse.SUPPRESS,
        help="spread the transformer's weights over the devices of --mesh, instead of "
        "a copy on each; takes less memory, and a little more time",
    )


def parse_mesh(text: str) -> dict[str, int]:
    """Returns the sizes that "sequence=2,guidance=2" gives, each axis once."""
    axes = "|".join(choices.MESH_AXES)
    pairs = [re.fullmatch(rf"({axes})=([1-9]\d*)", part) for part in text.split(",")]
    if None in pairs:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be AXIS=N with commas between, such as sequence=2, of the "
            f"axes {' and '.join(choices.MESH_AXES)}"
        )
    sizes = {match[1]: int(match[2]) for match in pairs if match is not None}
    if len(sizes) < len(pairs):
        raise argparse.ArgumentTypeError(f"{text!r} names an axis twice")
    return sizes

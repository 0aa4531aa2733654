"""The options of draft attention and its schedule, made without importing jax."""

import argparse
import re

from models.cli import choices
from models.cli.pair_options import parse_indices

_DRAFT = choices.DraftDefaults()
_PAPER, _MEANS = choices.PaperDefaults(), choices.MeansDefaults()
_CORRECTION = choices.CorrectionDefaults()


def add_draft_options(parser: argparse.ArgumentParser) -> None:
    """Adds the fields of `DraftConfig` and `SparsitySchedule`."""
    group = parser.add_argument_group("draft attention")
    group.add_argument(
        "--method",
        choices=choices.METHODS,
        default=argparse.SUPPRESS,
        help="what sparse layers compute. compensated: skipped blocks take part "
        "through means, and a few exact rows correct the rest; paper: they are left "
        "out. The options below override its parts (default: "
        f"{choices.METHODS[0]})",
    )
    group.add_argument(
        "--preset",
        choices=choices.PRESETS,
        default=argparse.SUPPRESS,
        help="where attention stays dense. paper: the first quarter of the steps; "
        "published: the rule of the published code for the model, Wan t > 925 and "
        "block 0 (of each, where there are two transformers) at sparsity 0.75, "
        "HunyuanVideo t > 945 and double blocks 0 and 1 at 0.9. The options below "
        f"override it (default: {choices.PRESETS[0]})",
    )
    group.add_argument(
        "--sparsity",
        type=float,
        default=argparse.SUPPRESS,
        help="share of block pairs that sparse steps skip, in [0, 1) (default: "
        f"{_DRAFT.sparsity}, of --method paper {_PAPER.sparsity}, or that of --preset "
        "published)",
    )
    group.add_argument(
        "--selection",
        choices=choices.SELECTIONS,
        default=argparse.SUPPRESS,
        help="how blocks are chosen from the draft map (default: "
        f"{_DRAFT.selection}, of --method paper {_PAPER.selection})",
    )
    group.add_argument(
        "--pooling",
        choices=choices.POOLINGS,
        default=_DRAFT.pooling,
        help="how a tile becomes one draft token",
    )
    group.add_argument(
        "--edge-tiles",
        choices=choices.EDGE_TILES,
        default=_DRAFT.edge_tiles,
        help="how short tiles at the edges of a frame weigh in the draft",
    )
    group.add_argument(
        "--draft-tile",
        type=parse_rows_and_columns,
        default=argparse.SUPPRESS,
        metavar="ROWSxCOLUMNS",
        help="tokens that the draft pools together (default: about eighths of a tile, "
        "such as 4x4 of 8x16; of --method paper whole tiles). Smaller ones find "
        "important blocks better and cost more",
    )
    group.add_argument(
        "--means",
        type=parse_rows_and_columns,
        default=argparse.SUPPRESS,
        metavar="ROWSxCOLUMNS",
        help="let skipped blocks take part through means of their keys and values, "
        "each over this many tokens of a frame (default: "
        f"{choices.rows_and_columns(_MEANS.sub_tile)}, of --method paper none). The "
        "report says what share of the work that adds",
    )
    group.add_argument(
        "--mean-frames",
        type=int,
        default=argparse.SUPPRESS,
        metavar="N",
        help=f"latent frames that each of the means is taken over (default: "
        f"{_MEANS.frames}). More frames are less work, and worse where much moves",
    )
    group.add_argument(
        "--correction",
        type=int,
        default=argparse.SUPPRESS,
        metavar="SAMPLES",
        help="correct sparse attention by a linear map of the query, fitted to the "
        "exact output of this many query tokens; 0 for none (default: "
        f"{_CORRECTION.samples}, of --method paper none). Short videos have fewer, or "
        "none. The report says what share of the work that adds",
    )
    group.add_argument(
        "--ranking",
        choices=choices.RANKINGS,
        default=argparse.SUPPRESS,
        help="what blocks are ranked by: their probability mass, or that times how "
        f"badly means stand for them (default: {_DRAFT.ranking}, of --method paper "
        f"{_PAPER.ranking})",
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
        default=argparse.SUPPRESS,
        metavar="SHARE",
        help="first share of the steps that stays dense, with --preset paper (default: "
        f"{_DRAFT.dense_fraction})",
    )
    group.add_argument(
        "--dense-layers",
        type=parse_indices,
        default=argparse.SUPPRESS,
        metavar="I,J",
        help="layers that are always dense, counted from 0; of HunyuanVideo the double "
        "blocks, then the single ones (default: those of --preset)",
    )
    group.add_argument(
        "--mask-refresh",
        type=int,
        default=_DRAFT.mask_refresh,
        metavar="N",
        help="recompute masks on every N-th sparse step and reuse them in between",
    )


def parse_rows_and_columns(text: str) -> tuple[int, int]:
    """Returns rows and columns of "RxC", in tokens."""
    match = re.fullmatch(r"([1-9]\d*)[xX]([1-9]\d*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be ROWSxCOLUMNS in tokens, such as 4x4"
        )
    return int(match[1]), int(match[2])

"""Ranking of scores: the largest of a map or of each row, as bits and as lists."""

from pallas_kernels.ranking.api import (
    RankingPath,
    choose_path,
    compress_rows,
    pack,
    select_in_maps,
    select_in_rows,
    select_to_mass,
    unpack,
)
from pallas_kernels.ranking.packed_bits import WORD_BITS, all_set

__all__ = [
    "WORD_BITS",
    "RankingPath",
    "all_set",
    "choose_path",
    "compress_rows",
    "pack",
    "select_in_maps",
    "select_in_rows",
    "select_to_mass",
    "unpack",
]

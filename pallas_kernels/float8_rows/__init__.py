"""Rows in FP8, rounded within the operation that makes them."""

from pallas_kernels.float8_rows.api import (
    add_norm_rows,
    gelu_rows,
    gelu_tanh,
    layer_norm,
    norm_rows,
    round_rows,
    why_not_in_kernel,
)
from pallas_kernels.float8_rows.interfaces import LARGEST, LEAST_MAXIMUM

__all__ = [
    "LARGEST",
    "LEAST_MAXIMUM",
    "add_norm_rows",
    "gelu_rows",
    "gelu_tanh",
    "layer_norm",
    "norm_rows",
    "round_rows",
    "why_not_in_kernel",
]

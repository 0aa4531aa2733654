"""Rows in FP8, rounded within the operation that makes them."""

from pallas_kernels.float8_rows.api import gelu_rows, gelu_tanh, why_not_in_kernel

__all__ = ["gelu_rows", "gelu_tanh", "why_not_in_kernel"]

"""Arrays that lie in files: mapped into memory, read only where they are used."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np


class CheckpointError(ValueError):
    """A checkpoint file is missing, damaged, or not what it should be."""


def map_array(
    file: str | os.PathLike,
    *,
    offset: int,
    dtype: Any,
    shape: Sequence[int],
    strides: Sequence[int] | None = None,
) -> np.ndarray:
    """Maps an array in a file into memory, without reading it.

    The mapping covers the array alone and goes when the array does. Arrays that are
    used one after the other never take more memory than the largest.

    Args:
      file: An uncompressed file; little-endian, as every checkpoint is.
      offset: Bytes before the array's first element.
      dtype: The elements' dtype.
      shape: The array's shape.
      strides: Elements, not bytes, from one index to the next along each axis, none
        negative; by default those of C order.

    Returns:
      A read-only view of the file.

    Raises:
      OSError: The file cannot be read.
      ValueError: The array ends behind the file's end.
    """
    dtype = np.dtype(dtype)
    shape = tuple(shape)
    if 0 in shape:
        return np.empty(shape, dtype)
    span = span_of(shape, strides)
    buffer = np.memmap(file, np.uint8, "r", offset, (span * dtype.itemsize,))
    if strides is not None:
        strides = [stride * dtype.itemsize for stride in strides]
    return np.ndarray(shape, dtype, buffer, strides=strides)


def span_of(shape: Sequence[int], strides: Sequence[int] | None = None) -> int:
    """Returns how many elements lie between an array's first and last, inclusive."""
    if 0 in shape:
        return 0
    if strides is None:
        return int(np.prod(shape, dtype=object))
    return 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))

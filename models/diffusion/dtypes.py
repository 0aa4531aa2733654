"""Number formats that suit a device."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Literal, get_args

import jax

from models.float8.product import has_fast_float8, why_no_float8
from pallas_kernels.common import Device, current_device, warn_once

# Precision of a transformer's linear layers as one asks for it; "auto" takes FP8 where
# the device is faster with it.
Linears = Literal["bfloat16", "float8", "auto"]


class SlowLinearsWarning(UserWarning):
    """`linears="auto"` found no fast FP8, and another precision was taken."""


def default_dtype(device: jax.Device | None = None) -> str:
    """Returns the faster dtype to compute in on a device, the default one if None.

    Without bfloat16 instructions, a CPU runs three full-size layers two to three
    times faster in float32 (measured); weights are widened one layer at a time.
    """
    platform = jax.default_backend() if device is None else device.platform
    return "float32" if platform == "cpu" else "bfloat16"


def check_linears(linears: Linears, *, apart: bool) -> None:
    """Refuses linear layers that the default device lacks: before anything costly.

    Args:
      linears: The wish, as of `choose_linears`.
      apart: Whether JAX must not be used in this process yet: it takes most of a GPU's
        memory, which text encoders beside it need. Another process looks then, and
        nothing is refused if it cannot.

    Raises:
      ValueError: As `choose_linears`.
    """
    _check_name(linears)
    if linears != "float8":
        return
    device = _device_apart() if apart else current_device()
    if device is not None:
        _check_float8(device)


def choose_linears(linears: Linears) -> str:
    """Returns the precision of linear layers that the default device gets.

    Args:
      linears: The wish. On a CPU, "float8" is a slow reference.

    Returns:
      "bfloat16", which stands for the dtype of the model, or "float8". Where "auto"
      finds no fast FP8, it warns once.

    Raises:
      ValueError: There is no such precision, or the device has no products in FP8.
    """
    _check_name(linears)
    if linears == "bfloat16":
        return linears
    device = current_device()
    if linears == "float8":
        _check_float8(device)
        return linears
    if has_fast_float8(device):
        return "float8"
    reason = why_no_float8(device) or "a CPU multiplies FP8 slower than float32"
    warn_once(
        f"linears='auto' takes {default_dtype()}, not FP8: {reason}",
        SlowLinearsWarning,
    )
    return "bfloat16"


def _check_name(linears: str) -> None:
    if linears not in get_args(Linears):
        raise ValueError(f"{linears=} must be one of {get_args(Linears)}")


def _check_float8(device: Device) -> None:
    if (reason := why_no_float8(device)) is not None:
        raise ValueError(f"linears='float8': {reason}; expected 'bfloat16' or 'auto'")


_DESCRIBE = """
import dataclasses, json
from pallas_kernels.common import current_device
print(json.dumps(dataclasses.asdict(current_device())))
"""
_LOOK_SECONDS = 120  # a machine that takes longer tells later


@functools.cache
def _device_apart() -> Device | None:
    """Returns the default device as another process sees it; None if it cannot."""
    folder = os.fspath(Path(__file__).parents[2])
    paths = [folder, os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", _DESCRIBE],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_LOOK_SECONDS,
            check=True,
        )
        fields = json.loads(done.stdout.splitlines()[-1])
        capability = fields.pop("compute_capability")
        return Device(
            **fields,
            compute_capability=None if capability is None else tuple(capability),
        )
    except (OSError, subprocess.SubprocessError, LookupError, TypeError, ValueError):
        return None

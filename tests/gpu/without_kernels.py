"""Models on a GPU without this project's kernels, to compare with."""

import contextlib
from unittest import mock

import jax
import numpy as np

from pallas_kernels.attention import api as dispatch
from pallas_kernels.attention.sm90 import dense_backend as hopper_dense

# The package's attribute of this name is the function, not the module.
from pallas_kernels.pooling.sm90 import norm_rope_pool as fused_kernel


@contextlib.contextmanager
def on_xla():
    """Runs what is traced inside on XLA alone, at the highest precision."""
    unwanted = {"return_value": "XLA is wanted"}
    with (
        jax.default_matmul_precision("highest"),
        mock.patch.dict(dispatch.PREFERENCE, gpu=("xla",)),
        mock.patch.object(hopper_dense, "why_unsupported", **unwanted),
        mock.patch.object(fused_kernel, "why_unsupported", **unwanted),
    ):
        yield


def relative_error(got, expected):
    """Relative L2 error."""
    return np.linalg.norm(got - expected) / np.linalg.norm(expected)

"""Each device gets the kernels or the XLA path of the ranking."""

import warnings

import jax.numpy as jnp
import numpy as np
import pytest

from draft_jax import DraftConfig, VideoGrid, select_blocks
from pallas_kernels import SlowBackendWarning
from pallas_kernels.common.device import Device
from pallas_kernels.ranking import api, choose_path, select_in_maps
from tests.warnings_once import forget_warnings


@pytest.mark.parametrize(
    ("columns", "capability", "cause"),
    [
        (8192, (9, 0), None),
        (8193, (9, 0), "rows of at most 8192 keys, not 8193"),
        (90, (8, 0), r"Hopper GPU \(sm_90\), not gpu X100"),
        (90, None, "Hopper"),
    ],
    ids=str,
)
def test_a_gpu_without_kernels_warns_once(columns, capability, cause):
    device = Device(platform="gpu", kind="X100", compute_capability=capability)
    forget_warnings()
    if cause is None:
        assert choose_path(columns, device).selects_in_kernels
        return
    with pytest.warns(SlowBackendWarning, match=f"selection runs on XLA.*{cause}"):
        assert not choose_path(columns, device).selects_in_kernels
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not choose_path(columns, device).selects_in_kernels


def test_a_cpu_does_not_warn():
    scores = jnp.zeros((1, 1, 1, 9))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        words = select_in_maps(scores, jnp.int32(2), forced=np.zeros((1, 9), bool))
    np.testing.assert_array_equal(words, [[[[0b11]]]])


def test_the_device_of_the_scores_lists_their_blocks(monkeypatch):
    """Arrays of the CPU on a machine whose default device is a GPU."""
    hopper = Device(platform="gpu", kind="H100", compute_capability=(9, 0))
    monkeypatch.setattr(api, "current_device", lambda *_: hopper)
    grid = VideoGrid(1, 2, 8, tile=(2, 2))  # of this test: its program is made here
    scores = jnp.array([[[[9.0, 1, 2, 3], [4, 8, 5, 6], [1, 2, 7, 3], [4, 5, 3, 6]]]])
    mask = select_blocks(
        scores, grid=grid, config=DraftConfig.paper(selection="row_topk", sparsity=0.75)
    )
    np.testing.assert_array_equal(mask.to_dense(), np.eye(4, dtype=bool)[None, None])

"""Lists ordered by classes of blocks, in GPU interpret mode; tests/gpu runs the PTX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention.sm90.partition_lists import partition_lists
from tests.pallas_kernels.attention.reference import check_partition

CLASSES = np.array([0, 2, 1, 0, 1])
INTERPRET = plgpu.InterpretGPUParams(detect_races=True)


@pytest.mark.usefixtures("no_races")
def test_hand_worked():
    offsets = jnp.array([[0, 4, 4, 6, 6, 7]], jnp.int32)
    ids = jnp.array([[1, 0, 4, 3, 2, 1, 1, 9, 9]], jnp.int32)  # the last are unused
    got, ends = partition_lists(
        offsets, ids, CLASSES, num_classes=3, interpret=INTERPRET
    )
    np.testing.assert_array_equal(got[0, :7], [0, 3, 4, 1, 2, 1, 1])
    want = [[2, 3, 4], [0, 0, 0], [0, 1, 2], [0, 0, 0], [0, 0, 1]]
    np.testing.assert_array_equal(ends[0], want)


@pytest.mark.usefixtures("no_races")
@pytest.mark.parametrize(
    ("num_rows", "num_classes"), [(4, 1), (7, 2), (37, 3)], ids=str
)
def test_random_lists(num_rows, num_classes):
    """One of more entries than a warp has lanes, empty ones, and rows past the end."""
    rng = np.random.default_rng(num_rows)
    classes = rng.integers(0, num_classes, num_rows)
    lengths = rng.integers(0, 4, (2, num_rows))
    lengths[:, 1] = num_rows
    offsets = np.pad(np.cumsum(lengths, 1), ((0, 0), (1, 0))).astype(np.int32)
    ids = rng.integers(0, num_rows, (2, offsets.max()), dtype=np.int32)
    got = partition_lists(
        jnp.asarray(offsets),
        jnp.asarray(ids),
        classes,
        num_classes=num_classes,
        interpret=INTERPRET,
    )
    check_partition(got, offsets, ids, classes)


def test_kernel_lowers_for_cuda():
    def run(offsets, ids):
        return partition_lists(offsets, ids, CLASSES, num_classes=3)

    arguments = (
        jax.ShapeDtypeStruct((4, 6), jnp.int32),
        jax.ShapeDtypeStruct((4, 25), jnp.int32),
    )
    lowered = jax.jit(run).trace(*arguments).lower(lowering_platforms=("cuda",))
    # Profiles show this name, and accounts of them (benchmarks/wan) tell it by that.
    assert "partition_lists_sm90_mosaic_gpu" in lowered.as_text()

"""Lists ordered by classes of blocks; the kernel's own test is in tests/gpu."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.partition_lists_sm90 import partition_lists

CLASSES = np.array([0, 2, 1, 0, 1])


def test_hand_worked():
    offsets = jnp.array([[0, 4, 4, 6, 6, 7]], jnp.int32)
    ids = jnp.array([[1, 0, 4, 3, 2, 1, 1, 9, 9]], jnp.int32)  # the last are unused
    got, ends = partition_lists(offsets, ids, CLASSES, num_classes=3, in_kernel=False)
    np.testing.assert_array_equal(got[0, :7], [0, 3, 4, 1, 2, 1, 1])
    want = [[2, 3, 4], [0, 0, 0], [0, 1, 2], [0, 0, 0], [0, 0, 1]]
    np.testing.assert_array_equal(ends[0], want)


def test_kernel_lowers_for_cuda():
    def run(offsets, ids):
        return partition_lists(offsets, ids, CLASSES, num_classes=3)

    arguments = (
        jax.ShapeDtypeStruct((4, 6), jnp.int32),
        jax.ShapeDtypeStruct((4, 25), jnp.int32),
    )
    lowered = jax.jit(run).trace(*arguments).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()

"""Kernels of a step by class."""

import numpy as np
import pytest

from benchmarks.common import kernel_account

BLOCK = [
    ("nvjet_hsh_256x128", 7.0, "matmul"),
    ("loop_dynamic_slice_fusion_3", 0.1, "weights of a layer"),
    ("fusion_84", 0.9, "fusion"),
    ("norm_rope_pool_sm90_mosaic_gpu_kernel", 1.4, "norm and rotation"),
    ("sm80_xmma_gemm_f32f32_f32f32", 0.2, "matmul"),
    ("count_digits_sm90_mosaic_gpu_kernel", 0.05, "draft"),
    ("write_lists_sm90_mosaic_gpu_kernel", 0.03, "draft"),
    ("partition_lists_sm90_mosaic_gpu_kernel", 0.02, "order of work"),
    ("block_sparse_attention_sm90_mosaic_gpu_kernel", 30.0, "self-attention"),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", 1.5, "cuDNN attention"),
    ("input_reduce_fusion_8", 0.01, "reduction"),
    ("sort_3_1", 0.01, "other"),
]


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, _, kind in BLOCK])
def test_kernels_have_classes(name, kind):
    assert kernel_account.classify(name) == kind


def test_account_of_six_blocks():
    launches = [(name, ms) for name, ms, _ in BLOCK] * 6
    account = kernel_account.account(launches, num_blocks=6)
    np.testing.assert_allclose(account["by_class_ms"]["self-attention"], 6 * 30.0)
    np.testing.assert_allclose(account["ms_per_block"]["draft"], 0.08)
    assert account["costliest"][0]["launches"] == 6
    assert account["costliest"][0]["kernel"].endswith(BLOCK[8][0])

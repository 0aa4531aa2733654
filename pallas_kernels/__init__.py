"""Attention kernels: one public function per operation, several backends each."""

from pallas_kernels.attention.api import (
    BackendChoice,
    BackendName,
    block_sparse_attention,
    block_sparse_attention_with_lse,
    chosen_backend,
    unchecked_block_sparse_attention,
)
from pallas_kernels.attention.dense_api import (
    dense_attention,
    unchecked_dense_attention,
    why_no_cudnn,
)
from pallas_kernels.attention.derivatives import RESIDUAL_NAMES
from pallas_kernels.attention.means import Means
from pallas_kernels.attention.rows import unchecked_row_attention
from pallas_kernels.common.slow_paths import SlowBackendWarning
from pallas_kernels.common.sub_tiles import SubTiles
from pallas_kernels.query_map import unchecked_add_query_map

__all__ = [
    "RESIDUAL_NAMES",
    "BackendChoice",
    "BackendName",
    "Means",
    "SlowBackendWarning",
    "SubTiles",
    "block_sparse_attention",
    "block_sparse_attention_with_lse",
    "chosen_backend",
    "dense_attention",
    "unchecked_add_query_map",
    "unchecked_block_sparse_attention",
    "unchecked_dense_attention",
    "unchecked_row_attention",
    "why_no_cudnn",
]

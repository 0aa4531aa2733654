"""Attention kernels: one public function per operation, several backends each."""

from pallas_kernels.block_sparse_attention import (
    BackendChoice,
    BackendName,
    SlowBackendWarning,
    block_sparse_attention,
    chosen_backend,
)
from pallas_kernels.dense_attention import dense_attention

__all__ = [
    "BackendChoice",
    "BackendName",
    "SlowBackendWarning",
    "block_sparse_attention",
    "chosen_backend",
    "dense_attention",
]

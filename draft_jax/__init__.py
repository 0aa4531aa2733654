"""DraftAttention in JAX: sparse attention for video diffusion transformers.

A draft, made by pooling queries and keys over the tiles of each frame, tells which
blocks of the full attention map matter; only those are computed.

Example:
    ```python
    import jax
    from draft_jax import DraftConfig, VideoGrid, draft_attention

    grid = VideoGrid(frames=4, height=30, width=52)  # tokens; tiles of 8 x 16
    shape = (2, grid.num_tokens, 3, 64)  # batch, tokens, heads, head dim
    q, k, v = jax.random.normal(jax.random.key(0), (3, *shape))
    out = draft_attention(q, k, v, grid=grid, config=DraftConfig(sparsity=0.75))
    print(out.shape)
    ```

Source: DraftAttention (arXiv 2505.14708).
"""

import importlib
from typing import TYPE_CHECKING, Any

from draft_jax import _shadowing  # noqa: F401  first: explains failing imports
from draft_jax.attention import draft_attention, initial_mask, scheduled_attention
from draft_jax.attention_plan import AttentionPlan
from draft_jax.block_mask import BlockMask
from draft_jax.config import (
    Compensation,
    Correction,
    DraftConfig,
    MaskMaker,
    SparsityWarning,
    extra_work,
    kept_pairs_budget,
    mask_capacity,
)
from draft_jax.debugging import check_finite, check_positions
from draft_jax.draft.means import make_means
from draft_jax.draft.pooling import PooledTokens, pool_tokens
from draft_jax.draft.qk_preparation import (
    QKV,
    Product,
    QKNorm,
    joint_norm_rope_pool,
    norm_rope_pool,
)
from draft_jax.draft.scores import draft_scores
from draft_jax.draft.selection import compute_mask, select_blocks
from draft_jax.grid import VideoGrid
from draft_jax.schedule import (
    DraftStep,
    SparsitySchedule,
    StepKind,
    StepPlan,
    constant_step,
)

if TYPE_CHECKING:
    from draft_jax.flax_layers import (
        DraftAttention,
        DraftAttentionFn,
        draft_attention_fn,
    )

__all__ = [
    "QKV",
    "AttentionPlan",
    "BlockMask",
    "Compensation",
    "Correction",
    "DraftAttention",
    "DraftAttentionFn",
    "DraftConfig",
    "DraftStep",
    "MaskMaker",
    "PooledTokens",
    "Product",
    "QKNorm",
    "SparsitySchedule",
    "SparsityWarning",
    "StepKind",
    "StepPlan",
    "VideoGrid",
    "check_finite",
    "check_positions",
    "compute_mask",
    "constant_step",
    "draft_attention",
    "draft_attention_fn",
    "draft_scores",
    "extra_work",
    "initial_mask",
    "joint_norm_rope_pool",
    "kept_pairs_budget",
    "make_means",
    "mask_capacity",
    "norm_rope_pool",
    "pool_tokens",
    "scheduled_attention",
    "select_blocks",
]

# Flax takes longer to import than everything else here, so its layers are imported
# where they are first asked for.
_FLAX_LAYERS = frozenset({"DraftAttention", "DraftAttentionFn", "draft_attention_fn"})


def __getattr__(name: str) -> Any:
    """Imports the Flax layers on first use."""
    if name not in _FLAX_LAYERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module("draft_jax.flax_layers"), name)
    globals()[name] = value  # the next time it is found at once
    return value


def __dir__() -> list[str]:
    """Lists what `from draft_jax import` takes, the Flax layers too."""
    return sorted({*globals(), *__all__})

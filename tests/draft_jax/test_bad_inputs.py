"""What users get wrong, and what they are told."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from draft_jax import (
    BlockMask,
    DraftConfig,
    PooledTokens,
    VideoGrid,
    compute_mask,
    draft_attention,
    draft_scores,
    kept_pairs_budget,
    norm_rope_pool,
    pool_tokens,
    select_blocks,
)
from pallas_kernels import block_sparse_attention

pytestmark = pytest.mark.usefixtures("without_annotations")

GRID = VideoGrid(1, 4, 6, tile=(2, 3), text_length=5)  # 4 visual blocks, 1 of text
SHAPE = (2, GRID.num_tokens, 3, 8)
OTHER_GRID = VideoGrid(1, 4, 6, tile=(2, 2), text_length=5)


def ones(*shape, dtype=jnp.float32):
    return jnp.ones(shape, dtype)


def mask_with_id(block):
    mask = BlockMask.full(grid=GRID, batch=2, num_heads=3)
    ids = mask.block_ids.at[0, 1, 2].set(block)
    return BlockMask(row_offsets=mask.row_offsets, block_ids=ids, grid=GRID)


ATTENTION = {  # changed arguments, error, what its message says
    "rank": (
        {name: ones(29, 3, 8) for name in "qkv"},
        ValueError,
        r"q has shape \(29, 3, 8\); expected \[batch, tokens, heads, head_dim\]",
    ),
    "text is missing": (
        {name: ones(2, 24, 3, 8) for name in "qkv"},
        ValueError,
        "24 tokens; VideoGrid.* has 29, text included",
    ),
    "k differs": (
        {"k": ones(2, 29, 3, 4)},
        ValueError,
        "k has shape.* equal q's shape",
    ),
    "v differs": (
        {"v": ones(2, 29, 1, 8)},
        ValueError,
        "v has shape.* equal q's shape",
    ),
    "integers": (
        {"q": ones(*SHAPE, dtype=int)},
        TypeError,
        "q has dtype int32; accept",
    ),
    "mixed dtypes": (
        {"v": ones(*SHAPE, dtype="bfloat16")},
        TypeError,
        "v has dtype bf",
    ),
    "order": ({"order": "frames"}, ValueError, r"order='frames' must be one of \('ras"),
    "backend": ({"backend": "triton"}, ValueError, "backend='triton' is unknown; acc"),
    "scale": ({"scale": float("inf")}, ValueError, "scale=inf must be finite"),
    "lengths": (
        {"text_lengths": jnp.asarray([1, 9])},
        ValueError,
        r"text_lengths=\[1, 9\] must lie in 0 to 5",
    ),
    "one length": (
        {"text_lengths": jnp.asarray([1])},
        ValueError,
        r"text_lengths has shape \(1,\); expected \[batch\] = \(2,\)",
    ),
}


@pytest.mark.parametrize("case", ATTENTION)
def test_draft_attention(case):
    changes, error, message = ATTENTION[case]
    arguments = {name: ones(*SHAPE) for name in "qkv"} | changes
    with pytest.raises(error, match=message):
        draft_attention(**arguments, grid=GRID, config=DraftConfig.paper())


MASKS = {  # mask, error, what its message says
    "another grid": (
        BlockMask.full(grid=OTHER_GRID, batch=2, num_heads=3),
        ValueError,
        "mask.grid=VideoGrid.* must equal grid=VideoGrid",
    ),
    "one item": (
        BlockMask.full(grid=GRID, batch=1, num_heads=3),
        ValueError,
        "mask.row_offsets has shape .* batch 2",
    ),
    "blocks that are not": (
        mask_with_id(7),
        ValueError,
        r"mask.block_ids\[0, 1, 2\] is 7; accepted are 0 to 4",
    ),
    "boolean map": (
        jnp.ones((2, 3, 5, 5), bool),
        TypeError,
        "mask is ArrayImpl; expected a BlockMask: BlockMask.from_dense",
    ),
    "list": ([[True]], TypeError, "mask is list; expected a BlockMask"),
}


@pytest.mark.parametrize("case", MASKS)
def test_mask(case):
    mask, error, message = MASKS[case]
    q = ones(*SHAPE)
    with pytest.raises(error, match=message):
        block_sparse_attention(q, q, q, mask, grid=GRID, order="raster")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pooling": "max"}, r"pooling='max' must be one of \('mean', 'mean\+max'\)"),
        ({"edge_tiles": "equal"}, "edge_tiles='equal' must be one of .'by_tokens', 'a"),
        ({"selection": "topk"}, "selection='topk' must be one of .*'row_topk'"),
        ({"sparsity": 1.0}, r"sparsity=1.0 must be a number in \[0, 1\)"),
        ({"sparsity": -0.1}, r"sparsity=-0.1 must be a number in \[0, 1\)"),
        ({"sparsity": float("nan")}, "sparsity=nan must be a number"),
        ({"sparsity": "0.5"}, "sparsity='0.5' must be a number"),
        ({"sparsity": True}, "sparsity=True must be a number"),
        ({"top_p": 0.0}, r"top_p=0.0 must be a number in \(0, 1\]"),
        ({"top_p": 1.5}, r"top_p=1.5 must be a number in \(0, 1\]"),
        ({"keep_own_tile": 1}, "keep_own_tile=1 must be True or False"),
        ({"keep_first_frame": None}, "keep_first_frame=None must be True or False"),
    ],
    ids=str,
)
def test_draft_config(fields, message):
    with pytest.raises(ValueError, match=message):
        DraftConfig.paper(**fields)


def test_positional_fields_are_refused():
    with pytest.raises(TypeError, match="positional argument"):
        DraftConfig.paper("mean")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: pool_tokens(ones(*SHAPE), GRID),
            r"x has 29 tokens; .* has 24 visual tokens \(leave the text tokens out\)",
        ),
        (
            lambda: pool_tokens(ones(2, 24, 3, 8), GRID, reduction="median"),
            r"reduction='median' must be one of \('mean', 'max'\)",
        ),
        (
            lambda: pool_tokens(ones(2, 24, 3, 8), GRID, order="columns"),
            "order='columns' must be one of",
        ),
        (
            lambda: draft_scores(
                ones(2, 24, 3, 8),
                ones(2, 24, 3, 8),
                grid=GRID,
                config=DraftConfig.paper(),
            ),
            r"q has shape \(2, 24, 3, 8\), 24 tokens; .* has 29, text included",
        ),
        (
            lambda: draft_scores(
                ones(*SHAPE), ones(2, 29, 1, 8), grid=GRID, config=DraftConfig.paper()
            ),
            r"k has shape \(2, 29, 1, 8\); it must equal q's shape \(2, 29, 3, 8\)",
        ),
        (
            lambda: select_blocks(
                ones(2, 3, 5, 5), grid=GRID, config=DraftConfig.paper()
            ),
            r"scores has shape \(2, 3, 5, 5\); expected \[batch, heads, 4, 4\]",
        ),
        (lambda: kept_pairs_budget(1.0, 4), r"sparsity=1.0 must be a number in \[0, 1"),
    ],
    ids=["text", "reduction", "order", "scores-text", "scores-k", "select", "budget"],
)
def test_parts(call, message):
    with pytest.raises(ValueError, match=message):
        call()


QUERIES_AND_KEYS = {  # q, k, error, what its message says
    "rank": (
        ones(29, 3, 8),
        ones(29, 3, 8),
        ValueError,
        r"q has shape \(29, 3, 8\); expected \[batch, tokens, heads, head_dim\]",
    ),
    "no heads": (
        ones(2, 29, 0, 8),
        ones(2, 29, 0, 8),
        ValueError,
        r"q has shape \(2, 29, 0, 8\)",
    ),
    "k's rank": (ones(*SHAPE), ones(2, 29, 24), ValueError, r"k has shape \(2, 29, 24"),
    "tokens": (
        ones(2, 24, 3, 8),
        ones(2, 24, 3, 8),
        ValueError,
        "24 tokens; VideoGrid.* has 29, text included",
    ),
    "integers": (
        ones(*SHAPE, dtype=int),
        ones(*SHAPE, dtype=int),
        TypeError,
        "q has dtype int32; accepted are float32, bfloat16, float16",
    ),
    "k's dtype": (
        ones(*SHAPE),
        ones(*SHAPE, dtype="bfloat16"),
        TypeError,
        "k has dtype bfloat16; it must equal q's dtype float32",
    ),
}


@pytest.mark.parametrize("function", [draft_scores, compute_mask, norm_rope_pool])
@pytest.mark.parametrize("case", QUERIES_AND_KEYS)
def test_queries_and_keys(case, function):
    q, k, error, message = QUERIES_AND_KEYS[case]
    with pytest.raises(error, match=message):
        function(q, k, grid=GRID, config=DraftConfig.paper())


@pytest.mark.parametrize("function", [draft_scores, compute_mask, norm_rope_pool])
def test_order_of_queries_and_keys(function):
    q = ones(*SHAPE)
    with pytest.raises(ValueError, match="order='frames' must be one of"):
        function(q, q, grid=GRID, config=DraftConfig.paper(), order="frames")


def test_pooled_in_another_dtype():
    q, half = ones(*SHAPE), ones(2, 4, 3, 8, dtype="bfloat16")
    pooled = PooledTokens(q_mean=half, k_mean=half)
    message = r"pooled\.q_mean has dtype bfloat16; expected float32"
    with pytest.raises(TypeError, match=message):
        draft_scores(q, q, grid=GRID, config=DraftConfig.paper(), pooled=pooled)


@pytest.mark.parametrize("dtype", ["int32", "bool"])
def test_scores_that_are_no_numbers_with_a_fraction(dtype):
    with pytest.raises(TypeError, match=f"scores has dtype {dtype}; accepted are flo"):
        select_blocks(
            ones(2, 3, 4, 4, dtype=dtype),
            grid=GRID,
            config=DraftConfig.paper(sparsity=0.5),
        )


BUDGETS = {  # budget, error, what its message says
    "zero": (0, ValueError, "budget=0 must be within 1 and 8, the percentile budget"),
    "large": (9, ValueError, "budget=9 must be within 1 and 8"),
    "numpy scalar": (np.int32(9), ValueError, "budget=9 must be within 1 and 8"),
    "numpy array": (np.array(9), ValueError, "budget=9 must be within 1 and 8"),
    "jax array": (jnp.asarray(-1), ValueError, "budget=-1 must be within 1 and 8"),
    "true": (True, TypeError, "budget=True must be an integer, not bool"),
    "fraction": (2.5, TypeError, "budget=2.5 must be an integer, not float64"),
    "float array": (jnp.ones(()), TypeError, "must be an integer, not float32"),
    "shape": (np.array([4]), ValueError, r"budget has shape \(1,\); expected a scalar"),
    "per head": (jnp.full((2, 3), 4), ValueError, r"budget has shape \(2, 3\)"),
}


@pytest.mark.parametrize("case", BUDGETS)
def test_budget(case):
    budget, error, message = BUDGETS[case]
    config = DraftConfig.paper(sparsity=0.5)
    with pytest.raises(error, match=message):
        select_blocks(ones(2, 3, 4, 4), grid=GRID, config=config, budget=budget)


def test_budget_under_jit():
    """Values are not known there: the nearest one that is possible is taken."""

    def num_kept(budget):
        config = DraftConfig.paper(sparsity=0.5, keep_own_tile=True)
        scores = jnp.arange(16.0).reshape(1, 1, 4, 4)
        mask = select_blocks(scores, grid=GRID, config=config, budget=budget)
        return mask.to_dense()[0, 0, :4, :4].sum()

    assert jax.jit(num_kept)(9) == 8
    assert jax.jit(num_kept)(np.int32(6)) == 6
    assert jax.jit(num_kept)(-1) == 4  # every block's own
    with pytest.raises(TypeError, match="must be an integer, not float32"):
        jax.jit(num_kept)(2.5)
    with pytest.raises(ValueError, match=r"budget has shape \(2,\)"):
        jax.jit(num_kept)(np.array([2, 3]))


def test_numpy_arrays_are_welcome():
    q = np.ones(SHAPE, np.float32)
    out = draft_attention(q, q, q, grid=GRID, config=DraftConfig.paper())
    np.testing.assert_allclose(out, q, rtol=1e-6)

"""What users get wrong, and what they are told."""

import jax.numpy as jnp
import numpy as np
import pytest

from draft_jax import (
    BlockMask,
    DraftConfig,
    VideoGrid,
    draft_attention,
    draft_scores,
    kept_pairs_budget,
    pool_tokens,
    select_blocks,
)

pytestmark = pytest.mark.usefixtures("without_annotations")

GRID = VideoGrid(1, 4, 6, tile=(2, 3), text_length=5)  # 4 visual blocks, 1 of text
SHAPE = (2, GRID.num_tokens, 3, 8)
OTHER_GRID = VideoGrid(1, 4, 6, tile=(2, 2), text_length=5)


def ones(*shape, dtype=jnp.float32):
    return jnp.ones(shape, dtype)


def boolean(*shape):
    return jnp.ones(shape, bool)


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
    "budget 0": (
        {"budget": 0},
        ValueError,
        "budget=0 must be within 1 and 4, the perc",
    ),
    "large budget": ({"budget": 5}, ValueError, "budget=5 must be within 1 and 4"),
    "mask and budget": (
        {"mask": boolean(1, 1, 4, 4), "budget": 2},
        ValueError,
        "budget=2 has no effect when mask is given",
    ),
    "mask of another grid": (
        {"mask": BlockMask.full(grid=OTHER_GRID, batch=2, num_heads=3)},
        ValueError,
        "mask.grid=VideoGrid.* must equal grid=VideoGrid",
    ),
    "mask of one item": (
        {"mask": BlockMask.full(grid=GRID, batch=1, num_heads=3)},
        ValueError,
        "mask.row_offsets has shape .* batch 2",
    ),
    "mask of blocks that are not": (
        {"mask": mask_with_id(7)},
        ValueError,
        r"mask.block_ids\[0, 1, 2\] is 7; accepted are 0 to 4",
    ),
    "mask rank": (
        {"mask": boolean(4, 4)},
        ValueError,
        r"mask has shape \(4, 4\); expe",
    ),
    "mask of tokens": (
        {"mask": boolean(1, 1, 29, 29)},
        ValueError,
        r"expected \[2, 3, 4, 4\] or \[2, 3, 5, 5\], the first two sizes may be 1",
    ),
    "mask heads": ({"mask": boolean(2, 2, 4, 4)}, ValueError, "mask has shape"),
    "mask numbers": (
        {"mask": ones(1, 1, 4, 4)},
        TypeError,
        "mask is float32; expected a BlockMask or a boolean array",
    ),
    "mask list": ({"mask": [[True]]}, TypeError, "mask is list; expected a BlockMask"),
}


@pytest.mark.parametrize("case", ATTENTION)
def test_draft_attention(case):
    changes, error, message = ATTENTION[case]
    arguments = {name: ones(*SHAPE) for name in "qkv"} | changes
    with pytest.raises(error, match=message):
        draft_attention(**arguments, grid=GRID, config=DraftConfig())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pooling": "max"}, r"pooling='max' must be one of \('mean', 'mean\+max'\)"),
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
        DraftConfig(**fields)


def test_positional_fields_are_refused():
    with pytest.raises(TypeError, match="positional argument"):
        DraftConfig("mean")


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
                ones(2, 24, 3, 8), ones(2, 24, 3, 8), grid=GRID, config=DraftConfig()
            ),
            "q has 24 tokens; .* has 29, text included",
        ),
        (
            lambda: draft_scores(
                ones(*SHAPE), ones(2, 29, 1, 8), grid=GRID, config=DraftConfig()
            ),
            r"q and k must have one shape; got \(2, 29, 3, 8\) and \(2, 29, 1, 8\)",
        ),
        (
            lambda: select_blocks(ones(2, 3, 5, 5), grid=GRID, config=DraftConfig()),
            r"scores has shape \(2, 3, 5, 5\); expected \[batch, heads, 4, 4\]",
        ),
        (lambda: kept_pairs_budget(1.0, 4), r"sparsity=1.0 must be a number in \[0, 1"),
    ],
    ids=["text", "reduction", "order", "scores-text", "scores-k", "select", "budget"],
)
def test_parts(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_numpy_arrays_are_welcome():
    q = np.ones(SHAPE, np.float32)
    out = draft_attention(q, q, q, grid=GRID, config=DraftConfig())
    np.testing.assert_allclose(out, q, rtol=1e-6)

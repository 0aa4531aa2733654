"""Validation, choice of backend, warnings, and the direction of imports."""

import dataclasses
import functools
import importlib
import re
import typing
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from draft_jax import (
    DraftConfig,
    compute_mask,
    draft_attention,
    initial_mask,
)
from draft_jax.block_mask import BlockMask
from draft_jax.grid import VideoGrid
from pallas_kernels import (
    BackendName,
    SlowBackendWarning,
    block_sparse_attention,
    block_sparse_attention_with_lse,
    chosen_backend,
    dense_attention,
)
from pallas_kernels.attention import api as dispatch
from pallas_kernels.common import validation
from pallas_kernels.common.device import Device
from pallas_kernels.common.interfaces import Problem
from tests.warnings_once import forget_warnings

GRID = VideoGrid(1, 2, 4, tile=(2, 2), text_length=3)
SHAPE = (2, GRID.num_tokens, 3, 8)


def arguments(**changes):
    q = jnp.ones(SHAPE)
    mask = BlockMask.full(grid=GRID, batch=2, num_heads=3)
    qkv = {"q": q, "k": q, "v": q}
    return {**qkv, "mask": mask, "grid": GRID, "order": "tiled"} | changes


def full(grid=GRID, batch=2, num_heads=3):
    return BlockMask.full(grid=grid, batch=batch, num_heads=num_heads)


def int16_mask():
    return dataclasses.replace(full(), block_ids=full().block_ids.astype(jnp.int16))


def flat_mask():
    # Rebuilding a tree skips the constructor, which would refuse the rank.
    leaves, structure = jax.tree.flatten(full())
    return jax.tree.unflatten(structure, [leaves[0], leaves[1][0]])


def changed(name, place, value):
    """A mask of 3 blocks, 9 pairs in each head, with one entry of a list changed."""
    array = getattr(full(), name).at[place].set(value)
    return dataclasses.replace(full(), **{name: array})


BIG = VideoGrid(1, 100, 100)
BAD_INPUTS = {  # changed arguments, error, what its message says
    "q-rank": ({"q": jnp.ones(SHAPE[1:])}, ValueError, r"q has shape \(11, 3, 8\)"),
    "k-rank": ({"k": jnp.ones(SHAPE[1:])}, ValueError, r"k has shape \(11, 3, 8\)"),
    "v-rank": ({"v": jnp.ones(SHAPE[1:])}, ValueError, r"v has shape \(11, 3, 8\)"),
    "head-dim-0": (dict.fromkeys("qkv", jnp.ones((2, 11, 3, 0))), ValueError, "size"),
    "batch-0": (dict.fromkeys("qkv", jnp.ones((0, 11, 3, 8))), ValueError, "at least"),
    "k-shape": ({"k": jnp.ones((2, 11, 3, 4))}, ValueError, "k has shape.*q's shape"),
    "v-shape": ({"v": jnp.ones((2, 11, 1, 8))}, ValueError, "v has shape.*q's shape"),
    "tokens": (dict.fromkeys("qkv", jnp.ones((2, 9, 3, 8))), ValueError, "9 tokens"),
    "q-dtype": ({"q": jnp.ones(SHAPE, int)}, TypeError, "q has dtype int32; accepted"),
    "k-dtype": ({"k": jnp.ones(SHAPE, "bfloat16")}, TypeError, "k has dtype bfloat16"),
    "v-dtype": ({"v": jnp.ones(SHAPE, "float16")}, TypeError, "equal q's dtype"),
    "mask-grid": ({"mask": full(BIG)}, ValueError, r"mask\.grid=.*must equal grid="),
    "mask-batch": ({"mask": full(batch=1)}, ValueError, "mask.row_offsets.*batch 2"),
    "mask-heads": ({"mask": full(num_heads=1)}, ValueError, "row_offsets.*3 heads"),
    "mask-rank": ({"mask": flat_mask()}, ValueError, "mask.block_ids has shape"),
    "mask-dtype": ({"mask": int16_mask()}, TypeError, "mask.block_ids has dtype int16"),
    "ids-big": (
        {"mask": changed("block_ids", (1, 2, 8), 3)},
        ValueError,
        r"mask.block_ids\[1, 2, 8\] is 3; accepted are 0 to 2",
    ),
    "ids-low": (
        {"mask": changed("block_ids", (0, 0, 0), -1)},
        ValueError,
        r"mask.block_ids\[0, 0, 0\] is -1; accepted are 0 to 2",
    ),
    "offsets-fall": (
        {"mask": changed("row_offsets", (1, 0, 2), 2)},
        ValueError,
        r"mask.row_offsets\[1, 0, 2\] is 2; offsets must not decrease",
    ),
    "offsets-big": (
        {"mask": changed("row_offsets", (1, 0, 3), 10)},
        ValueError,
        r"mask.row_offsets\[1, 0, 3\] is 10; block_ids holds 9 entries",
    ),
    "offsets-first": (
        {"mask": changed("row_offsets", (0, 1, 0), 1)},
        ValueError,
        r"mask.row_offsets\[0, 1, 0\] is 1; the first offset must be 0",
    ),
    "scale-type": ({"scale": "0.1"}, TypeError, "scale='0.1' must be a number"),
    "scale-shape": (
        {"scale": jnp.ones(1)},
        TypeError,
        r"shape \(1,\) and dtype float32",
    ),
    "scale-dtype": ({"scale": jnp.ones((), int)}, TypeError, "and dtype int32"),
    "scale-bool": ({"scale": True}, TypeError, "scale=True must be"),
    "scale-nan": ({"scale": float("nan")}, ValueError, "scale=nan must be finite"),
    "order": ({"order": "zigzag"}, ValueError, r"order='zigzag' must be one of"),
    "backend": ({"backend": "cuda"}, ValueError, "'cuda' is unknown; .* 'oracle'"),
    "lengths-float": ({"text_lengths": jnp.ones(2)}, TypeError, "dtype float32"),
    "lengths-shape": ({"text_lengths": jnp.ones(3, int)}, ValueError, r"\[batch\]"),
    "lengths-big": ({"text_lengths": jnp.array([0, 4])}, ValueError, r"\[0, 4\]"),
    "lengths-low": ({"text_lengths": jnp.array([-1, 3])}, ValueError, "0 to 3"),
}


@pytest.mark.usefixtures("without_jaxtyping")
@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_is_named(case):
    changes, error, message = BAD_INPUTS[case]
    with pytest.raises(error, match=message):
        block_sparse_attention(**arguments(**changes))


def test_unused_entries_of_a_mask_may_be_anything():
    """Head [1, 2] keeps 7 of 9 pairs: the last row loses two."""
    mask = changed("row_offsets", (1, 2, 3), 7)
    unused = mask.block_ids.at[1, 2, 7:].set(jnp.array([-5, 99]))
    got = block_sparse_attention(
        **arguments(mask=dataclasses.replace(mask, block_ids=unused))
    )
    want = block_sparse_attention(**arguments(mask=mask))
    np.testing.assert_array_equal(got, want)


@pytest.mark.usefixtures("without_jaxtyping")
def test_order_has_no_default():
    """A wrong order gives wrong numbers, so none is assumed."""
    given = arguments()
    del given["order"]
    for attend in (block_sparse_attention, block_sparse_attention_with_lse):
        with pytest.raises(TypeError, match="keyword-only argument: 'order'"):
            attend(**given)
    with pytest.raises(TypeError, match="keyword-only argument: 'order'"):
        chosen_backend(given["q"], grid=GRID)
    with pytest.raises(ValueError, match="order='zigzag' must be one of"):
        chosen_backend(given["q"], grid=GRID, order="zigzag")


def test_no_module_has_a_function_s_name():
    """`import pallas_kernels.block_sparse_attention as m` must not yield a function."""
    for name in pallas_kernels.__all__:
        with pytest.raises(ModuleNotFoundError, match=name):
            importlib.import_module(f"pallas_kernels.{name}")


def test_both_functions_return_the_same_output():
    out, lse = block_sparse_attention_with_lse(**arguments())
    np.testing.assert_array_equal(block_sparse_attention(**arguments()), out)
    assert lse.shape == (2, 3, GRID.num_tokens)


def test_known_mask_is_checked_inside_jit():
    mask = changed("block_ids", (1, 2, 8), 3)
    run = jax.jit(lambda q: block_sparse_attention(**arguments(q=q, mask=mask)))
    with pytest.raises(ValueError, match=r"block_ids\[1, 2, 8\] is 3"):
        run(jnp.ones(SHAPE))


@pytest.mark.nightly
def test_masks_of_this_package_are_not_fetched(monkeypatch):
    """The lists of others are looked at, once for each call."""
    looked_at = []
    monkeypatch.setattr(
        validation, "_has_fault", lambda *lists: looked_at.append(lists) or jnp.array(0)
    )
    q = jnp.ones(SHAPE)
    config = DraftConfig.paper(sparsity=0.5)
    made = (
        full(),
        BlockMask.from_dense(jnp.ones((2, 3, 3, 3), bool), grid=GRID),
        compute_mask(q, q, grid=GRID, config=config),
        initial_mask(GRID, config, batch=2, num_heads=3),
    )
    for mask in made:
        block_sparse_attention(**arguments(mask=mask))
    draft_attention(q, q, q, grid=GRID, config=config)
    assert not looked_at
    of_users = (
        BlockMask(
            row_offsets=made[0].row_offsets, block_ids=made[0].block_ids, grid=GRID
        ),
        dataclasses.replace(made[0], grid=GRID),
        jax.tree.map(lambda x: x + 0, made[0]),
    )
    for mask in of_users:
        block_sparse_attention(**arguments(mask=mask))
    assert len(looked_at) == len(of_users)


def test_text_lengths_need_text():
    grid = VideoGrid(1, 2, 4, tile=(2, 2))
    q = jnp.ones((1, 8, 1, 4))
    lengths = jnp.zeros(1, jnp.int32)
    with pytest.raises(ValueError, match="has no text"):
        block_sparse_attention(
            q,
            q,
            q,
            full(grid, 1, 1),
            grid=grid,
            order="tiled",
            text_lengths=lengths,
        )
    with pytest.raises(ValueError, match="text_lengths needs grid"):
        dense_attention(q, q, q, text_lengths=lengths)


@pytest.mark.usefixtures("without_jaxtyping")
def test_dense_attention_checks_its_inputs():
    q = jnp.ones(SHAPE)
    with pytest.raises(ValueError, match="v has shape"):
        dense_attention(q, q, q[:, :4])
    with pytest.raises(ValueError, match="9 tokens"):
        dense_attention(q[:, :9], q[:, :9], q[:, :9], grid=GRID)
    with pytest.raises(TypeError, match="k has dtype float16"):
        dense_attention(q, q.astype("float16"), q)


def test_oracle_refuses_large_sequences():
    q = jnp.ones((1, BIG.num_tokens, 1, 8))
    mask = full(BIG, 1, 1)
    with pytest.raises(ValueError, match="at most 8192 tokens, not 10000"):
        block_sparse_attention(q, q, q, mask, grid=BIG, order="tiled", backend="oracle")
    with pytest.raises(ValueError, match="backend='oracle' cannot take these inputs"):
        chosen_backend(q, grid=BIG, order="tiled", backend="oracle")


def test_names_and_registry_agree():
    assert set(typing.get_args(BackendName)) == {"auto", *dispatch.BACKENDS}
    for preference in dispatch.PREFERENCE.values():
        assert "oracle" not in preference
        assert set(preference) <= set(dispatch.BACKENDS)


def test_the_record_of_hopper_is_that_of_its_module():
    """It stands for the module's, which imports the kernels."""
    record = dispatch.sm90.backend.BACKEND
    for name in ("name", "takes_raster"):
        assert getattr(dispatch.BACKENDS["hopper"], name) == getattr(record, name)


def test_chosen_backend_needs_no_arrays():
    choice = chosen_backend(
        jax.ShapeDtypeStruct(SHAPE, jnp.bfloat16), grid=GRID, order="tiled"
    )
    assert choice.name == "xla"
    assert "first choice for" in choice.reason


def problem_on(device):
    return Problem(
        head_dim=64,
        dtype="bfloat16",
        grid=GRID,
        order="tiled",
        device=device,
    )


HOPPER = Device(platform="gpu", kind="NVIDIA H100", compute_capability=(9, 0))


TILED = VideoGrid(1, 16, 32)  # blocks of 128 tokens
HOPPER_TAKES = {"grid": TILED, "head_dim": 128, "dtype": "bfloat16"}


def test_hopper_runs_when_it_is_named():
    problem = dataclasses.replace(problem_on(HOPPER), **HOPPER_TAKES)
    choice = dispatch.choose(problem, "hopper")
    assert choice.name == "hopper"
    assert choice.slower_because is None


def test_auto_takes_hopper():
    problem = dataclasses.replace(problem_on(HOPPER), **HOPPER_TAKES)
    choice = dispatch.choose(problem, "auto")
    assert choice.name == "hopper"
    assert choice.slower_because is None


@pytest.mark.parametrize(
    ("grid", "order", "cause"),
    [
        (VideoGrid(1, 45, 80), "raster", None),
        (VideoGrid(1, 30, 52), "tiled", None),
        (VideoGrid(1, 30, 52), "raster", 'tiles 16 tokens wide; order="tiled" is'),
        (
            VideoGrid(1, 15, 26),
            "tiled",
            "start and end at multiples of 8 tokens",
        ),
        (VideoGrid(1, 5, 16), "tiled", None),  # too few tokens to matter
        (VideoGrid(1, 22, 40, tile=(6, 20)), "tiled", None),
        (VideoGrid(1, 22, 40, tile=(11, 10)), "tiled", "multiples of 8 tokens"),
    ],
    ids=str,
)
def test_auto_says_when_hopper_copies_row_by_row(grid, order, cause):
    problem = dataclasses.replace(
        problem_on(HOPPER), head_dim=128, grid=grid, order=order
    )
    choice = dispatch.choose(problem, "auto")
    assert choice.name == "hopper"
    if cause is None:
        assert choice.slower_because is None
    else:
        assert re.search(f"copied row by row.*{cause}", choice.slower_because)


def device_of(capability):
    return Device(platform="gpu", kind="Some GPU", compute_capability=capability)


REFUSED = {  # changes to a problem that the kernel takes, cause
    "ampere": ({"device": device_of((8, 0))}, r"sm_90\), not gpu Some GPU \(sm_80"),
    "blackwell": ({"device": device_of((10, 0))}, r"not gpu Some GPU \(sm_100\)"),
    "amd": ({"device": device_of(None)}, "Hopper GPU .* not gpu Some GPU"),
    "cpu": ({"device": Device(platform="cpu")}, "Hopper GPU .* not cpu"),
    "dtype": ({"dtype": "float32"}, "bfloat16 and float16, not float32"),
    "head-dim": ({"head_dim": 96}, "head dimension of 64 and 128, not 96"),
    "block-size": ({"grid": GRID}, r"to 128 tokens, such as tile \(8, 16\), not 4"),
    "large-blocks": ({"grid": VideoGrid(1, 8, 17, tile=(8, 17))}, "not 136"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_hopper_says_why_it_does_not_run(case):
    changes, cause = REFUSED[case]
    problem = dataclasses.replace(problem_on(HOPPER), **(HOPPER_TAKES | changes))
    with pytest.raises(
        ValueError, match=f"'hopper' cannot.*{cause}.*'auto' would run 'xla'"
    ):
        dispatch.choose(problem, "hopper")
    choice = dispatch.choose(problem, "auto")
    assert choice.name == "xla"
    if problem.device.platform == "gpu":
        assert re.search(cause, choice.slower_because)


def test_gpu_without_fused_kernel_is_slower():
    choice = dispatch.choose(problem_on(HOPPER), "auto")
    assert choice.name == "xla"
    assert "through the memory of NVIDIA H100" in choice.slower_because
    assert dispatch.choose(problem_on(HOPPER), "xla").slower_because is None
    assert dispatch.choose(problem_on(Device(platform="cpu")), "auto") == (
        dispatch.BackendChoice(
            name="xla",
            reason="first choice for cpu (unknown) that supports the inputs",
        )
    )


def test_unsupported_preference_is_passed_over_with_its_cause(monkeypatch):
    hopper = dataclasses.replace(
        dispatch.BACKENDS["xla"],
        name="hopper",
        why_unsupported=lambda problem: "needs compute capability 9.0",
    )
    monkeypatch.setitem(dispatch.BACKENDS, "hopper", hopper)
    monkeypatch.setitem(dispatch.PREFERENCE, "gpu", ("hopper", "xla"))
    choice = dispatch.choose(problem_on(HOPPER), "auto")
    assert choice.name == "xla"
    assert "'hopper': needs compute capability 9.0" in choice.reason
    assert "'hopper': needs compute capability 9.0" in choice.slower_because
    monkeypatch.setitem(dispatch.PREFERENCE, "gpu", ("hopper",))
    with pytest.raises(ValueError, match=r"no backend supports.*compute capability"):
        dispatch.choose(problem_on(HOPPER), "auto")


def test_slower_path_warns_once(monkeypatch):
    monkeypatch.setattr(dispatch, "current_device", lambda *arrays: HOPPER)
    forget_warnings()
    with pytest.warns(
        SlowBackendWarning, match="'xla': .*it gathers .*memory of NVIDIA H100"
    ):
        block_sparse_attention(**arguments())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        block_sparse_attention(**arguments())
        block_sparse_attention(**arguments(), backend="xla")
    forget_warnings()
    with pytest.warns(SlowBackendWarning):
        block_sparse_attention(**arguments())


@pytest.mark.parametrize("side", ["after", "before"])
def test_traced_text_lengths_are_clipped(side):
    """The lengths that backends get, of which some read no further than they say."""
    grid = dataclasses.replace(GRID, text_side=side)
    q = jnp.zeros((4, *SHAPE[1:]))
    clip = jax.jit(lambda x: validation.check_text_lengths(x, q, grid))
    np.testing.assert_array_equal(clip(jnp.array([-5, 99, 2, 4])), [0, 3, 2, 3])


ATTENTIONS = {
    "xla": functools.partial(block_sparse_attention, backend="xla"),
    "oracle": functools.partial(block_sparse_attention, backend="oracle"),
    "dense": lambda q, k, v, mask, order, **options: dense_attention(
        q, k, v, **options
    ),
}


@pytest.mark.parametrize("side", ["after", "before"])
@pytest.mark.parametrize("attend", ATTENTIONS.values(), ids=ATTENTIONS)
def test_traced_text_lengths_act_like_the_nearest_inside(attend, side):
    grid = dataclasses.replace(GRID, text_side=side)
    values = jax.random.normal(jax.random.key(0), SHAPE)
    call = functools.partial(attend, **arguments(v=values, mask=full(grid), grid=grid))
    got = jax.jit(lambda x: call(text_lengths=x))(jnp.array([-5, 99]))
    np.testing.assert_array_equal(got, call(text_lengths=jnp.array([0, 3])))
    assert not np.allclose(got, call())

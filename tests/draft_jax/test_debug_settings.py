"""Every public function under the settings by which jax looks for faults.

Each gives what it gives without them, from arrays of NumPy and of jax alike.
"""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from draft_jax import Correction, VideoGrid, draft_attention
from tests.cases import mostly_nightly
from tests.draft_jax import public_calls
from tests.draft_jax.public_calls import CALLS, CONFIG

# Settings of jax that look for faults, or change what programs compute with.
SETTINGS = {
    "disable_jit": {"jax_disable_jit": True},
    "promotion": {
        "jax_numpy_rank_promotion": "raise",
        "jax_numpy_dtype_promotion": "strict",
    },
    "debug_infs": {"jax_debug_infs": True},
    "debug_nans": {"jax_debug_nans": True},
    "enable_x64": {"jax_enable_x64": True},
    "check_tracer_leaks": {"jax_check_tracer_leaks": True},
    "debug_key_reuse": {"jax_debug_key_reuse": True},
    "enable_checks": {"jax_enable_checks": True},
    "matmul_precision": {"jax_default_matmul_precision": "highest"},
}
CHECKS = {
    "index": checkify.index_checks,
    "float": checkify.float_checks,
    "all": checkify.all_checks,
}
# A grid for each setting: some are read where a program is compiled, and a program that
# another test compiled would pass. All have short tiles and text.
GRIDS = {
    name: VideoGrid(2, 3, 5 + 2 * index, tile=(2, 4), text_length=3)
    for index, name in enumerate((*SETTINGS, *CHECKS, "transfers"))
}
ATTENTION = "draft_jax.draft_attention percentile"
SELECTION = "pallas_kernels.ranking.select_in_rows"
QUICK = {  # calls of each setting that take little time
    "disable_jit": (SELECTION,),
    "promotion": (ATTENTION, "pallas_kernels.pooling.norm_rope_pool"),
    "debug_infs": ("draft_jax.draft_attention gradient",),
    "index": (SELECTION, "draft_jax.BlockMask from_dense"),
}


@contextlib.contextmanager
def under(settings):
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def check_equal(got, want):
    got, want = jax.tree.leaves(got), jax.tree.leaves(want)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def cases(settings):
    """Pairs of a setting and a call."""
    pairs = [(name, call) for name in settings for call in CALLS]
    fast = [(name, call) for name in settings for call in QUICK.get(name, ())]
    return pytest.mark.parametrize("case", mostly_nightly(pairs, fast), ids=join)


def join(case):
    return " ".join(map(str, case))


@cases(SETTINGS)
def test_settings_change_nothing(case):
    name, call = case
    inputs = public_calls.make_inputs(GRIDS[name])
    with under(SETTINGS[name]):
        got = jax.block_until_ready(CALLS[call](inputs))
    check_equal(got, CALLS[call](inputs))


def corrected_call(name):
    """A call of more tokens than those of CALLS: a correction begins at 1,024."""
    columns = 32 + [*SETTINGS, *CHECKS].index(name)
    inputs = public_calls.make_inputs(
        VideoGrid(1, 32, columns, tile=(4, 8), text_length=3)
    )
    config = dataclasses.replace(CONFIG, correction=Correction())

    def run(inputs, **changes):
        return public_calls.attend(inputs, config=config, **changes)

    return lambda: (run(inputs), public_calls.gradients(run, inputs))


@pytest.mark.nightly
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_change_nothing_of_a_correction(name):
    call = corrected_call(name)
    with under(SETTINGS[name]):
        got = jax.block_until_ready(call())
    check_equal(got, call())


@pytest.mark.nightly
@pytest.mark.parametrize("name", CHECKS)
def test_checkify_finds_nothing_in_a_correction(name):
    call = corrected_call(name)
    error, got = checkify.checkify(call, errors=CHECKS[name])()
    error.throw()
    check_equal(got, call())


@cases(CHECKS)
def test_checkify_finds_nothing(case):
    name, call = case
    inputs = public_calls.make_inputs(GRIDS[name])
    checked = checkify.checkify(lambda: CALLS[call](inputs), errors=CHECKS[name])
    error, got = checked()
    error.throw()
    check_equal(got, CALLS[call](inputs))


def test_arrays_on_the_device_are_not_moved():
    """Like functions of jax, it hands no constant to the device in a second call."""
    inputs = public_calls.make_inputs(GRIDS["transfers"])
    call = CALLS["draft_jax.draft_attention percentile"]
    want = jax.block_until_ready(call(inputs))
    with jax.transfer_guard("disallow"):
        got = jax.block_until_ready(call(inputs))
    check_equal(got, want)


ORDERS_AND_GRIDS = [
    (order, VideoGrid(2, *frame, tile=(2, 4), text_length=text, text_side=side))
    for order in ("raster", "tiled")
    for frame in ((4, 8), (3, 7))
    for text, side in ((0, "after"), (3, "after"), (3, "before"))
]


@pytest.mark.parametrize(
    "case",
    mostly_nightly(
        [
            (*case, call)
            for case in ORDERS_AND_GRIDS
            for call in CALLS
            if "ttention" in call or case[1] == ORDERS_AND_GRIDS[-1][1]
        ],
        [
            (*case, "draft_jax.draft_attention top_p")
            for case in ORDERS_AND_GRIDS
            if case[1].text_length and case[1].height == 3
        ],
    ),
    ids=join,
)
def test_arrays_of_numpy(case):
    order, grid, call = case
    of_jax, of_numpy = (
        public_calls.make_inputs(grid, order, convert)
        for convert in (jnp.asarray, np.asarray)
    )
    got, want = CALLS[call](of_numpy), CALLS[call](of_jax)
    check_equal(got, want)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(got))


def test_float64_of_numpy_becomes_float32():
    """As in functions of jax."""
    inputs = public_calls.make_inputs(GRIDS["transfers"])
    wide = (np.asarray(x, np.float64) for x in (inputs.q, inputs.k, inputs.v))
    got = draft_attention(*wide, grid=inputs.grid, config=CONFIG)
    narrow = (inputs.q, inputs.k, inputs.v)
    check_equal(got, draft_attention(*narrow, grid=inputs.grid, config=CONFIG))

"""The fixture `no_races` sees a race, or the tests that use it say little."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

FIELDS = {field.name for field in dataclasses.fields(plgpu.InterpretGPUParams)}
# Newer jax raises at the first race unless told otherwise; the fixture must do without.
WARNS = {"on_race": "warn"} if "on_race" in FIELDS else {}
INTERPRET = plgpu.InterpretGPUParams(detect_races=True, **WARNS)


def write_one_word(num_warpgroups):
    """Each warpgroup writes 1 to the same place, without a barrier."""

    def body(out_gmem):
        out_gmem[0] = jnp.int32(1)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((1,), jnp.int32),
        num_threads=num_warpgroups,
        thread_name="wg",
        interpret=INTERPRET,
    )()


@pytest.mark.parametrize(
    ("warpgroups", "racing"),
    [
        ((1, 1), None),
        ((2, 1), r"launches \[0\] of 2"),
        ((1, 2), r"launches \[1\] of 2"),
    ],
    ids=str,
)
def test_a_race_in_any_launch_is_found(launches, warpgroups, racing):
    for number in warpgroups:
        assert write_one_word(number) == 1  # the race does not show in the value
    if racing is None:
        launches.check()
        return
    with pytest.raises(AssertionError, match=racing):
        launches.check()

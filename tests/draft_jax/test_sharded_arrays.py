"""Operations under a mesh: each device computes its own batch items and heads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.draft_jax.sharded_cases import (
    CALLS,
    CUT_TOKENS,
    LEFT_OUT,
    MODES,
    OPERATIONS,
    TOKEN_MODES,
)

ROOT = Path(__file__).parents[2]
# Largest error measured, relative to the largest value: 2.4e-6, of a gradient of dense
# attention whose scale is traced.
MOST_ERROR = 8e-6
# Bytes of a gradient of scales, rotations and the like; a device has 58 kB of q.
MOST_SHARED_BYTES = 8192
# It is for tests, and XLA alone runs it: under automatic axes its loop gathers.
ORACLE = "pallas_kernels.block_sparse_attention_with_lse oracle"


def run(*cases: str) -> dict[str, dict]:
    command = [sys.executable, "-m", "tests.draft_jax.sharded_cases", *cases]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def check(case: str, found: dict) -> None:
    assert "raised" not in found, f"{case}: {found['raised']}"
    assert max(found["errors"]) <= MOST_ERROR, case
    if case.endswith("gradient of shared"):
        assert {*found["collectives"]} <= {"all-reduce", "all-gather"}, case
        assert max(found["collectives"].values()) <= MOST_SHARED_BYTES, case
        return
    if ORACLE in case and not case.startswith(("explicit", "manual")):
        return
    assert found["collectives"] == {}, case
    assert found["whole axes"] == [], f"{case}: a device computes what others do, too"
    assert all(found["wanted"]), f"{case}: sharded as {found['sharded as']}"


def test_each_public_call_is_sharded():
    gradients = {name for name in CALLS if name.endswith(" gradient")}
    assert {*CALLS} - {*LEFT_OUT} - gradients <= {*OPERATIONS}
    assert {name.removesuffix(" gradient") for name in gradients} <= {
        name.split(" ")[0] for name in OPERATIONS
    }


@pytest.mark.nightly
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("mode", MODES)
def test_each_device_computes_its_own_in_every_call(mode):
    """Forward and backward: nothing is sent but gradients of what devices share."""
    found = run(mode)
    for name in OPERATIONS:
        assert f"{mode}, {name}, forward" in found
    for case, result in found.items():
        check(case, result)


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_sharded_tokens_are_gathered_or_refused():
    """A call that needs whole tokens says so where their type says how they lie."""
    found = run(*TOKEN_MODES)
    assert len(found) == 2 * len({*OPERATIONS} - {*CUT_TOKENS})
    for case, result in found.items():
        if "raised" in result:
            assert case.startswith("explicit"), f"{case}: {result['raised']}"
            assert "is sharded over 'x' along its tokens" in result["raised"], case
            assert "jax.sharding.reshard" in result["raised"], case
        else:
            assert max(result["errors"]) <= MOST_ERROR, case
    for name in (
        "draft_jax.draft_attention percentile",
        "scheduled_attention, traced",
    ):
        assert "raised" in found[f"explicit tokens, {name}"]


@pytest.mark.nightly
def test_what_does_not_fit_is_told():
    (found,) = run("misfits").values()
    assert "q is sharded over 'x' along its tokens" in found["raised"]
    assert "jax.sharding.reshard" in found["raised"]
    told = " ".join(found["warned"])
    assert "q is sharded over 'x' along its tokens" in told
    assert "It is gathered, and devices compute the same" in told
    assert "with_sharding_constraint" in told
    told = " ".join(found["warned, uneven"])
    assert "along its heads, of which there are 20, no multiple of 8" in told
    assert max(found["error"], found["error, uneven"]) <= MOST_ERROR


@pytest.mark.nightly
def test_layers_of_flax_keep_heads_sharded():
    """What the output's projection adds up is all that is communicated."""
    for name, found in run("flax layers")["flax layers"].items():
        assert found["collectives"] == ["all-reduce"], name
        assert found["whole axes"] == [], name
        assert found["error"] <= MOST_ERROR, name

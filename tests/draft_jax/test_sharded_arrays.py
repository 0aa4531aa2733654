"""Operations under a mesh: each device computes its own batch items and heads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.draft_jax.sharded_cases import MODES, OPERATIONS

ROOT = Path(__file__).parents[2]
# Largest error measured, relative to the largest value: 4e-7, of an RMS norm.
MOST_ERROR = 2e-6
QUICK = ["draft/automatic", "sparse, gradient/manual"]


def run(*cases: str) -> dict[str, dict]:
    command = [sys.executable, "-m", "tests.draft_jax.sharded_cases", *cases]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def check(case: str, found: dict) -> None:
    assert "raised" not in found, f"{case}: {found['raised']}"
    assert found["collectives"] == [], case
    assert found["whole axes"] == [], f"{case}: a device computes what others do, too"
    assert all(found["wanted"]), f"{case}: sharded as {found['sharded as']}"
    assert max(found["errors"]) <= MOST_ERROR, case


@pytest.mark.nightly
def test_each_device_computes_its_own():
    for case, found in run(*QUICK).items():
        check(case, found)


@pytest.mark.nightly
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mode", MODES)
def test_each_device_computes_its_own_in_every_operation(mode):
    names = [*OPERATIONS]
    if mode == "explicit vmap":
        names.remove("pool")  # JAX has no rule for the product of `draft_scores`
    for case, found in run(*(f"{name}/{mode}" for name in names)).items():
        check(case, found)


@pytest.mark.nightly
def test_what_does_not_fit_is_told():
    (found,) = run("misfits").values()
    assert "q is sharded over 'x' along its tokens" in found["raised"]
    assert "jax.sharding.reshard" in found["raised"]
    told = " ".join(found["warned"])
    assert "compute_mask: pooled is sharded along parts of axes" in told
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

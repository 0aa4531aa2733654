"""The example of "your own DiT": it gains draft attention in five changed lines."""

import difflib
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from draft_jax import DraftConfig
from examples import dit, dit_draft

ROOT = Path(__file__).parents[2]
LATENT = (2, 2, 12, 20, dit.CHANNELS)  # small, and tiles of 8 x 16 leave edge tiles


def changed_lines():
    """Lines that a diff adds or removes, in the form of `diff -U 0`, without files."""
    before, after = (
        (ROOT / "examples" / name).read_text().splitlines()
        for name in ("dit.py", "dit_draft.py")
    )
    lines = list(difflib.unified_diff(before, after, n=0, lineterm=""))[2:]
    return [line for line in lines if not line.startswith("@@")]


def run(example):
    latent = jax.random.normal(jax.random.key(1), LATENT)
    model = example.DiT(nnx.Rngs(0))
    return nnx.jit(model)(latent, jnp.full((LATENT[0], 1), 0.5))


def test_five_lines_change():
    added = [line for line in changed_lines() if line[0] == "+"]
    removed = [line for line in changed_lines() if line[0] == "-"]
    assert 1 <= len(added) <= 5
    assert len(removed) <= 1


def test_the_page_shows_this_difference():
    page = (ROOT / "docs" / "your_dit.md").read_text()
    (shown,) = re.findall(r"^```diff\n(.*?)^```", page, flags=re.M | re.S)
    changes = [line for line in shown.splitlines() if line[:1] in ("+", "-")]
    assert changes == changed_lines()


def test_dense_and_draft_agree_where_nothing_is_skipped(monkeypatch):
    monkeypatch.setattr(dit_draft, "DRAFT", DraftConfig.paper(sparsity=0.0))
    np.testing.assert_allclose(run(dit_draft), run(dit), rtol=0, atol=2e-5)


def test_a_sparse_result_differs():
    """So the test above compares two ways of attention, not one with itself."""
    difference = jnp.abs(run(dit_draft) - run(dit)).max()
    assert jnp.isfinite(difference)
    assert difference > 1e-3


@pytest.mark.parametrize("example", [dit, dit_draft], ids=["dit", "dit_draft"])
def test_it_is_short_and_has_gradients(example):
    lines = Path(example.__file__).read_text().splitlines()
    assert len([line for line in lines if line.strip()]) <= 60

    def loss(model, latent):
        return (model(latent, jnp.zeros((1, 1))) ** 2).mean()

    latent = jax.random.normal(jax.random.key(2), (1, *LATENT[1:]))
    gradients = nnx.jit(nnx.grad(loss))(example.DiT(nnx.Rngs(0)), latent)
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(gradients))

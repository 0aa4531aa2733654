"""What other libraries are given, and what is recorded of those that fail or differ."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.attention import contenders
from benchmarks.attention import run as attention
from benchmarks.attention.contenders import CONTENDERS, Contender
from benchmarks.attention.plot import LABELS
from benchmarks.common import agreement
from benchmarks.common.shapes import Shape
from benchmarks.common.timing import measure
from draft_jax import BlockMask, VideoGrid
from pallas_kernels import block_sparse_attention, dense_attention

GRID = VideoGrid(1, 16, 32)  # four blocks


def test_rows_of_lists():
    dense = np.zeros((1, 2, 4, 4), bool)
    dense[0, 0] = [[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 1]]
    dense[0, 1, 3, 2] = True
    mask = BlockMask.from_dense(jnp.asarray(dense), grid=GRID, capacity=9)
    counts, indices = contenders.rows_of_lists(mask)
    np.testing.assert_array_equal(counts, [[[2, 0, 4, 1], [0, 0, 0, 1]]])
    np.testing.assert_array_equal(
        indices[0, 0], [[0, 2, 0, 0], [0, 0, 0, 0], [0, 1, 2, 3], [3, 0, 0, 0]]
    )
    np.testing.assert_array_equal(indices[0, 1, 3], [2, 0, 0, 0])


def test_libraries_of_others_may_be_missing():
    needing = {name for name, each in CONTENDERS.items() if each.needs is not None}
    assert needing == {"fa3", "fa4", "fa4_sparse", "flex_attention"}
    for needs in ("no_such_package", "no_such_package.part", "json.no_such_part"):
        assert not Contender(make=pytest.fail, needs=needs).is_installed
    assert Contender(make=pytest.fail, needs="json.decoder").is_installed
    assert CONTENDERS["ours"].is_installed


def test_a_failing_library_is_recorded():
    def make():
        raise ValueError("short blocks")

    result = measure(make, 1.0, 0.1)
    assert result == {"error": "ValueError: short blocks"}


class Tensor(np.ndarray):
    """What `agreement.rows_at` asks of a PyTorch tensor."""

    def float(self):
        return self.astype(np.float32)

    def cpu(self):
        return self

    def numpy(self):
        return np.asarray(self)


def outputs():
    grid = VideoGrid(1, 12, 40, text_length=3)
    out = np.random.default_rng(0).normal(size=(2, grid.num_tokens, 3, 8))
    tokens = agreement.one_token_of_each_block(grid)
    return out.astype(np.float32), tokens


def test_tokens_are_one_of_each_block():
    grid = VideoGrid(2, 12, 40, text_length=130)
    block_of = np.repeat(np.arange(grid.num_blocks), grid.block_lengths)
    tokens = agreement.one_token_of_each_block(grid)
    np.testing.assert_array_equal(block_of[tokens], np.arange(grid.num_blocks))


@pytest.mark.parametrize("kind", ["jax", "torch", "tuple"])
def test_rows_of_either_library(kind):
    out, tokens = outputs()
    given = {
        "jax": lambda: jnp.asarray(out),
        "torch": lambda: out.view(Tensor),
        "tuple": lambda: (out.view(Tensor), None),
    }[kind]()
    rows = agreement.rows_at(given, tokens)
    assert type(rows) is np.ndarray
    np.testing.assert_array_equal(rows, out[:, tokens])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.at[1, 2, 0].multiply(1.03), "differs from ours: relative error 0"),
        (lambda x: x.at[1, 2, 0, 5].set(jnp.nan), "relative error nan"),
        (lambda x: x[:, :, :2], r"rows of shape \(2, 7, 2, 8\), not \(2, 7, 3, 8\)"),
    ],
    ids=["one-row", "nan", "shape"],
)
def test_another_output_is_refused(change, message):
    out, tokens = outputs()
    want = out[:, tokens]
    got = change(jnp.asarray(want))
    result = agreement.compare(got, want, np.arange(len(tokens)))
    assert result.keys() == {"error"}
    assert re.search(message, str(result["error"]))


@pytest.fixture
def on_cpu(monkeypatch, tmp_path):
    """Runs the command on a small shape, with XLA in place of every library."""

    def program(grid):
        run = functools.partial(
            block_sparse_attention, grid=grid, order="tiled", backend="xla"
        )
        return jax.jit(run)

    def other_mask(shape, qkv, mask):
        ids = (mask.block_ids + 1) % shape.grid.num_blocks
        return contenders.ours(shape, qkv, dataclasses.replace(mask, block_ids=ids))

    def dense(shape, qkv):
        return functools.partial(dense_attention, *qkv), jax.block_until_ready

    shape = Shape(grid=VideoGrid(2, 16, 32), num_heads=2, head_dim=16, dtype="float32")
    sparse = {
        "ours": contenders.ours,
        "flex_attention": contenders.ours,
        "fa4_sparse": other_mask,
    }
    table = {
        name: Contender(make=make, is_sparse=True) for name, make in sparse.items()
    }
    table["cudnn"] = Contender(make=dense)
    table["fa3"] = Contender(make=pytest.fail, needs="no_such_package.part")
    monkeypatch.setattr(contenders, "_our_program", program)
    monkeypatch.setattr(attention, "SHAPES", {"small": shape})
    monkeypatch.setattr(attention, "CONTENDERS", table)

    def run():
        path = tmp_path / "results.json"
        options = ["--densities", "0.3", "--seconds", "0", "--output", str(path)]
        try:
            attention.main([*options, "--masks", "random"])
        finally:
            run.results = json.loads(path.read_text())["results"]

    return run


def test_outputs_are_compared_with_ours(on_cpu):
    on_cpu()
    records = {(r["contender"], r["mask"]): r for r in on_cpu.results}
    assert records["ours", "random"]["error_to_ours"] == 0
    assert records["flex_attention", "random"]["error_to_ours"] == 0
    assert 0 < records["cudnn", "dense"]["error_to_ours"] < 1e-5
    other = records["fa4_sparse", "random"]
    assert other["error"].startswith("differs from ours: relative error ")
    assert "median_ms" not in other
    missing = records["fa3", "dense"]
    assert missing["error"] == "no_such_package.part is not installed"
    assert "median_ms" not in missing


def test_the_command_fails_where_ours_does(on_cpu, monkeypatch):
    def broken(grid):
        raise ValueError("no Hopper")

    monkeypatch.setattr(contenders, "_our_program", broken)
    with pytest.raises(SystemExit, match="kernel failed in 1 of"):
        on_cpu()
    records = {(r["contender"], r["mask"]): r for r in on_cpu.results}
    assert records["ours", "random"]["error"] == "ValueError: no Hopper"
    assert "error_to_ours" not in records["cudnn", "dense"]
    assert records["cudnn", "dense"]["median_ms"] > 0  # timed all the same


def test_every_contender_has_a_label():
    assert {contender for contender, _ in LABELS} == CONTENDERS.keys()

"""How `benchmarks.layer.run` attributes the time of a layer, and its own commands."""

import json

import pytest

from benchmarks.common.timing import slowdown
from benchmarks.layer import account as layer_account
from benchmarks.layer import means_stages
from benchmarks.layer import plot as layer_plot
from benchmarks.layer import run as layer

ATTENTION = "block_sparse_attention_sm90_mosaic_gpu_kernel"
SPARSE = [("sort_1", 0.25), (ATTENTION, 30.0), ("fusion", 0.5), (ATTENTION, 0.125)]
LAYER = [
    ("pool_tiles_sm90_mosaic_gpu_kernel", 0.5),
    ("sm80_xmma_gemm_f32f32", 0.125),
    ("fusion_71", 1.0),
    ("sort_1", 0.5),
    (ATTENTION, 28.0),
    ("fusion", 0.25),
    (ATTENTION, 0.125),
]


def kernels(rows):
    return [{"name": name, "ms": ms} for name, ms in rows]


def test_beyond_attention_is_all_but_its_longest_launch():
    account = layer_account.attention_account(kernels(LAYER))
    assert account == {"attention_ms": 28.0, "beyond_ms": 2.5}
    assert layer_account.attention_account(kernels(LAYER[:4])) == {}


def test_groups_of_a_layer():
    """Hand-worked: 0.25 of order from the sparse stage, 0.375 of repair of its own."""
    assert layer_account.groups(kernels(LAYER), kernels(SPARSE)) == {
        "pooling": 0.5,
        "logits": 0.125,
        "selection": 1.25,
        "order and repair": 0.625,
    }


def test_a_layer_that_drafts_nothing_selects_nothing():
    """A reused mask: what it does before is the order of work, however long."""
    reuse = [("sort_1", 0.5), *SPARSE[1:]]
    assert layer_account.groups(kernels(reuse), kernels(SPARSE)) == {
        "pooling": 0.0,
        "logits": 0.0,
        "selection": 0.0,
        "order and repair": 1.125,
    }


def test_no_groups_without_the_sparse_stage():
    assert layer_account.groups(kernels(LAYER), []) is None


def test_groups_are_of_the_same_sparsity():
    results = {
        "sparse/0.75": {"kernels": kernels([("sort_1", 1.0), (ATTENTION, 60.0)])},
        "sparse/0.9": {"kernels": kernels(SPARSE)},
        "layer/raster/0.75": {"kernels": kernels(LAYER)},
        "scheduled/refresh": {"kernels": kernels(LAYER)},
        "mask/tiled": {"kernels": kernels(LAYER[:3])},
        "failed": {"error": "cause"},
    }
    layer.add_groups(results)
    order = "order and repair"
    assert results["layer/raster/0.75"]["groups_ms"][order] == 1.375
    assert results["scheduled/refresh"]["groups_ms"][order] == 0.625
    assert "groups_ms" not in results["mask/tiled"]


def test_losses_of_raster_order_are_those_of_each_round():
    times = {"tiled": {"ms": [10.0, 20.0, 10.0]}, "raster": {"ms": [10.5, 20.0, 9.9]}}
    found = slowdown(times, "raster", over="tiled")
    assert found["losses"] == pytest.approx([0.05, 0.0, -0.01])
    assert found["loss"] == 0.0


def test_parts_of_a_file_keep_the_others(tmp_path):
    path = tmp_path / "folder" / "layer.json"
    layer.update(path, results={"a": 1})
    layer.update(path, turns=[2])
    layer.update(path, results={"b": 3})
    assert json.loads(path.read_text()) == {"results": {"b": 3}, "turns": [2]}


def test_pairs_that_take_turns():
    cases = layer.turn_cases("hunyuan")
    grids = [shape.grid for shape, _ in cases.values()]
    assert [sparsity for _, sparsity in cases.values()] == [0.9, 0.75, 0.9, 0.9]
    assert [grid.text_length for grid in grids] == [0, 0, 256, 0]
    assert grids[-1].width == 52


def test_plot_needs_groups(tmp_path):
    account = {"attention_ms": 28.0, "median_ms": 30.0}
    parts = layer_account.groups(kernels(LAYER), kernels(SPARSE))
    stages = {name: account | {"groups_ms": parts} for name in layer_plot.BARS.values()}
    document = {
        "environment": {"device": "cpu", "versions": {"jax": "0"}},
        "shape": layer.problem("tiny"),
        "results": stages | {"dense": {"median_ms": 300.0}},
    }
    path = tmp_path / "layer.json"
    path.write_text(json.dumps(document))
    layer_plot.plot(path, tmp_path / "layer.png")
    assert (tmp_path / "layer.png").stat().st_size > 0
    del stages["scheduled/reuse"]
    path.write_text(json.dumps(document | {"results": stages}))
    with pytest.raises(SystemExit, match="scheduled/reuse"):
        layer_plot.plot(path, tmp_path / "layer.png")


def test_the_summary_is_of_the_most_means_and_of_one_run():
    results = {
        "sparse/0.9": {"attention_ms": 28.0},
        "sparse-means/32nd": {"attention_ms": 35.0},
        "sparse-means/16th": {"attention_ms": 42.0},
        "layer-means/32nd": {"attention_ms": 35.0, "beyond_ms": 2.25},
        "layer-means/16th": {"attention_ms": 42.0, "beyond_ms": 2.5},
    }
    assert means_stages.summary(results) == {
        "overhead_ms": 2.5,
        "kernel_ratio_32nd": 1.25,
        "kernel_ratio_16th": 1.5,
    }


def test_the_summary_leaves_out_what_was_not_measured():
    results = {
        "sparse/0.9": {"error": "cause"},
        "sparse-means/32nd": {"attention_ms": 35.0},
        "layer-means/32nd": {"median_ms": 40.0},
    }
    assert means_stages.summary(results) == {}


@pytest.mark.nightly
def test_stages_with_means_run(tmp_path):
    path = tmp_path / "layer.json"
    arguments = ["measure", "--shape", "tiny", "--samples", "1", "--output", str(path)]
    options = layer.parse([*arguments, "--only", "means|spread|sub-tiles"])
    options.run(options)
    results = json.loads(path.read_text())["results"]
    stages = {
        f"{kind}/{n}"
        for kind in ("layer-means", "sparse-means", "means")
        for n in ("32nd", "16th")
    }
    assert stages <= set(results)
    assert not [name for name, result in results.items() if "error" in result]

"""Folders of runs side by side, by hand, joined to one."""

import json

import numpy as np
import pytest

from benchmarks.quality import merge

HEAD = {"setup": {"tile": [8, 16]}, "device": "card", "jax": "1.2"}


def trial(name, **fields):
    return {
        "part": "floor",
        "name": name,
        "density": 1.0,
        "clips": {"psnr": [40.0]},
    } | fields


def write(folder, record, **arrays):
    folder.mkdir()
    (folder / "quality.json").write_text(json.dumps(HEAD | record))
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return str(folder)


@pytest.fixture
def folders(tmp_path):
    layers = [
        {"name": "paper", "step": 4, "density": d, "kept": 0.5} for d in (0.2, 0.1)
    ]
    first = {
        "trials": [trial("a"), trial("b")],
        "layers": layers[:1],
        "top_p": {},
        "dense_steps_ms": {"reporting": [1.0]},
        "environments": [{"commit": "one"}],
    }
    second = {
        "trials": [trial("b", clips={"psnr": [1.0]}), trial("c")],
        "layers": layers,
        "top_p": {"0.1": 0.7},
        "dense_steps_ms": {"reporting": [2.0], "tuning": [3.0]},
        "environments": [{"commit": "two"}],
    }
    return (
        write(tmp_path / "a", first, frames_dense=np.zeros(1)),
        write(tmp_path / "b", second, frames_dense=np.ones(1), maps_paper=np.ones(2)),
    )


def test_what_both_have_is_of_the_first(folders, tmp_path):
    merge.main([*folders, "--output", str(tmp_path / "lab")])
    record = json.loads((tmp_path / "lab" / "quality.json").read_text())
    assert [row["name"] for row in record["trials"]] == ["a", "b", "c"]
    assert record["trials"][1]["clips"] == {"psnr": [40.0]}
    assert [row["density"] for row in record["layers"]] == [0.2, 0.1]
    assert record["top_p"] == {"0.1": 0.7}
    assert record["dense_steps_ms"] == {"reporting": [1.0], "tuning": [3.0]}
    assert [entry["commit"] for entry in record["environments"]] == ["one", "two"]
    assert record["summary"]["psnr_floor"] == pytest.approx(40.0)
    assert np.load(tmp_path / "lab" / "frames_dense.npy") == [0.0]
    assert (np.load(tmp_path / "lab" / "maps_paper.npy") == 1.0).all()


def test_a_folder_may_be_joined_with_others_in_place(folders):
    merge.main([*folders, "--output", folders[0]])
    merge.main([*folders, "--output", folders[0]])
    with open(f"{folders[0]}/quality.json") as file:
        assert len(json.load(file)["trials"]) == 3


@pytest.mark.parametrize("field", ["setup", "device", "jax"])
def test_runs_that_do_not_compare_are_refused(field):
    other = HEAD | {field: "other"}
    with pytest.raises(ValueError, match=f"b has {field}='other', a has"):
        merge.merge([HEAD, other], ["a", "b"])

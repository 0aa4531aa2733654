"""Checkpoint files, whole, in shards, and damaged."""

import json
import os

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from models.checkpoints.safetensors_io import (
    CheckpointError,
    load_safetensors,
    save_safetensors,
)


def make_tensors():
    rng = np.random.default_rng(0)
    tensors = {f"key.{i}": rng.normal(size=(4, 8)).astype(np.float32) for i in range(5)}
    tensors["narrow"] = rng.normal(size=16).astype(ml_dtypes.bfloat16)
    return tensors


def assert_same(reader, tensors):
    assert set(reader) == set(tensors)
    assert len(reader) == len(tensors)
    for key, value in tensors.items():
        assert reader[key].dtype == value.dtype
        np.testing.assert_array_equal(reader[key], value)


def names_in(folder):
    return sorted(file.name for file in folder.iterdir())


def test_single_file(tmp_path):
    tensors = make_tensors()
    (file,) = save_safetensors(tensors, tmp_path, stem="model")
    assert names_in(tmp_path) == ["model.safetensors"]
    assert_same(load_safetensors(tmp_path), tensors)
    assert_same(load_safetensors(file), tensors)
    other = safetensors.numpy.load_file(file)  # the library's own reader agrees
    np.testing.assert_array_equal(other["key.3"], tensors["key.3"])


def test_shards(tmp_path):
    """Tensors of 128, 128, 128, 128, 128 and 32 bytes, at most 256 in a file."""
    tensors = make_tensors()
    files = save_safetensors(tensors, tmp_path, stem="model", max_shard_bytes=256)
    expected = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert [file.name for file in files] == expected
    assert names_in(tmp_path) == [*expected, "model.safetensors.index.json"]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 672}
    assert index["weight_map"]["key.2"] == expected[1]
    assert index["weight_map"].keys() == tensors.keys()
    assert_same(load_safetensors(tmp_path), tensors)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert_same(load_safetensors(tmp_path), tensors)


def test_other_shard_sizes_leave_nothing_of_the_last_run(tmp_path):
    other = tmp_path / "other.safetensors"
    save_safetensors({"x": np.zeros(3)}, tmp_path, stem="other")
    for limit in (128, None, 256):
        save_safetensors(make_tensors(), tmp_path, stem="model", max_shard_bytes=limit)
    assert len(names_in(tmp_path)) == 5  # three shards, the index, and the other
    assert other.is_file()
    assert_same(load_safetensors(tmp_path, stem="model"), make_tensors())


def test_a_tensor_larger_than_a_shard_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"key\.0 has 128 bytes; max_shard_bytes=100"):
        save_safetensors(make_tensors(), tmp_path, stem="model", max_shard_bytes=100)


def test_a_missing_shard_is_named(tmp_path):
    save_safetensors(make_tensors(), tmp_path, stem="model", max_shard_bytes=256)
    name = "model-00002-of-00003.safetensors"
    (tmp_path / name).unlink()
    for _ in ("with index", "without"):
        with pytest.raises(CheckpointError, match=rf"lacks the checkpoint .*'{name}'"):
            load_safetensors(tmp_path)
        (tmp_path / "model.safetensors.index.json").unlink(missing_ok=True)


def test_a_damaged_file_is_named(tmp_path):
    file = tmp_path / "model.safetensors"
    save_safetensors(make_tensors(), tmp_path, stem="model")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged or not"):
        load_safetensors(tmp_path)
    file.write_text("<html>404</html>")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged or not"):
        load_safetensors(file)


def test_a_file_that_changes_after_it_was_opened_is_named(tmp_path):
    """Its header was whole, so that only the reading of a key can tell."""
    (file,) = save_safetensors(make_tensors(), tmp_path, stem="model")
    reader = load_safetensors(file)
    os.truncate(file, file.stat().st_size - 672)
    for key in make_tensors():
        with pytest.raises(CheckpointError, match=rf"cannot read {key} from .*model\."):
            reader[key]


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'], ids=str)
def test_a_damaged_index_is_named(tmp_path, text):
    save_safetensors(make_tensors(), tmp_path, stem="model", max_shard_bytes=256)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json is not a safetensors ind"):
        load_safetensors(tmp_path)


def test_an_index_that_names_another_shard_is_refused(tmp_path):
    """Two keys that changed places: each exists, in the other's file."""
    save_safetensors(make_tensors(), tmp_path, stem="model", max_shard_bytes=256)
    file = tmp_path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    places = index["weight_map"]
    places["key.0"], places["key.2"] = places["key.2"], places["key.0"]
    file.write_text(json.dumps(index))
    message = (
        r"promises 2 keys that are not in their files: "
        r"key\.0 \(model-00002-of-00003\.safetensors\), key\.2 \(model-00001-of"
    )
    with pytest.raises(CheckpointError, match=message):
        load_safetensors(tmp_path)


def test_an_index_that_names_a_missing_key_is_refused(tmp_path):
    save_safetensors(make_tensors(), tmp_path, stem="model", max_shard_bytes=256)
    file = tmp_path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["absent"] = "model-00001-of-00003.safetensors"
    file.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"promises 1 keys .*: absent \(model-00"):
        load_safetensors(tmp_path)


def test_a_key_in_two_files_is_named(tmp_path):
    for part in (1, 2):
        name = f"model-0000{part}-of-00002.safetensors"
        safetensors.numpy.save_file({"twin": np.zeros(2)}, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"key twin is both in .*00001.* and in"):
        load_safetensors(tmp_path)


def test_which_checkpoint_is_unclear(tmp_path):
    with pytest.raises(CheckpointError, match="absent does not exist"):
        load_safetensors(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"checkpoints \[\]; expected exactly"):
        load_safetensors(tmp_path)
    for stem in ("one", "two"):
        save_safetensors(make_tensors(), tmp_path, stem=stem)
    with pytest.raises(CheckpointError, match=r"\['one', 'two'\]; expected exactly"):
        load_safetensors(tmp_path)
    with pytest.raises(CheckpointError, match="expected one called 'three'"):
        load_safetensors(tmp_path, stem="three")

"""Which family a path or a name belongs to; nothing is loaded but a tiny model."""

import pytest

from models import loading
from models.checkpoints.memory_map import CheckpointError
from tests import tiny_model
from tests.wan_folders import TEXT_TO_VIDEO


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def fail(*_, **__):
        pytest.fail("the hub is asked")

    monkeypatch.setattr("models.checkpoints.hub._fetch", fail)


def test_families_by_what_a_folder_holds(tmp_path):
    folder = tiny_model.save_checkpoint(tmp_path)
    assert loading.find_family(folder) is loading.MINI
    assert loading.find_family(str(TEXT_TO_VIDEO)) is loading.WAN
    assert loading.find_family(None) is loading.MINI


def test_names_of_repositories_are_looked_for_later(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert loading.find_family("Wan-AI/Wan2.1-T2V-1.3B") is loading.WAN


@pytest.mark.parametrize(
    "name",
    ["weights", "./weights", "~/weights", "a/b/c", "runs/model.safetensors", "here/x"],
)
def test_mistyped_paths_do_not_reach_the_hub(tmp_path, monkeypatch, name):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    nearest = tmp_path / "here" if name == "here/x" else tmp_path
    with pytest.raises(CheckpointError) as caught:
        loading.load_pipeline(name)
    message = str(caught.value)
    assert message.startswith(f"{name} does not exist; expected a folder, or a repos")
    assert f"of the path, {nearest} exists" in message
    assert ("without a folder here" in message) == (name == "here/x")

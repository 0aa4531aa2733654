"""Which family a path or a name belongs to; nothing is loaded but a tiny model."""

import dataclasses
import json
from pathlib import Path

import pytest

from models import loading
from models.checkpoints.memory_map import CheckpointError
from models.cli import main
from models.diffusion import dtypes
from models.diffusion.family import Family
from pallas_kernels.common import Device
from tests import tiny_model
from tests.wan_folders import TEXT_TO_VIDEO


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def fail(*_, **__):
        pytest.fail("the hub is asked")

    monkeypatch.setattr("models.checkpoints.hub._fetch", fail)


def test_families_by_what_a_folder_holds(tmp_path):
    folder = tiny_model.save_checkpoint(tmp_path)
    assert loading.find_family(folder)[0] is loading.MINI
    assert loading.find_family(str(TEXT_TO_VIDEO))[0] is loading.WAN
    assert loading.find_family(None)[0] is loading.MINI


SIGNS = {
    "wan": {"model_index.json": {"_class_name": "WanPipeline"}},
    "image": {"model_index.json": {"_class_name": "WanImageToVideoPipeline"}},
    "original": {"config.json": {"_class_name": "WanModel", "model_type": "t2v"}},
    "without": {"config.json": {"model_type": "i2v"}},
}


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Gives the hub a repository of small files; returns what was asked of it."""
    asked = []

    def put(files, commit="c0ffee"):
        folder = tmp_path / "snapshots" / commit
        folder.mkdir(parents=True)
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content))

        def fetch(name, *, allow_patterns, revision, cache_dir):
            asked.append((name, revision, allow_patterns))
            return folder

        monkeypatch.setattr("models.checkpoints.hub._fetch", fetch)
        return asked

    monkeypatch.chdir(tmp_path)
    return put


@pytest.mark.parametrize("files", SIGNS.values(), ids=SIGNS)
def test_repositories_tell_their_family_by_small_files(repository, files):
    asked = repository(files)
    assert loading.find_family("owner/tiny", revision="v1") == (loading.WAN, "c0ffee")
    ((name, revision, patterns),) = asked
    assert (name, revision) == ("owner/tiny", "v1")
    assert "model_index.json" in patterns
    assert all(pattern.endswith(".json") and "*" not in pattern for pattern in patterns)


def test_the_rest_of_a_repository_is_of_the_commit_that_was_looked_at(
    repository, monkeypatch
):
    asked = repository(SIGNS["wan"])
    seen = {}

    def load(path, **options):
        seen.update(options, path=path)
        return loading.MINI.load(None)

    family = dataclasses.replace(loading.WAN, load=load)
    monkeypatch.setattr(loading, "FAMILIES", (family, loading.MINI))
    loading.load_pipeline("owner/tiny", revision="v1")
    assert (seen["path"], seen["revision"]) == ("owner/tiny", "c0ffee")
    assert [revision for _, revision, _ in asked] == ["v1"]


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("StableDiffusionPipeline", "it names the class StableDiffusionPipeline; exp"),
        ("WanVACEPipeline", "owner/tiny: VACE, which edits videos, is not supported"),
    ],
)
def test_other_classes_are_named(repository, named, message):
    repository({"model_index.json": {"_class_name": named}})
    with pytest.raises(CheckpointError, match=message):
        loading.find_family("owner/tiny")


def test_a_third_family_is_one_record(tmp_path, monkeypatch, capsys):
    """By a file that it alone has, in every place that families are asked for."""
    (tmp_path / "third.json").write_text("{}")
    third = Family(
        name="Third",
        owns=lambda path: (path / "third.json").is_file(),
        describe=lambda path, **_: dataclasses.replace(
            loading.MINI.describe(None), path=Path(path)
        ),
        load=lambda path, **_: dataclasses.replace(loading.MINI.load(None), fps=99.0),
        load_codec=loading.MINI.load_codec,
        expected="a folder with third.json",
        takes=frozenset(["loras"]),
        hub_signs=("third.json",),
    )
    monkeypatch.setattr(loading, "FAMILIES", (*loading.FAMILIES, third))
    assert loading.load_pipeline(tmp_path).fps == 99.0
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"or a folder with third\.json"):
        loading.load_pipeline(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"^loras=.*: arguments that fit .* and Third"):
        loading.load_pipeline(None, loras=[("x.safetensors", 1.0)])
    command = ["generate", "a cat", "--output", str(tmp_path / "out")]
    chosen = ["--checkpoint", str(tmp_path), "--frames", "4"]
    assert main([*command, *chosen]) == 2
    assert "frames=4 must be 1 more than a multiple of 2" in capsys.readouterr().err
    assert main([*command, *chosen, "--vae", "x"]) == 2
    assert "--vae x fits HunyuanVideo and Wan models" in capsys.readouterr().err


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


@pytest.mark.parametrize("family", loading.FAMILIES, ids=lambda family: family.name)
def test_fp8_is_refused_before_anything_is_read_or_encoded(
    family, tmp_path, monkeypatch, capsys
):
    """On a card without it. Text beside JAX means that another process has looked."""

    def fail(*_, **__):
        pytest.fail("something is read")

    def not_used_yet():
        pytest.fail("JAX is used before the text is encoded")

    card = Device(platform="gpu", kind="A100", compute_capability=(8, 0))
    beside = family.text_beside_jax
    monkeypatch.setattr(
        dtypes, "current_device", not_used_yet if beside else lambda: card
    )
    monkeypatch.setattr(dtypes, "_device_apart", (lambda: card) if beside else fail)
    alone = dataclasses.replace(
        family, owns=lambda _: True, describe=fail, load=fail, refused={}
    )
    monkeypatch.setattr(loading, "FAMILIES", (alone,))
    with pytest.raises(ValueError, match=r"linears='float8'.*not gpu A100"):
        loading.load_pipeline(tmp_path, linears="float8")
    command = ["generate", "a cat", "--checkpoint", str(tmp_path)]
    assert main([*command, "--linears", "float8"]) == 2
    assert "linears='float8'" in capsys.readouterr().err

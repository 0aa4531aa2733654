"""Names to folders, with a stand-in for `huggingface_hub`: no hub is reachable."""

import sys
import types

import pytest

from models.checkpoints.hub import HubError, find_checkpoint, is_repository_name

PATTERNS = ["config.json", "*.safetensors"]
NAME = "Wan-AI/Wan2.1-T2V-1.3B"


class HubHTTPError(OSError):
    """As in `huggingface_hub.errors`, whose family this is."""


class RepositoryNotFoundError(HubHTTPError):
    pass


class GatedRepoError(RepositoryNotFoundError):
    pass


class RevisionNotFoundError(HubHTTPError):
    pass


class LocalEntryNotFoundError(FileNotFoundError):
    pass


class HFValidationError(ValueError):
    pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The module's part that is used; `hub.error` is raised if it is set."""
    module = types.ModuleType("huggingface_hub")
    module.errors = types.ModuleType("huggingface_hub.errors")
    for error in (
        RepositoryNotFoundError,
        GatedRepoError,
        RevisionNotFoundError,
        LocalEntryNotFoundError,
        HFValidationError,
    ):
        setattr(module.errors, error.__name__, error)
    module.error, module.calls = None, []

    def snapshot_download(repo_id, **options):
        module.calls.append((repo_id, options))
        if module.error is not None:
            raise module.error
        folder = tmp_path / "cache"
        folder.mkdir()
        return str(folder)

    module.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", module.errors)
    return module


@pytest.mark.parametrize("name", ["model", "owner/model"])
def test_folders_come_first(hub, tmp_path, monkeypatch, name):
    folder = tmp_path / name
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint(name, patterns=PATTERNS).resolve() == folder
    assert find_checkpoint(folder, patterns=PATTERNS) == folder
    assert hub.calls == []


def test_paths_have_no_revision(hub, tmp_path):
    message = r"revision='v1' is given for .*, a path on this machine; only repositori"
    with pytest.raises(HubError, match=message):
        find_checkpoint(tmp_path, patterns=PATTERNS, revision="v1")


def test_home_is_expanded(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_checkpoint("~", patterns=PATTERNS) == tmp_path


def test_repositories_are_fetched(hub, tmp_path):
    found = find_checkpoint(
        NAME, patterns=PATTERNS, revision="main", cache_dir=tmp_path / "hub"
    )
    assert found == tmp_path / "cache"
    assert hub.calls == [
        (
            NAME,
            {
                "allow_patterns": PATTERNS,
                "revision": "main",
                "cache_dir": tmp_path / "hub",
            },
        )
    ]


@pytest.mark.parametrize(
    "name", ["/no/such/folder", "./model", "../a/b", "model", "a/b/c", "a b/c"]
)
def test_paths_that_do_not_exist_are_not_fetched(hub, name, tmp_path, monkeypatch):
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    with pytest.raises(HubError, match="does not exist; expected a folder, or a repos"):
        find_checkpoint(name, patterns=PATTERNS)
    assert hub.calls == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Wan-AI/Wan2.1-T2V-1.3B", True),
        ("owner_1/model.v2", True),
        ("owner/model/", False),
        ("owner//model", False),
        ("-owner/model", False),
        ("owner/.model", False),
        ("owner/model name", False),
        ("owner/m\u00f6del", False),
        ("owner/model.SAFETENSORS", False),
        ("owner/config.json", False),
        ("here/model", False),
        ("", False),
    ],
    ids=ascii,
)
def test_names_that_may_be_repositories(tmp_path, monkeypatch, name, expected):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert is_repository_name(name) == expected


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RepositoryNotFoundError("404"), "neither a folder here nor a repository"),
        (
            GatedRepoError("403"),
            f"terms accepted first: at https://.*/{NAME}, .*HF_TOKE",
        ),
        (RevisionNotFoundError("404"), "has no revision='v2'"),
        (LocalEntryNotFoundError("offline"), r"cannot be reached: .* \(offline\)"),
        (HFValidationError("bad name"), "is no folder here, and bad name"),
        (
            ConnectionResetError("reset"),
            r"failed: ConnectionResetError.*run again to go",
        ),
        (RuntimeError("of some client"), r"failed: RuntimeError.*run again to go on"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_failures_are_explained(hub, error, message):
    hub.error = error
    with pytest.raises(HubError, match=f"{NAME} .*{message}") as caught:
        find_checkpoint(NAME, patterns=PATTERNS, revision="v2")
    assert caught.value.__cause__ is error


def test_interrupts_pass(hub):
    hub.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        find_checkpoint(NAME, patterns=PATTERNS)


def test_the_extra_is_named_if_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"run pip install '\.\[wan\]' in a clone"):
        find_checkpoint(NAME, patterns=PATTERNS)

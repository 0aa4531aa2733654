"""Which files a request may have: those of the outputs folder, and no others."""

import pytest

from models.app.files import PREFIX, files_in, find_file, url_of


@pytest.fixture
def outputs(tmp_path):
    """A run in the folder, a secret beside it, and links of every kind."""
    root = tmp_path / "outputs"
    run = root / "a cat-0"
    run.mkdir(parents=True)
    for name in ("video.mp4", "report.html", "notes.txt", ".hidden.png", "no_suffix"):
        (run / name).write_text(name)
    (run / "folder.png").mkdir()
    (tmp_path / "secret.json").write_text("secret")
    (tmp_path / "outputs-too").mkdir()
    (tmp_path / "outputs-too" / "a.json").write_text("secret")
    (run / "out.json").symlink_to(tmp_path / "secret.json")
    (run / "in.mp4").symlink_to(run / "video.mp4")
    (run / "disguised.mp4").symlink_to(run / "notes.txt")
    (run / "circle.json").symlink_to(run / "circle.json")
    (root / "link").symlink_to(tmp_path)
    return root


@pytest.mark.parametrize("path", ["a cat-0/video.mp4", "a cat-0/in.mp4"])
def test_files_of_runs_are_found(outputs, path):
    assert find_file(outputs, path) == outputs / "a cat-0" / "video.mp4"


def test_a_folder_that_is_reached_by_a_link_has_files(outputs, tmp_path):
    (tmp_path / "elsewhere").symlink_to(outputs)
    assert find_file(tmp_path / "elsewhere", "a cat-0/report.html") is not None


@pytest.mark.parametrize(
    "path",
    [
        "../secret.json",
        "a cat-0/../../secret.json",
        "..\\secret.json",
        "a cat-0\\..\\..\\secret.json",
        "%2e%2e/secret.json",  # what was encoded twice is a name
        "..%2fsecret.json",
        "/etc/hostname.json",
        "//etc/hostname.json",
        "../outputs-too/a.json",  # a name that begins as the folder's
        "a cat-0/out.json",
        "link/secret.json",
        "link/outputs/a cat-0/video.mp4\0.mp4",
        "a cat-0/circle.json",
        "a cat-0/disguised.mp4",
        "a cat-0/notes.txt",
        "a cat-0/.hidden.png",
        "a cat-0/no_suffix",
        "a cat-0/folder.png",
        "a cat-0/missing.mp4",
        "a cat-0//video.mp4",
        "./a cat-0/video.mp4",
        "a cat-0/video.mp4/",
        "a cat-0/video.mp4::$DATA.mp4",
        f"{'x' * 5000}.mp4",
        "a cat-0",
        "",
        "..",
    ],
)
def test_nothing_else_is_found(outputs, path):
    assert find_file(outputs, path) is None


def test_addresses_of_files_lead_to_them(outputs):
    from urllib.parse import unquote

    run = outputs / "a cat-0"
    names = [file.name for file in files_in(run)]
    assert names == ["disguised.mp4", "in.mp4", "out.json", "report.html", "video.mp4"]
    url = url_of(outputs, run / "video.mp4")
    assert url == "/runs/a%20cat-0/video.mp4"
    assert find_file(outputs, unquote(url).removeprefix(PREFIX)) == run / "video.mp4"

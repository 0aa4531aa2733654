"""Which files of a folder count."""

from models.checkpoints.files import find_visible


def test_hidden_files_are_not_found(tmp_path):
    for name in ("a.bin", "._a.bin", "in/b.bin", "in/.b.bin", ".cache/c.bin"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.touch()
    assert find_visible(tmp_path, "*.bin") == [tmp_path / "a.bin"]
    assert find_visible(tmp_path, "*/*.bin") == [tmp_path / "in" / "b.bin"]
    # The folder itself may lie in a hidden one, as the hub's cache does.
    assert find_visible(tmp_path / ".cache", "*") == [tmp_path / ".cache" / "c.bin"]

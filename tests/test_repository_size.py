"""What git tracks stays small enough to clone at once, the weights included."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_tracked_files_have_at_most_54_mebibytes():
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True
    )
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    sizes = {file: file.stat().st_size for file in files if file.is_file()}
    assert sum(sizes.values()) <= 54 * 2**20
    assert ROOT / "models/mini/weights/config.json" in sizes

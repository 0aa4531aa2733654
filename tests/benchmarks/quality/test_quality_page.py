"""The page in the documentation is what the committed record makes."""

import copy
import json

from benchmarks.quality import document


def test_committed_page_is_made_from_the_committed_record():
    path = document.shipped_record()
    written = json.loads(path.read_text())
    assert document.page(written, path.name) == document.PAGE.read_text()
    for name in written["pictures"]:
        assert (document.IMAGES / name).exists()
    changed = copy.deepcopy(written)
    shown = next(row for row in changed["trials"] if row["part"] == "methods")
    shown["clips"]["psnr"][0] += 10.0  # of 32: the mean is told to a tenth
    assert document.page(changed, path.name) != document.PAGE.read_text()

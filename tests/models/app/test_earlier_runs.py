"""Earlier runs of a folder, and folders of new ones."""

import concurrent.futures
import json
import os

from models.app.runs import list_runs, reserve_folder

REPORT = {
    "prompt": "a cat",
    "date": "2026-11-29T20:00:00+00:00",
    "attention": "draft",
    "sampling": {"seed": 3},
    "draft": {"selection": "row_topk", "sparsity": 0.9},
}


def write(folder, report, modified):
    folder.mkdir(parents=True)
    file = folder / "report.json"
    file.write_text(report if isinstance(report, str) else json.dumps(report))
    os.utime(file, (modified, modified))


def test_runs_are_listed_newest_first(tmp_path):
    write(tmp_path / "old", REPORT, 1)
    write(tmp_path / "seeds" / "4", REPORT | {"attention": "dense"}, 2)
    write(tmp_path / "new", REPORT | {"psnr_db": None}, 3)
    runs = list_runs(tmp_path)
    assert [run.name for run in runs] == ["new", "seeds/4", "old"]
    kinds = ["dense and row_topk at sparsity 0.9", "dense", "row_topk at sparsity 0.9"]
    assert [run.kind for run in runs] == kinds
    assert runs[1].title == "2026-11-29 20:00 · a cat · seed 3, dense"


def test_what_is_no_run_is_left_out(tmp_path):
    outputs, elsewhere = tmp_path / "outputs", tmp_path / "elsewhere"
    write(elsewhere, REPORT, 1)
    write(outputs / "damaged", "{", 1)
    write(outputs / "list", "[]", 1)
    write(outputs / "other", {"shape": 3}, 1)
    (outputs / "empty").mkdir()
    (outputs / "linked").symlink_to(elsewhere)
    (outputs / "inside").mkdir()
    (outputs / "inside" / "report.json").symlink_to(elsewhere / "report.json")
    assert list_runs(outputs) == []
    assert list_runs(tmp_path / "missing") == []


def test_reports_of_other_forms_have_a_title(tmp_path):
    write(tmp_path / "run", {"prompt": "a cat"}, 1)
    (run,) = list_runs(tmp_path)
    assert "a cat" in run.title


def test_two_runs_at_once_never_share_a_folder(tmp_path):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: reserve_folder(tmp_path, "run"), range(8)))
    names = {folder.name for folder in made}
    assert names == {"run", *(f"run-{count}" for count in range(2, 9))}

"""Comparison of PTX: what counts as a difference, and what does not."""

import os
import sys

import pytest

from benchmarks.attention import compare_ptx

PTX = """
.version 8.6
.entry kernel_one(.param .u64 p0)
{
    .loc 1 10 0
    mov.u32 %r1, 5;  // five
    call helper_a;
    ret;
}
.section .debug_line
{
    .b8 1
}
"""
REPORT = "info : Used 168 registers, used 3 barriers, 0 bytes spill stores"


def dump(folder, name, ptx, report=REPORT, time=0):
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.ptx"
    path.write_text(ptx)
    path.with_suffix(".ptxas").write_text(report)
    os.utime(path, (time, time))
    return path


RENAMED = (
    PTX.replace("kernel_one", "other_name")
    .replace(".loc 1 10 0", ".loc 2 99 7")
    .replace("// five", "// 5")
    .replace(".b8 1", ".b8 2")
)
CHANGES = {
    "names and lines": (RENAMED, REPORT, "equal"),
    "constant": (PTX.replace("5;", "6;"), REPORT, "same resources"),
    "registers": (
        PTX.replace("5;", "6;"),
        REPORT.replace("168", "170"),
        "different",
    ),
    "spills": (
        PTX.replace("5;", "6;"),
        REPORT.replace("0 bytes spill", "8 bytes spill"),
        "different",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_verdict(change, tmp_path):
    ptx, report, expected = CHANGES[change]
    before = dump(tmp_path / "before", "a", PTX)
    after = dump(tmp_path / "after", "b", ptx, report)
    assert compare_ptx.verdict(before, after) == expected


@pytest.mark.parametrize("same", [True, False])
def test_programs_are_compared_in_the_order_they_were_made(
    same, tmp_path, monkeypatch, capsys
):
    second = PTX.replace("5;", "6;")
    dump(tmp_path / "before", "z", PTX, time=1)
    dump(tmp_path / "before", "a", second, time=2)
    dump(tmp_path / "after", "1", PTX, time=1)
    report = REPORT if same else REPORT.replace("168", "200")
    dump(tmp_path / "after", "2", second if same else PTX, report, time=2)
    folders = [str(tmp_path / name) for name in ("before", "after")]
    monkeypatch.setattr(sys, "argv", ["compare_ptx", *folders])
    with pytest.raises(SystemExit) as end:
        compare_ptx.main()
    assert bool(end.value.code) != same
    assert capsys.readouterr().out.splitlines() == [
        "equal: z.ptx, 1.ptx",
        f"{'equal' if same else 'different'}: a.ptx, 2.ptx",
    ]


def test_folders_that_do_not_fit_are_refused(tmp_path, monkeypatch):
    dump(tmp_path / "before", "a", PTX)
    (tmp_path / "after").mkdir()
    folders = [str(tmp_path / name) for name in ("before", "after")]
    monkeypatch.setattr(sys, "argv", ["compare_ptx", *folders])
    with pytest.raises(SystemExit, match="after has no PTX"):
        compare_ptx.main()
    dump(tmp_path / "after", "a", PTX)
    dump(tmp_path / "after", "b", PTX)
    with pytest.raises(SystemExit, match="1 programs before, 2 after"):
        compare_ptx.main()

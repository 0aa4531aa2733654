"""What tests of benchmarks share."""

import sys

import pytest


def pytest_itemcollected(item: pytest.Item) -> None:
    """Benchmarks are tools of ours: their tests run before a release."""
    item.add_marker("nightly")


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """Puts shell programs in place of others; `python` for the one of this process."""

    def put(programs: dict[str, str]) -> None:
        for name, lines in programs.items():
            program = tmp_path / name
            program.write_text("#!/bin/sh\n" + lines)
            program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
        monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))

    return put

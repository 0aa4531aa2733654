"""The benchmark of step caches on a tiny random model."""

import json

import pytest

from benchmarks.caches import run
from tests import tiny_model


@pytest.mark.nightly
def test_record_has_each_rule_with_each_attention(tmp_path, monkeypatch, capsys):
    folder = tiny_model.save_checkpoint(tmp_path / "model")
    output = tmp_path / "record.json"
    options = ["--checkpoint", str(folder), "--size", "3", "32", "48", "--steps", "6"]
    options += ["--rules", "easy:9,2", "mag:9,2,0.4", "--sparsities", "0.5"]
    options += ["--prompts", "a red ball", "--output", str(output)]
    monkeypatch.setattr("sys.argv", ["run", *options])
    run.main()
    record = json.loads(output.read_text())
    cases = [(case["sparsity"], case["rule"]) for case in record["cases"]]
    rules = (None, "easy:9,2", "mag:9,2,0.4")
    assert cases == [(sparsity, rule) for sparsity in (0.0, 0.5) for rule in rules]
    plain, easy, mag = record["cases"][:3]
    assert plain["psnr_db"] == [None]  # equal to itself
    assert plain["work"] == {"dense": 6}
    assert easy["skipped"] == [3]
    assert mag["skipped"] == [3]
    assert 0 < easy["psnr_db"][0] < 60
    assert set(record["ratios"]) == {"0.0", "0.5"}


def test_rules_are_those_of_the_command_line():
    options = run.parse(["--rules", "easy:0.1", "-"])
    assert [str(rule) for rule in options.rules] == ["easy:0.1", "None"]

"""Records of parts in one file, by hand."""

import json

import pytest

from benchmarks.common.parts import Parts


def open_parts(file, **options):
    return Parts(file, {"model": "tiny"}, summarise=total, **options)


def total(parts):
    return {"total": sum(record.get("value", 0.0) for record in parts.values())}


def fail(report):
    report({"value": 3.0})
    raise RuntimeError("no memory")


def test_a_part_that_is_not_measured_stays(tmp_path):
    file = tmp_path / "record.json"
    earlier = {"date": "yesterday"}
    kept = {"a": {"value": 1.0}, "b": {"value": 5.0, "environment": {"date": "older"}}}
    file.write_text(
        json.dumps({"model": "tiny", "environment": earlier, "parts": kept})
    )
    parts = open_parts(file)
    parts.measure("c", lambda x, report: report({"value": x}), 2.0)
    document = json.loads(file.read_text())
    assert document["summary"] == {"total": 8.0}
    assert document["parts"]["a"] == {"value": 1.0, "environment": earlier}
    assert document["parts"]["b"] == kept["b"]
    assert "commit" in document["parts"]["c"]["environment"]
    assert list(parts.measured) == ["c"]


def test_a_part_that_fails_keeps_what_it_had_measured_in_this_run(tmp_path):
    file = tmp_path / "record.json"
    earlier = {"a": {"value": 7.0, "old": True, "environment": {}}}
    file.write_text(json.dumps({"model": "tiny", "parts": earlier}))
    parts = open_parts(file)
    parts.measure("a", fail)
    record = json.loads(file.read_text())["parts"]["a"]
    assert record.keys() == {"environment", "value", "error"}
    assert record["error"] == "RuntimeError: no memory"


def test_no_part_begins_after_the_limit(tmp_path):
    file = tmp_path / "record.json"
    earlier = {"a": {"value": 7.0, "environment": {}}}
    file.write_text(json.dumps({"model": "tiny", "parts": earlier}))
    parts = open_parts(file, limit=0.0)
    for name in ("a", "b"):
        parts.measure(name, fail)
    found = json.loads(file.read_text())["parts"]
    assert found["a"] == earlier["a"]
    assert found["b"]["error"] == "not begun: the limit was 0.0 s"


@pytest.mark.parametrize("nothing", [{}, {"case": {"error": "not begun"}}], ids=str)
def test_errors_alone_replace_no_figures(tmp_path, nothing):
    file = tmp_path / "record.json"
    earlier = {"a": {"case": {"median_ms": 7.0}, "environment": {}}}
    file.write_text(json.dumps({"model": "tiny", "parts": earlier}))
    parts = open_parts(file)

    def run(report):
        report(nothing)
        raise RuntimeError("no memory")

    parts.measure("a", run)
    assert json.loads(file.read_text())["parts"] == earlier
    parts.measure("a", lambda report: report({"case": {"median_ms": 8.0}}))
    assert json.loads(file.read_text())["parts"]["a"]["case"] == {"median_ms": 8.0}


def test_files_of_other_facts_stay(tmp_path):
    file = tmp_path / "record.json"
    file.write_text('{"model": "13b", "parts": {}}')
    with pytest.raises(SystemExit, match="is of model '13b', not 'tiny'"):
        open_parts(file)

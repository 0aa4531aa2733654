"""The presets of `--speed` are those that the lab has chosen."""

import dataclasses
import json

import pytest

from benchmarks.common.records import ROOT
from benchmarks.quality.trials import Combination, combinations
from models.cli.speed import SPEEDS

RECORD = ROOT / "benchmarks/results/quality_50_h200.json"


def test_values_are_those_of_the_record():
    if not RECORD.exists():
        pytest.skip(f"{RECORD.name} is not there yet")
    chosen = json.loads(RECORD.read_text())["presets"]
    assert {name: dataclasses.asdict(each) for name, each in SPEEDS.items()} == chosen


@pytest.mark.parametrize("name", SPEEDS)
def test_presets_are_combinations_that_the_lab_measures(name):
    assert Combination(**dataclasses.asdict(SPEEDS[name])) in combinations()

"""The presets of `--speed` are those that the lab has chosen."""

import dataclasses
import json

import pytest

from benchmarks.quality.document import shipped_record
from benchmarks.quality.summary import whole_runs
from benchmarks.quality.trials import Combination, combinations
from models.cli.speed import SPEEDS


def test_values_are_those_of_the_record():
    chosen = whole_runs(json.loads(shipped_record().read_text()))["presets"]
    assert {name: dataclasses.asdict(each) for name, each in SPEEDS.items()} == chosen


@pytest.mark.parametrize("name", SPEEDS)
def test_presets_are_combinations_that_the_lab_measures(name):
    assert Combination(**dataclasses.asdict(SPEEDS[name])) in combinations()

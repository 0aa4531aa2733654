"""Names of ways to run self-attention."""

import argparse

import pytest

from benchmarks.common.modes import Mode


@pytest.mark.parametrize("name", ["1.0", "dense+layer0", "0.9+new", "0.9+layers0,", ""])
def test_unknown_mode(name):
    with pytest.raises(argparse.ArgumentTypeError, match="must be 'dense', or a"):
        Mode.parse(name)


def test_modes():
    assert Mode.parse("dense") == Mode("dense", None, (), False)
    name = "0.9+layer0+reuse"
    assert Mode.parse(name) == Mode(name, 0.9, (0,), True)
    assert Mode.parse("0.8+layers0,12").dense_layers == (0, 12)


def test_modes_that_share_a_program():
    names = ["0.75", "0.9", "0.9+layer0", "0.9+reuse", "dense"]
    programs = [Mode.parse(name).program for name in names]
    assert programs[0] == programs[1]
    assert len(set(programs)) == 4

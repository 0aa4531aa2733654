"""Lists in messages have a largest length, whatever a file holds."""

import numpy as np
import pytest

from models.checkpoints.conversion import ConversionError, best_layout
from models.checkpoints.listing import MOST_IN_ALL, list_names, list_problems
from models.checkpoints.rules import Rule
from models.wan.convert import load_wan_transformer
from tests.published_wan import CONFIG, load_published


def test_short_lists_are_whole():
    assert list_problems(["b", "a"]) == "\n  a\n  b"
    assert list_names(["b", "a"]) == "b, a"


def test_long_lists_say_how_much_is_left_out():
    lines = list_problems([f"{i:03}" for i in range(100)]).split("\n  ")
    assert lines == ["", *(f"{i:03}" for i in range(80)), "and 20 more"]
    names = list_names(str(i) for i in range(10))
    assert names == "0, 1, 2, 3, 4, 5, 6, 7 and 2 more"
    assert list_problems(["x" * 200 + "y" * 200]) == (
        "\n  " + "x" * 150 + " [...] " + "y" * 150
    )


def test_the_longest_that_are_whole():
    assert list_problems(["x" * 300]) == "\n  " + "x" * 300
    assert list_names("abcdefgh") == "a, b, c, d, e, f, g, h"
    assert len(list_problems([f"{i:03}" for i in range(80)]).split("\n  ")) == 81


def test_long_lists_name_every_kind():
    """One kind must not crowd out the others, and a list stays short in all."""
    many = [f"unmatched: {'key' * 20}.{i:04}" for i in range(1_000)]
    lines = list_problems([*many, "half: a", "shape: b"]).split("\n  ")
    assert lines[1] == "half: a"
    assert lines[2] == "shape: b"
    assert lines[3:] == [*many[:3], "unmatched: and 997 more"]


def test_long_lists_of_long_keys_are_short():
    problems = [f"{kind}: {'key' * 300}" for kind in "abcdef" for _ in range(100)]
    text = list_problems(problems)
    assert 1_000 < len(text) <= MOST_IN_ALL
    for kind in "abcdef":
        assert f"\n  {kind}: " in text


def test_a_checkpoint_of_another_kind_is_refused_in_few_words():
    weights = load_published("divided")["original"]
    other = {f"blocks.{i}.{'other' * 100}": np.zeros(2) for i in range(1000)}
    with pytest.raises(ConversionError, match=r"^1000 problems in ") as error:
        load_wan_transformer(weights | other, CONFIG)
    assert len(str(error.value)) <= 1_500
    rules = (Rule("x", "x"),)
    with pytest.raises(ConversionError, match="cannot tell the layout of") as error:
        best_layout(other, {"one": rules, "two": rules})
    assert len(str(error.value)) < 3_000

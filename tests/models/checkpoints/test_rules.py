"""Templates of keys, and the tables that they are expanded from."""

import numpy as np
import pytest

from models.checkpoints import rules
from models.checkpoints.rules import LAYER_NORM, LINEAR, Row, Rule


def test_numbers_are_carried_over_in_both_directions():
    rule = Rule("blocks.{}.layer.{}.w", "b.{}.c{}.kernel")
    assert rule.path_of("blocks.12.layer.3.w") == "b.12.c3.kernel"
    assert rule.key_of("b.12.c3.kernel") == "blocks.12.layer.3.w"


@pytest.mark.parametrize(
    "key",
    ["a.x.w", "a..w", "a.1.w.x", "x.a.1.w", "ax1.w", "a.-1.w", "a.{}.w", "a.1.2.w"],
)
def test_other_keys_do_not_match(key):
    """A dot is a dot, a number has digits only, and keys match whole."""
    assert Rule("a.{}.w", "b.{}").path_of(key) is None


def test_a_lookup_finds_the_rules_that_match():
    """In the order of the table; literal digits and numbers may stand together."""
    literal, number = Rule("a.0.w", "first"), Rule("a.{}.w", "b.{}", others=("c.{}",))
    joined, digits = Rule("a{}1.w", "d{}"), Rule("a.{}.{}.w", "b.{}.{}")
    lookup = rules.Lookup([literal, number, joined, digits])
    assert lookup.of_key("a.0.w") == [(("first",), literal), (("b.0", "c.0"), number)]
    assert lookup.of_key("a.12.w") == [(("b.12", "c.12"), number)]
    assert lookup.of_key("a21.w") == [(("d2",), joined)]
    assert lookup.of_key("a2.w") == lookup.of_key("a.{}.w") == []
    assert lookup.of_path("c.3") == lookup.of_path("b.3") == [("a.3.w", number)]
    assert lookup.of_path("b.3.4") == [("a.3.4.w", digits)]
    assert lookup.of_path("first") == [("a.0.w", literal)]
    assert lookup.of_path("second") == []


@pytest.mark.parametrize(
    ("key", "path"),
    [
        ("a.{}", "a"),
        ("a", "a.{}"),
        ("a.{}.{}", "a.{}"),
        ("a.{0}", "a.{0}"),
        ("a.{}{", "a.{}"),
        ("a}", "a"),
    ],
    ids=str,
)
def test_rules_that_cannot_be_turned_round_are_refused(key, path):
    with pytest.raises(
        ValueError, match=r"cannot be turned round: use as many \{\} in"
    ):
        Rule(key, path)


def test_rows_give_a_rule_for_each_parameter_of_each_layout():
    parts = (Row("q", "to_q", "to_q", LINEAR), Row("n", "norm", "norm", LAYER_NORM))
    rows = rules.within("blocks.{}", "layers.{}", "ours.{}", parts)
    assert rules.original_rules(rows) == (
        Rule("blocks.{}.q.weight", "ours.{}.to_q.kernel", rules.transpose),
        Rule("blocks.{}.q.bias", "ours.{}.to_q.bias"),
        Rule("blocks.{}.n.weight", "ours.{}.norm.scale"),
        Rule("blocks.{}.n.bias", "ours.{}.norm.bias"),
    )
    assert [rule.key for rule in rules.library_rules(rows)] == [
        "layers.{}.to_q.weight",
        "layers.{}.to_q.bias",
        "layers.{}.norm.weight",
        "layers.{}.norm.bias",
    ]


def test_a_table_is_no_module():
    rows = (Row("head.modulation", "table", "ours", rules.BATCHED_TABLE),)
    expected = (Rule("head.modulation", "ours", rules.drop_batch_axis),)
    assert rules.original_rules(rows) == expected


@pytest.mark.parametrize(
    ("layout", "stored", "axes"),
    [
        (rules.keep, (2, 3, 4), (0, 1, 2)),
        (rules.transpose, (2, 3), (1, 0)),
        (rules.conv_2d, (2, 3, 4, 5), (2, 3, 1, 0)),
        (rules.conv_3d, (2, 3, 4, 5, 6), (2, 3, 4, 1, 0)),
    ],
    ids=["keep", "transpose", "conv_2d", "conv_3d"],
)
def test_layouts_move_axes(layout, stored, axes):
    array = np.arange(np.prod(stored)).reshape(stored)
    np.testing.assert_array_equal(layout.load(array), np.transpose(array, axes))
    np.testing.assert_array_equal(layout.save(layout.load(array)), array)


def test_an_axis_of_size_one_is_dropped():
    array = np.arange(6).reshape(1, 2, 3)
    loaded = rules.drop_batch_axis.load(array)
    np.testing.assert_array_equal(loaded, array[0])
    np.testing.assert_array_equal(rules.drop_batch_axis.save(loaded), array)

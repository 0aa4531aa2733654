"""Options of draft attention become the configuration that they describe."""

import pytest

from draft_jax import Compensation, DraftConfig
from models.cli.options import draft_from
from models.cli.parser import UsageError, build_parser


def config_of(*options):
    arguments = build_parser().parse_args(["generate", "a cat", *options])
    return draft_from(arguments)[0]


def test_methods_are_presets():
    assert config_of() == DraftConfig.compensated()
    assert config_of("--method", "paper") == DraftConfig.paper()
    changed = config_of("--sparsity", "0.95", "--mean-frames", "2")
    assert changed == DraftConfig(
        sparsity=0.95, compensation=Compensation(sub_tile=(2, 2), frames=2)
    )


def test_means_and_sub_tiles():
    options = ["--draft-tile", "2x4", "--means", "2x8", "--ranking", "spread"]
    expected = DraftConfig.paper(
        draft_tile=(2, 4),
        compensation=Compensation(sub_tile=(2, 8), frames=8),
        ranking="spread",
    )
    assert config_of("--method", "paper", *options) == expected
    means = config_of("--means", "1x2", "--mean-frames", "12").compensation
    assert means == Compensation(sub_tile=(1, 2), frames=12)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--mean-frames", "2"], "--mean-frames 2 is given without --means"),
        (["--ranking", "spread"], "--ranking spread asks .* pass --means"),
        (["--means", "2x2", "--mean-frames", "0"], "frames=0 must be"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_does_not_go_together_is_refused(options, text):
    with pytest.raises(ValueError, match=text):
        config_of("--method", "paper", *options)


@pytest.mark.parametrize("value", ["4", "4x", "0x4", "4x4x4", "axb"])
def test_sizes_are_rows_and_columns(value):
    with pytest.raises(UsageError) as caught:
        config_of("--means", value)
    assert f"'{value}' must be ROWSxCOLUMNS in tokens" in caught.value.line

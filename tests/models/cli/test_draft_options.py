"""Options of draft attention become the configuration that they describe."""

import pytest

from draft_jax import Compensation, Correction, DraftConfig, SparsitySchedule
from models.cli.generate import read_run
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


def test_correction_by_its_number_of_exact_rows():
    assert config_of("--correction", "64") == DraftConfig(
        correction=Correction(samples=64)
    )
    assert config_of("--correction", "0") == DraftConfig(correction=None)
    paper = config_of("--method", "paper", "--correction", "128")
    assert paper == DraftConfig.paper(correction=Correction(samples=128))
    assert config_of("--method", "paper", "--correction", "0") == DraftConfig.paper()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--mean-frames", "2"], "--mean-frames 2 is given without --means"),
        (["--ranking", "spread"], "--ranking spread asks .* pass --means"),
        (["--means", "2x2", "--mean-frames", "0"], "frames=0 must be"),
        (["--correction", "31"], "samples=31 must be an integer >= 32"),
        (["--correction", "-1"], "samples=-1 must be"),
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


def parsed(*options):
    return build_parser().parse_args(["generate", "a cat", *options])


def test_rules_of_low_noise():
    """What is not said of low noise is as for the whole run, but for dense steps."""
    assert draft_from(parsed())[1].low_noise is None
    options = ["--sparsity", "0.9", "--low-sparsity", "0.8", "--dense-layers", "0,1"]
    config, schedule = draft_from(parsed(*options, "--mask-refresh", "2"))
    assert config.sparsity == 0.8  # has the longer lists
    low = SparsitySchedule(dense_layers=(0, 1), sparsity=0.8, mask_refresh=2)
    assert schedule == SparsitySchedule(
        dense_fraction=0.25,
        dense_layers=(0, 1),
        sparsity=0.9,
        mask_refresh=2,
        low_noise=low,
    )
    options = ["--low-dense-layers", "", "--low-dense-fraction", "0.5"]
    published = SparsitySchedule.wan_pair_published()
    config, schedule = draft_from(parsed("--preset", "published", *options), published)
    assert schedule.dense_layers == (0,)
    assert schedule.low_noise == SparsitySchedule(dense_fraction=0.5, sparsity=0.75)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--boundary", "900"], "--boundary 900 fits"),
        (
            ["--low-guidance", "3", "--low-dense-layers", "0,1"],
            "--low-guidance 3 and --low-dense-layers 0,1 fit",
        ),
    ],
    ids=["one", "two"],
)
def test_options_of_two_transformers_are_refused_with_one(options, named):
    with pytest.raises(ValueError, match=f"{named} models with two transformers"):
        read_run(parsed(*options))

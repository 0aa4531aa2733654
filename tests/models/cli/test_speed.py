"""`--speed`: what it chooses, what wins over it, and that it says so."""

import dataclasses
import json

import pytest

from draft_jax import DraftConfig, SparsitySchedule
from models.cli import choices, main
from models.cli.caching import cache_from
from models.cli.generate import read_run
from models.cli.options import draft_from
from models.cli.outputs import run_name
from models.cli.parser import build_parser
from models.cli.speed import SPEEDS, Speed
from models.diffusion.caches import EasyCache, MagRatios, write_ratios
from models.diffusion.sampling import Sampling
from models.mini.family import describe_mini
from tests import tiny_model

PROMPT = "a red ball"
# Not a value of it is a default, or one of a preset's.
OTHER = Speed(
    method="paper",
    sparsity=0.7,
    dense_fraction=0.5,
    cache="easy:0.1,4",
    linears="float8",
)
WITH_OTHER = ("--speed", "fast")


@pytest.fixture
def other(monkeypatch):
    """Makes "fast" another preset, so that rules are tested apart from the values."""
    monkeypatch.setitem(SPEEDS, "fast", OTHER)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model without ratios."""
    return str(tiny_model.save_checkpoint(tmp_path_factory.mktemp("checkpoint")))


def parse(*options):
    argv = ["generate", PROMPT, *options]
    arguments = build_parser().parse_args(argv)
    arguments.argv = argv
    return arguments


def meaning(*options):
    """What the options come to: draft, schedule, cache, and linear layers."""
    arguments = parse(*options)
    cache = cache_from(arguments, describe_mini(), Sampling())
    return *draft_from(arguments), cache, arguments.linears


@pytest.mark.parametrize("name", SPEEDS)
def test_presets_suit_the_shipped_model(name):
    """Checked up to the weights: the model has ratios of its own."""
    request = read_run(parse("--speed", name))
    assert request.draft[0].sparsity == SPEEDS[name].sparsity
    assert (request.cache is None) == (SPEEDS[name].cache is None)


def test_nothing_is_chosen_without_it():
    expected = DraftConfig(), SparsitySchedule.paper(), None, "bfloat16"
    assert meaning() == expected
    assert parse().by_speed == {}


# ----------------------------------------------------------------- rules


def test_all_parts_are_chosen(other):
    config = DraftConfig.paper(sparsity=0.7)
    schedule = SparsitySchedule(dense_fraction=0.5)
    cache = EasyCache(threshold=0.1, first_steps=4)
    # FP8 where the card has it.
    assert meaning(*WITH_OTHER) == (config, schedule, cache, "auto")


def test_precision_of_bfloat16_is_itself(monkeypatch):
    wide = dataclasses.replace(OTHER, linears="bfloat16")
    monkeypatch.setitem(SPEEDS, "fast", wide)
    assert parse(*WITH_OTHER).linears == "bfloat16"


@pytest.mark.parametrize("order", [1, -1], ids=["after", "before"])
@pytest.mark.parametrize(
    ("given", "changed"),
    [
        # Defaults of the command, too, win where they are given.
        (("--method", "compensated"), {0: DraftConfig(sparsity=0.7)}),
        (("--sparsity", "0.9"), {0: DraftConfig.paper(sparsity=0.9)}),
        (("--dense-fraction", "0.25"), {1: SparsitySchedule(dense_fraction=0.25)}),
        (("--cache", "easy"), {2: EasyCache()}),
        (("--cache", "none"), {2: None}),
        (("--linears", "bfloat16"), {3: "bfloat16"}),
        (("--linears", "float8"), {3: "float8"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_is_given_wins_over_its_part_alone(other, given, changed, order):
    expected = list(meaning(*WITH_OTHER))
    for place, value in changed.items():
        assert expected[place] != value
        expected[place] = value
    assert list(meaning(*sum([WITH_OTHER, given][::order], ()))) == expected


def test_dense_steps_of_a_preset_of_schedules_win(other):
    paper = draft_from(parse(*WITH_OTHER, "--preset", "paper"))
    assert paper == (DraftConfig.paper(sparsity=0.7), SparsitySchedule.paper())
    published = SparsitySchedule(dense_above_timestep=925.0, sparsity=0.75)
    arguments = parse(*WITH_OTHER, "--preset", "published")
    config, schedule = draft_from(arguments, published)
    assert config == DraftConfig.paper(sparsity=0.75)
    assert schedule == dataclasses.replace(published, sparsity=None)
    assert set(arguments.by_speed) == {"method", "cache", "linears"}


def test_two_transformers_have_its_sparsity(other):
    arguments = parse(*WITH_OTHER, "--low-dense-fraction", "0.1")
    config, schedule = draft_from(arguments)
    assert (config.sparsity, schedule.dense_fraction) == (0.7, 0.5)
    assert schedule.low_noise == SparsitySchedule(dense_fraction=0.1, sparsity=0.7)


def test_dense_attention_has_cache_and_precision(other):
    arguments = parse(*WITH_OTHER, "--dense")
    assert set(arguments.by_speed) == {"cache", "linears"}
    assert arguments.method == choices.METHODS[0]


@pytest.mark.parametrize("name", ["inspect", "calibrate"])
def test_other_commands_have_their_defaults(name):
    arguments = build_parser().parse_args([name, PROMPT])
    assert draft_from(arguments) == (DraftConfig(), SparsitySchedule.paper())
    assert arguments.linears == "bfloat16"


def test_an_unknown_preset_is_told_in_one_line(capsys):
    assert main(["generate", PROMPT, "--speed", "slow"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "'slow'" in line
    assert all(name in line for name in SPEEDS)


# ------------------------------------------------- models without ratios


@pytest.fixture
def by_ratios(monkeypatch):
    speed = dataclasses.replace(OTHER, cache="mag:0.12,2")
    monkeypatch.setitem(SPEEDS, "fast", speed)


def test_a_model_without_ratios_is_told_before_it_is_loaded(
    by_ratios, checkpoint, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("models.cli.model.load_pipeline", None)
    out = tmp_path / "out"
    command = ["generate", PROMPT, "--checkpoint", checkpoint, *WITH_OTHER]
    assert main([*command, "--output", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--speed fast, which is --cache mag:0.12,2: no ratios" in line
    for remedy in ("draft-video calibrate", "--cache-ratios", "easy", "--cache none"):
        assert remedy in line
    assert not out.exists()


def test_what_the_error_says_helps(by_ratios, checkpoint, tmp_path):
    options = ("--checkpoint", checkpoint, *WITH_OTHER)
    assert read_run(parse(*options, "--cache", "none")).cache is None
    assert read_run(parse(*options, "--cache", "easy")).cache == EasyCache()
    ratios = MagRatios(
        values=((1.0,) * 16,), model="a test", source="a test", num_layers=3
    )
    file = tmp_path / "ratios.json"
    write_ratios(file, ratios, {})
    cache = read_run(parse(*options, "--cache-ratios", str(file))).cache
    assert (cache.ratios, cache.threshold, cache.max_skips) == (ratios, 0.12, 2)


def test_a_cache_that_is_given_is_named_alone(by_ratios, checkpoint):
    options = ("--checkpoint", checkpoint, *WITH_OTHER, "--cache", "mag:0.2")
    with pytest.raises(ValueError, match=r"^--cache mag:0\.2: no ratios"):
        read_run(parse(*options))


def test_ratios_without_a_rule_that_takes_them_are_refused(other):
    with pytest.raises(ValueError, match=r"--cache-ratios a\.json fits --cache mag"):
        meaning(*WITH_OTHER, "--cache-ratios", "a.json")


# ------------------------------------------------------ what is told of it


def test_what_it_chose_is_told(other, checkpoint):
    request = read_run(parse("--checkpoint", checkpoint, *WITH_OTHER))
    assert request.describe()[0] == (
        "speed: fast chose --method paper --sparsity 0.7 --dense-fraction 0.5 "
        "--cache easy:0.1,4 --linears auto"
    )
    details = request.details()
    assert details["speed"] == {
        "preset": "fast",
        "method": "paper",
        "sparsity": 0.7,
        "dense_fraction": 0.5,
        "cache": "easy:0.1,4",
        "linears": "auto",
    }
    assert json.loads(json.dumps(details["speed"])) == details["speed"]
    assert details["method"] == "paper"
    assert details["draft"]["sparsity"] == 0.7
    assert details["cache"]["first_steps"] == 4


def test_what_others_decide_is_not_told_as_its_choice(other, checkpoint):
    options = ("--checkpoint", checkpoint, *WITH_OTHER, "--dense", "--cache", "none")
    request = read_run(parse(*options))
    assert request.describe() == ["speed: fast chose --linears auto"]
    assert request.details()["speed"] == {"preset": "fast", "linears": "auto"}
    request = read_run(parse(*options, "--linears", "bfloat16"))
    (line,) = request.describe()
    assert line == "speed: fast chose nothing, for all is given otherwise"


def test_no_cache_can_be_a_choice(monkeypatch, checkpoint):
    monkeypatch.setitem(SPEEDS, "fast", dataclasses.replace(OTHER, cache=None))
    request = read_run(parse("--checkpoint", checkpoint, *WITH_OTHER))
    assert "--cache none --linears auto" in request.describe()[0]
    assert request.details()["speed"]["cache"] == "none"


def test_runs_without_it_do_not_tell_of_it(checkpoint):
    request = read_run(parse("--checkpoint", checkpoint, "--cache", "none"))
    assert request.describe() == []
    assert request.details()["speed"] is None


def test_a_run_has_the_name_of_the_options_that_it_stands_for(other):
    def name_of(*options):
        return run_name(parse(*options), Sampling())

    spelt = ("--method", "paper", "--sparsity", "0.7", "--dense-fraction", "0.5")
    spelt += ("--cache", "easy:0.1,4", "--linears", "auto")
    assert name_of(*WITH_OTHER) == name_of(*spelt)
    assert name_of() == name_of("--cache", "none")
    assert name_of(*WITH_OTHER) != name_of()

"""The lab on a tiny random model: it goes on, and says what it cannot compare."""

import itertools
import json

import numpy as np
import pytest

from benchmarks.quality import document, run, times, trials
from benchmarks.quality.generations import dense_attention_by
from benchmarks.quality.methods import METHODS
from benchmarks.quality.presets import combination_of
from benchmarks.quality.prompts import REPORTING, TUNING
from benchmarks.quality.trials import (
    DEFAULT_SPLIT,
    PAPER_90,
    SMALL,
    WHOLE,
    combinations,
    front,
    make_trials,
    schedules,
)
from models.mini.captions import SAMPLE_PROMPTS
from models.mini.checkpoint import SHIPPED
from models.mini.text import Vocabulary
from pallas_kernels.attention import dense_api
from pallas_kernels.common import current_device
from tests import tiny_model
from tests.wan_folders import TEXT_TO_VIDEO

CACHED = "compensated 0.9 + mag:0.12,2 + float8"

pytestmark = pytest.mark.filterwarnings("ignore")  # words that a tiny model lacks


def options_of(folder, output, *more):
    options = ["--checkpoint", str(folder), "--output", str(output), "--reduced"]
    options += ["--clips", "2", "--frames", "3", "--size", "32x48", "--steps", "4"]
    return run.parse([*options, "--densities", "0.5", "0.25", *more])


def test_a_run_goes_on_where_it_was_stopped(tmp_path, capsys):
    folder = tiny_model.save_checkpoint(tmp_path / "model")
    output = tmp_path / "run"
    more = ("--methods", "paper", "top_p", "--parts", "floor", "methods", "layers")
    run.measure(options_of(folder, output, *more, "--limit", "0"))
    said = capsys.readouterr().out
    assert "A reduced run: 2 reporting prompts (a whole one has 32)" in said
    assert "floor, methods, layers go on when run again" in said
    run.measure(options_of(folder, output, *more))
    record = json.loads((output / "quality.json").read_text())
    keys = [(row["part"], row["name"], row["density"]) for row in record["trials"]]
    assert [key[1:] for key in keys if key[0] == "methods"] == [
        (name, density) for name in ("paper", "top_p") for density in (0.5, 0.25)
    ]
    for row in record["trials"]:
        assert all(len(values) == 2 for values in row["clips"].values())
        assert 0 < row["kept_density"] <= 1.0
    assert {row["name"] for row in record["layers"]} == {"paper", "top_p"}
    mass = record["top_p"]
    assert 0 < mass["0.25"] < mass["0.5"] < 1
    # Again: nothing is measured twice, and a method more is added.
    known = record["trials"]
    run.measure(options_of(folder, output, "--methods", "row_topk", *more[3:]))
    record = json.loads((output / "quality.json").read_text())
    assert record["trials"][: len(known)] == known
    assert record["trials"][-1]["name"] == "row_topk"
    with pytest.raises(ValueError, match="pass another folder as --output"):
        run.measure(options_of(folder, output, *more, "--steps", "5"))


@pytest.mark.parametrize("command", ["measure", "times"])
def test_an_output_that_cannot_be_written_is_refused_at_once(tmp_path, capsys, command):
    (tmp_path / "taken").write_text("a file")
    output = str(tmp_path / "taken" / "below")
    with pytest.raises(SystemExit):
        run.parse([command, "--output", output])
    assert "argument --output" in capsys.readouterr().err


def test_all_pairs_leave_layers_as_they_are(tmp_path):
    """At density 1 the output is dense attention's, and all of the mass is kept."""
    folder = tiny_model.save_checkpoint(tmp_path / "model")
    options = run.parse(
        [
            *("--checkpoint", str(folder), "--output", str(tmp_path / "run")),
            *("--clips", "2", "--frames", "3", "--size", "32x48", "--steps", "4"),
            *("--densities", "1", "0.25", "--methods", "paper", "ours"),
            *("--parts", "layers", "--looks", "1"),
        ]
    )
    run.measure(options)
    record = json.loads((tmp_path / "run" / "quality.json").read_text())
    by_key = {(row["name"], row["density"]): row for row in record["layers"]}
    for name in ("paper", "ours"):
        full, sparse = by_key[name, 1.0], by_key[name, 0.25]
        np.testing.assert_allclose(full["relative_l2"], 0.0, atol=1e-5)
        np.testing.assert_allclose(full["kept_mass"], 1.0, atol=1e-5)
        assert all(error > 0.01 for error in sparse["relative_l2"])
        assert all(0.1 < mass < 0.9 for mass in sparse["kept_mass"])


def test_prompts_are_apart_and_of_known_words():
    texts = [prompt.text for prompt in (*REPORTING, *TUNING)]
    assert len({*texts, *SAMPLE_PROMPTS}) == len(texts) + len(SAMPLE_PROMPTS)
    assert len(REPORTING) >= 32
    for prompts in (REPORTING, TUNING):
        kinds = [prompt.motion for prompt in prompts]
        assert kinds.count("calm") == kinds.count("fast") == len(prompts) // 2
    vocabulary = Vocabulary.load(SHIPPED / "vocabulary.json")
    assert not [word for words in vocabulary.encode(texts)[2] for word in words]


def test_each_part_has_its_trials():
    options = {"top_p": {"0.1": 0.4}, "num_steps": 16}
    found = make_trials("methods", names=list(METHODS), densities=[0.1], **options)
    assert [trial.name for trial in found] == list(METHODS)
    found = make_trials("first_layer", names=[], densities=[], **options)
    schedules_of = {trial.attention.schedule.dense_layers for trial in found}
    assert schedules_of == {(0,)}
    assert {trial.name for trial in found} < set(METHODS)
    combined = make_trials("combinations", names=[], densities=[], **options)
    keys = [trial.key for trial in (*front(), *schedules(16), *combined)]
    assert len(keys) == len(set(keys))
    for trial in schedules(16):
        plan = trial.attention.schedule.sparsity
        sparse = np.broadcast_to(plan, 16)[4:]
        assert np.mean(sparse) == pytest.approx(0.9, abs=1e-6)
    names = {trial.name for trial in combined}
    assert {PAPER_90.name, "dense + mag:0.12,2 + bfloat16", "dense + float8"} <= names
    assert {"compensated 0.95 + easy:0.05 + float8"} <= names
    chosen = make_trials(
        "presets", names=[], densities=[], **options, presets=combinations()[:1] * 2
    )
    assert [trial.name for trial in chosen] == [PAPER_90.name, combinations()[0].name]


def test_combinations_have_each_alone_all_pairs_and_all_three():
    """In a reduced run, too, whose other parts are some of the whole's."""
    for extent in (WHOLE, SMALL):
        found = {
            (
                each.method is not None,
                each.cache is not None,
                each.linears == "float8",
            )
            for each in combinations(extent)
        }
        assert found == {*itertools.product((False, True), repeat=3)} - {(False,) * 3}
        for each in combinations(extent):
            assert combination_of(each.name) == each
    whole, small = ({trial.key for trial in front(e)} for e in (WHOLE, SMALL))
    assert small < whole
    assert DEFAULT_SPLIT in {name for _, name, _ in small}


def test_one_configuration_serves_all_densities():
    """So a method is compiled once; only "top_p" keeps room for all pairs."""
    top_p = {"0.1": 0.4, "0.25": 0.6}
    found = make_trials(
        "methods", names=list(METHODS), densities=[0.25, 0.1], top_p=top_p, num_steps=4
    )
    configs = {}
    for trial in found:
        configs.setdefault(trial.name, set()).add(trial.attention.config)
    assert [len(own) for own in configs.values()] == [1] * len(METHODS)
    (config,) = configs["top_p"]
    assert (config.sparsity, config.mask_maker.masses) == (0.0, (0.4, 0.6))


def test_dense_attention_by_another_kernel():
    """It is what is traced meanwhile that takes it, and nothing after."""
    shape = (1, 64, 2, 64), "float32"
    before = dense_api.choose(*shape, current_device())
    with dense_attention_by("cudnn"):
        assert dense_api.choose(*shape, current_device()).name == "cudnn"
    with dense_attention_by(None):
        assert dense_api.choose(*shape, current_device()) == before
    assert dense_api.choose(*shape, current_device()) == before


def test_times_are_of_a_gpu_alone():
    layers = times.layers_to_time(["paper", "oracle", "top_p"], [0.1], with_front=False)
    assert [(layer.name, layer.density) for layer in layers] == [
        ("dense", 1.0),
        ("paper", 0.1),
    ]
    with pytest.raises(ValueError, match="times are of a GPU"):
        times.measure_times("tiny", layers, print)


def test_layers_run_and_say_their_density(monkeypatch):
    """What a GPU is to time runs here, too; the times say nothing."""
    monkeypatch.setattr(times, "ROUNDS", 1)
    monkeypatch.setattr(times, "MIN_SAMPLE_S", 0.0)
    names = ["paper", "ours", "spatial_temporal"]
    layers = times.layers_to_time(names, [0.5, 0.25], with_front=False)
    (rows,) = times.time_layers(times.TINY, layers)
    assert not [row["error"] for row in rows if "error" in row]
    by_key = {(row["name"], row["density"]): row for row in rows}
    assert by_key["paper", 0.25]["kept_density"] == pytest.approx(0.25, abs=0.02)
    assert by_key["spatial_temporal", 0.5]["kept_density"] <= 0.5
    known = times.Times({"rows": rows})
    assert all(known.at(name, 0.3) is not None for name in ("dense", *names))


def test_pictures_are_drawn_from_a_folder(tmp_path, monkeypatch):
    folder = tiny_model.save_checkpoint(tmp_path / "model")
    output = tmp_path / "run"
    monkeypatch.setattr(run, "SHOWN_DENSITY", 0.25)
    more = ("--methods", "paper", "radial", "--parts", "methods", "layers")
    run.measure(options_of(folder, output, *more))
    monkeypatch.setattr(document, "IMAGES", tmp_path)
    record = document.publish(output, tmp_path / "record.json")
    drawn = ["quality_density.png", "quality_strips.jpg", "quality_maps.png"]
    assert record["pictures"] == drawn
    assert all((tmp_path / name).stat().st_size > 1000 for name in drawn)


@pytest.mark.nightly
def test_one_trial_of_each_choice_runs(tmp_path):
    """A schedule, a size of means, and a cache with FP8 linears."""
    folder = tiny_model.save_checkpoint(tmp_path / "model")
    lab = run.Lab(options_of(folder, tmp_path / "run", "--steps", "6"))
    (cached,) = (c for c in combinations() if c.name == CACHED)
    wanted = {
        "falling density": schedules(6),
        "means of 1x2x8": front(),
        CACHED: [cached.trial("combinations")],
    }
    for name, found in wanted.items():
        (trial,) = [each for each in found if each.name == name][:1]
        lab._prepare([trial])
        prepared = dict(lab.generations._programs)
        row = lab.run_trial(trial)
        assert lab.generations._programs == prepared  # whatever was measured since
        assert row["name"] == name
        assert all(5 < value < 100 for value in row["clips"]["psnr"])
        assert 0 < row["kept_density"] < row["work"] <= 1.5
        assert sum(row["steps"].values()) == (6 if name == CACHED else 4)


@pytest.mark.nightly
def test_methods_go_on_from_the_dense_steps(tmp_path):
    """Videos are those that a pipeline makes in one go, of the same noise."""
    folder = tiny_model.save_checkpoint(tmp_path / "model")
    lab = run.Lab(options_of(folder, tmp_path / "run", "--batch", "1"))
    (trial,) = make_trials(
        "methods", names=["ours"], densities=[0.25], top_p={}, num_steps=4
    )
    dense = lab.dense(lab.reporting)
    begun = np.concatenate([each.latents for each in dense.begun])
    np.testing.assert_array_equal(dense.seen[1], begun)  # the step is looked at
    found = lab.generations.go_on(lab.work_of(trial), lab.reporting, dense.begun)
    assert [len(reports) for reports in found.reports] == [3, 3]
    for place, clip in enumerate(lab.reporting.batches()):
        noise = clip.noise(lab.pipeline.latent_shape(lab.sampling), lab.sampling.seed)
        whole = lab.pipeline.generate(
            clip.texts, lab.sampling, noise=noise, attention=trial.attention
        )
        np.testing.assert_allclose(found.videos[place], whole.video[0], atol=1e-5)
        assert not np.allclose(found.videos[place], dense.videos[place], atol=1e-3)


@pytest.mark.nightly
def test_a_published_checkpoint_is_measured(tmp_path):
    """Of diffusers' layout, with prompts of its own."""
    prompts = {
        "reporting": [["a cat sleeps", "calm"], ["a dog runs", "fast"]],
        "tuning": [["a fish swims", "calm"], ["a bird flies", "fast"]],
    }
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps(prompts))
    options = ["--checkpoint", str(TEXT_TO_VIDEO), "--output", str(tmp_path / "run")]
    options += ["--prompts", str(file), "--steps", "4", "--size", "64x96"]
    options += ["--frames", "5", "--tile", "2x2", "--batch", "1"]
    options += ["--densities", "0.5", "0.25", "--looks", "1", "--looked-at", "1"]
    options += ["--methods", "ours", "radial", "--parts", "floor", "methods", "layers"]
    run.measure(run.parse(options))
    record = json.loads((tmp_path / "run" / "quality.json").read_text())
    assert record["setup"]["reporting"] == prompts["reporting"]
    names = [(row["part"], row["name"]) for row in record["trials"][1:]]
    assert names == [("methods", name) for name in ("ours", "radial") for _ in "12"]
    assert {row["name"] for row in record["layers"]} == {"ours", "radial"}
    for row in record["trials"]:
        assert len(row["clips"]["psnr"]) == 2
        assert all(5 < value < 121 for value in row["clips"]["psnr"])  # 120 if equal


@pytest.mark.nightly
def test_presets_are_chosen_and_measured(tmp_path, monkeypatch):
    folder = tiny_model.save_checkpoint(tmp_path / "model")
    few = [PAPER_90, *(c for c in combinations() if c.name == CACHED)]
    monkeypatch.setattr(trials, "combinations", lambda _: few)
    parts = ("--parts", "combinations", "presets")
    options = options_of(folder, tmp_path / "run", *parts, "--steps", "6")
    run.measure(options)
    record = json.loads((tmp_path / "run" / "quality.json").read_text())
    assert set(record["presets"]) >= {"fastest"}
    measured = [row["name"] for row in record["trials"] if row["part"] == "presets"]
    assert measured[0] == PAPER_90.name
    assert "psnr_gain_fastest" in record["summary"]
    monkeypatch.setattr(document, "IMAGES", tmp_path)
    published = document.publish(
        tmp_path / "run", tmp_path / "record.json", tmp_path / "run"
    )
    assert "quality_speed.png" in published["pictures"]
    text = document.page(published, "record.json")
    assert "## With step caches and FP8" in text
    assert "| fastest | " in text
    assert "2 tuning prompts and 6 steps recommend no preset of speed" in text
    published["setup"]["tuning"] = [["a prompt", "calm"]] * len(TUNING)
    published["whole_runs"]["setup"]["tuning"] = published["setup"]["tuning"]
    text = document.page(published, "record.json")
    assert "- A whole video, fastest: " in text

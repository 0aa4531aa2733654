"""Values of the form, the command that they are, and messages beside fields."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from draft_jax import DraftConfig
from models.app.form import (
    CACHES,
    LINEARS,
    METHODS,
    MODES,
    PRESETS,
    SELECTIONS,
    Form,
    FormError,
    FormValues,
    abilities_of,
)
from models.app.limits import Limits
from models.cli import choices
from models.cli.cache_options import RULES
from models.cli.model import read_request
from models.cli.outputs import run_name
from models.cli.parser import build_parser
from models.diffusion import dtypes
from pallas_kernels.common import Device
from tests import tiny_model

PROMPT = "a red ball"


@pytest.fixture(scope="module")
def form(tmp_path_factory):
    folder = tiny_model.save_checkpoint(tmp_path_factory.mktemp("checkpoint"))
    return Form(model_options=("--checkpoint", str(folder)))


def values(**changes):
    base = FormValues(
        prompt=PROMPT, width=48, height=32, frames=3, steps=4, guidance=4.0, seed=0
    )
    return dataclasses.replace(base, **changes)


def messages(form, **changes):
    with pytest.raises(FormError) as caught:
        form.read(values(**changes))
    return caught.value.messages


def test_every_choice_has_a_sentence():
    assert tuple(SELECTIONS) == choices.SELECTIONS
    assert tuple(PRESETS) == choices.PRESETS
    assert tuple(CACHES) == ("off", *RULES)
    assert tuple(LINEARS) == choices.LINEARS
    assert tuple(METHODS) == choices.METHODS
    tables = (SELECTIONS, PRESETS, MODES, CACHES, LINEARS, METHODS)
    sentences = [sentence for table in tables for sentence in table.values()]
    assert all(sentence.endswith(".") for sentence in sentences)


def test_defaults_are_the_models(form):
    found, request = Form().defaults(prompt=PROMPT)
    assert (found.width, found.height, found.frames, found.steps) == (128, 96, 25, 16)
    assert (found.guidance, found.seed, found.sparsity) == (4.0, 0, 0.9)
    assert found.prompt == PROMPT
    assert request.arguments.checkpoint is None


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        (
            {},
            "--sparsity=0.9 --method=compensated --selection=row_topk --preset=paper "
            "--compare",
        ),
        ({"mode": "dense", "sparsity": 7.0}, "--dense"),
        (
            {"mode": "sparse", "selection": "top_p", "top_p": 0.8},
            "--sparsity=0.9 --method=compensated --selection=top_p --preset=paper "
            "--top-p=0.8",
        ),
        ({"mode": "dense", "cache": "easy"}, "--dense --cache=easy"),
        (
            {"mode": "dense", "cache": "easy", "cache_values": " 0.1,2 "},
            "--dense --cache=easy:0.1,2",
        ),
        ({"mode": "dense", "cache_values": "0.1"}, "--dense"),  # without a rule
        ({"mode": "dense", "linears": "float8"}, "--dense --linears=float8"),
    ],
    ids=str,
)
def test_command(form, changes, options):
    size = "--seed=0 --steps=4 --size=48x32 --frames=3 --guidance=4"
    expected = ["generate", *form.model_options, *size.split(), *options.split()]
    assert form.command(values(**changes)) == [*expected, "--", PROMPT]


def test_methods_are_those_of_their_presets(form):
    config, _ = form.read(values()).draft
    assert config == DraftConfig.compensated()
    changes = {"method": "paper", "sparsity": 0.75, "selection": "percentile"}
    config, _ = form.read(values(**changes)).draft
    assert config == DraftConfig.paper()


def test_precision_is_that_of_the_models_options_unless_changed(form):
    options = (*form.model_options, "--linears", "float8")
    other = dataclasses.replace(form, model_options=options)
    found, request = other.defaults()
    assert (found.linears, request.arguments.linears) == ("float8", "float8")
    assert other.read(values(linears="float8")).arguments.linears == "float8"
    assert "--linears=bfloat16" in other.command(values())
    assert other.read(values()).arguments.linears == "bfloat16"


@pytest.mark.parametrize("prompt", ["--help", "-", "a 'quoted' \"cat\"\n", "猫"])
def test_any_prompt_is_one(form, prompt):
    request = form.read(values(prompt=prompt, negative_prompt=prompt))
    assert request.arguments.prompt == prompt
    assert request.sampling.negative_prompt == prompt


def test_a_run_has_the_name_that_its_command_gives_it(form):
    """So the page and the command line find each other's runs."""
    request = form.read(values(mode="sparse"))
    typed = ["generate", PROMPT, *form.model_options, "--size", "48x32"]
    typed += ["--frames", "3", "--steps", "4"]
    arguments = build_parser().parse_args(typed)
    arguments.argv = typed
    other = read_request(arguments)
    assert run_name(request.arguments, request.sampling) == run_name(
        arguments, other.sampling
    )


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("prompt", "\udcff", "UTF-8"),
        ("negative_prompt", "\udcff", "UTF-8"),
        ("steps", 0, "num_steps=0 must be a positive integer"),
        ("steps", None, "steps is missing"),
        ("steps", 2.5, "steps=2.5 must be a whole number"),
        ("seed", -1, "seed=-1"),
        ("seed", float("nan"), "seed=nan must be a finite number"),
        ("frames", 4, "1 more than a multiple of 2"),
        ("width", 47, "width=47 must be a multiple of 8"),
        ("height", 33, "height=33 must be a multiple of 8"),
        ("height", 0, "height=0 must be a positive integer"),
        ("guidance", -1.0, "guidance=-1.0"),
        ("guidance", float("inf"), "finite"),
        ("sparsity", 1.0, "sparsity=1.0"),
        ("selection", "best", "invalid choice: 'best'"),
        ("preset", "published", "no published rule"),
        ("cache", "mag", "no ratios are published for this model"),
        ("cache", "best", "'best' must be one of easy, mag"),
        ("linears", "int8", "invalid choice: 'int8'"),
        ("method", "best", "invalid choice: 'best'"),
    ],
)
def test_bad_input_is_told_beside_its_field(form, field, value, message):
    found = messages(form, **{field: value})
    assert list(found) == [field]
    assert message in found[field]


@pytest.mark.parametrize("constants", ["fast", "-1", "0.1,2,3", "nan"])
def test_wrong_constants_of_a_cache_are_told_beside_them(form, constants):
    found = messages(form, cache="easy", cache_values=constants)
    assert list(found) == ["cache_values"]
    assert "easy" in found["cache_values"]


def test_all_wrong_fields_are_told_at_once(form):
    found = messages(form, width=47, frames=4, sparsity=2.0)
    assert set(found) == {"width", "frames", "sparsity"}


def test_what_no_field_is_to_blame_for_is_told_of_the_form(form, monkeypatch):
    def check(request):
        raise ValueError("it is full")

    full = dataclasses.replace(form, check=check)
    assert messages(full) == {"": "it is full"}


def test_limits_are_told_beside_their_field(form):
    limits = Limits(frames=9, pixels=48 * 32)
    limited = dataclasses.replace(form, check=lambda r: limits.check(r, None))
    limited.read(values(frames=9))
    assert "--max-frames" in messages(limited, frames=11)["frames"]
    assert "--max-pixels" in messages(limited, height=48)["width"]


def test_an_image_is_refused_where_the_model_takes_none(form, tmp_path):
    picture = tmp_path / "cat.png"
    Image.fromarray(np.zeros((32, 48, 3), np.uint8)).save(picture)
    found = messages(form, image=picture)
    assert list(found) == ["image"]
    assert "text-to-video" in found["image"]


def test_abilities_come_with_their_reasons(form):
    _, request = form.defaults()
    can = abilities_of(request)
    assert "text-to-video" in can.image
    assert "no published rule" in can.published
    assert "no ratios are published" in can.mag
    assert can.float8 is None  # a CPU has it


def test_what_the_device_lacks_comes_with_its_reason(form, monkeypatch):
    card = Device(platform="gpu", kind="A100", compute_capability=(8, 0))
    monkeypatch.setattr(dtypes, "current_device", lambda: card)
    _, request = form.defaults()
    assert "not gpu A100 (sm_80)" in abilities_of(request).float8
    found = messages(form, linears="float8")
    assert list(found) == ["linears"]
    assert "not gpu A100 (sm_80)" in found["linears"]


def test_a_damaged_model_is_told_at_once(tmp_path):
    with pytest.raises(ValueError, match="holds no model"):
        Form(model_options=("--checkpoint", str(tmp_path))).defaults()


def test_missing_images_are_asked_for(form, monkeypatch):
    """A model that starts from an image, whose other fields are right."""
    _, request = form.defaults()
    kind = type(request.info.conditioning)

    def check(self, *, given):
        if not given:
            raise ValueError("image is missing, but this is an image-to-video model")

    monkeypatch.setattr(kind, "check_image", check)
    found = messages(form, image=None)
    assert list(found) == ["image"]
    assert abilities_of(request).image is None

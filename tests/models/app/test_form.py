"""Values of the form, the command that they are, and messages beside fields."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from models.app.form import (
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
from models.cli.model import read_request
from models.cli.outputs import run_name
from models.cli.parser import build_parser
from tests import tiny_model

PROMPT = "a red ball"


@pytest.fixture(scope="module")
def form(tmp_path_factory):
    folder = tiny_model.save_checkpoint(tmp_path_factory.mktemp("checkpoint"))
    return Form(model_options=("--checkpoint", str(folder)))


def values(**changes):
    base = FormValues(
        prompt=PROMPT, width=48, height=32, frames=4, steps=4, guidance=4.0, seed=0
    )
    return dataclasses.replace(base, **changes)


def messages(form, **changes):
    with pytest.raises(FormError) as caught:
        form.read(values(**changes))
    return caught.value.messages


def test_every_choice_has_a_sentence():
    assert tuple(SELECTIONS) == choices.SELECTIONS
    assert tuple(PRESETS) == choices.PRESETS
    sentences = [*SELECTIONS.values(), *PRESETS.values(), *MODES.values()]
    assert all(sentence.endswith(".") for sentence in sentences)


def test_defaults_are_the_models(form):
    found, request = Form().defaults(prompt=PROMPT)
    assert (found.width, found.height, found.frames, found.steps) == (128, 96, 24, 16)
    assert (found.guidance, found.seed, found.sparsity) == (4.0, 0, 0.9)
    assert found.prompt == PROMPT
    assert request.arguments.checkpoint is None


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, "--sparsity=0.9 --selection=row_topk --preset=paper --compare"),
        ({"mode": "dense", "sparsity": 7.0}, "--dense"),
        (
            {"mode": "sparse", "selection": "top_p", "top_p": 0.8},
            "--sparsity=0.9 --selection=top_p --preset=paper --top-p=0.8",
        ),
    ],
    ids=str,
)
def test_command(form, changes, options):
    size = "--seed=0 --steps=4 --size=48x32 --frames=4 --guidance=4"
    expected = ["generate", *form.model_options, *size.split(), *options.split()]
    assert form.command(values(**changes)) == [*expected, "--", PROMPT]


@pytest.mark.parametrize("prompt", ["--help", "-", "a 'quoted' \"cat\"\n", "猫"])
def test_any_prompt_is_one(form, prompt):
    request = form.read(values(prompt=prompt, negative_prompt=prompt))
    assert request.arguments.prompt == prompt
    assert request.sampling.negative_prompt == prompt


def test_a_run_has_the_name_that_its_command_gives_it(form):
    """So the page and the command line find each other's runs."""
    request = form.read(values(mode="sparse"))
    typed = ["generate", PROMPT, *form.model_options, "--size", "48x32"]
    typed += ["--frames", "4", "--steps", "4"]
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
        ("frames", 3, "multiple of 2"),
        ("width", 47, "width=47 must be a multiple of 8"),
        ("height", 33, "height=33 must be a multiple of 8"),
        ("height", 0, "height=0 must be a positive integer"),
        ("guidance", -1.0, "guidance=-1.0"),
        ("guidance", float("inf"), "finite"),
        ("sparsity", 1.0, "sparsity=1.0"),
        ("selection", "best", "invalid choice: 'best'"),
        ("preset", "published", "no published rule"),
    ],
)
def test_bad_input_is_told_beside_its_field(form, field, value, message):
    found = messages(form, **{field: value})
    assert list(found) == [field]
    assert message in found[field]


def test_all_wrong_fields_are_told_at_once(form):
    found = messages(form, width=47, frames=3, sparsity=2.0)
    assert set(found) == {"width", "frames", "sparsity"}


def test_what_no_field_is_to_blame_for_is_told_of_the_form(form, monkeypatch):
    def check(request):
        raise ValueError("it is full")

    full = dataclasses.replace(form, check=check)
    assert messages(full) == {"": "it is full"}


def test_limits_are_told_beside_their_field(form):
    limits = Limits(frames=8, pixels=48 * 32)
    limited = dataclasses.replace(form, check=lambda r: limits.check(r, None))
    limited.read(values(frames=8))
    assert "--max-frames" in messages(limited, frames=10)["frames"]
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

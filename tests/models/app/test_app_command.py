"""Options of `draft-video app`, and what is told before a page is served."""

import importlib.util

import pytest

from models.app import command
from models.app.command import hosts_of, limits_from
from models.app.limits import Limits
from models.cli import main
from models.cli.app_options import model_arguments
from models.cli.parser import build_parser


def parse(*arguments):
    parsed = build_parser().parse_args(["app", *arguments])
    parsed.argv = ["app", *arguments]
    return parsed


def test_the_page_is_for_this_machine_alone_unless_asked():
    arguments = parse()
    assert (arguments.host, arguments.share) == ("127.0.0.1", False)
    assert limits_from(arguments) == Limits()


def test_options_of_the_model_are_those_of_generate():
    own = ["--port", "8000", "--host", "::1", "--share", "--max-frames", "9"]
    own += ["--outputs", "videos", "--max-memory", "2", "--allow-host", "a.example"]
    models = ["--checkpoint", "FOLDER", "--lora", "a:0.5", "--vae-tile", "64"]
    arguments = parse(*own[:2], *models, *own[2:])
    found = model_arguments(arguments.argv[1:])
    assert found == tuple(models)
    build_parser().parse_args(["generate", *found, "--", "a cat"])


def test_limits_are_those_of_the_options():
    arguments = parse("--max-frames", "9", "--max-pixels", "100", "--max-memory", "0.5")
    limits = limits_from(arguments)
    assert limits == Limits(frames=9, pixels=100, memory_bytes=2**29)


@pytest.mark.parametrize("flag", ["--max-frames", "--max-pixels", "--max-memory"])
def test_limits_are_positive(flag):
    with pytest.raises(ValueError, match=f"{flag} -1.* must be a positive number"):
        limits_from(parse(flag, "-1"))


@pytest.mark.parametrize(
    ("host", "allowed", "asked", "expected"),
    [
        ("127.0.0.1", [], "localhost:80", True),
        ("127.0.0.1", [], "10.0.0.3", False),
        ("0.0.0.0", [], "10.0.0.3", True),
        ("0.0.0.0", [], "evil.example", False),
        ("0.0.0.0", ["my.example"], "my.example:7860", True),
        ("10.0.0.3", [], "10.0.0.3:7860", True),
    ],
)
def test_names_by_which_the_page_is_asked_for(host, allowed, asked, expected):
    assert hosts_of(host, allowed).allow(asked) == expected


def test_without_gradio_the_command_says_what_to_install(monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        command.importlib.util,
        "find_spec",
        lambda name: None if name == "gradio" else found(name),
    )
    assert main(["app"]) == 2
    assert "pip install '.[app]'" in capsys.readouterr().err

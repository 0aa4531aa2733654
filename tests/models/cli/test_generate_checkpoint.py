"""`draft-video` and what `--checkpoint` names, or should have named."""

import pytest

from models.cli import main
from models.mini.checkpoint import MiniCheckpoint
from models.umt5.text_encoder import UMT5TextEncoder
from models.wan.checkpoint import WanParts
from tests.wan_folders import TEXT_TO_VIDEO


@pytest.fixture(autouse=True)
def stopped(monkeypatch):
    """Stops a run as it loads, as Ctrl-C would."""

    def stop(*_, **__):
        raise KeyboardInterrupt

    for owner, name in (
        (WanParts, "load_transformer"),
        (UMT5TextEncoder, "load"),
        (MiniCheckpoint, "load"),
    ):
        monkeypatch.setattr(owner, name, stop)


def error_of(output, capsys, *arguments):
    command = ["generate", "a cat", "--output", str(output), *map(str, arguments)]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("given", "verb"),
    [
        (("--embeddings", "kept"), "fits"),
        (("--text-device", "cpu"), "fits"),
        (("--lora", "a.safetensors"), "fits"),
        (("--embeddings", "kept", "--text-device", "cpu"), "fit"),
        (("--lora", "a.safetensors", "--vae-tile", "64"), "fit"),
    ],
    ids=" ".join,
)
def test_options_of_published_models_are_named_as_they_were_given(
    tmp_path, capsys, given, verb
):
    names = " and ".join(map(" ".join, zip(given[::2], given[1::2], strict=True)))
    assert error_of(tmp_path / "out", capsys, *given) == (
        f"draft-video: error: {names} {verb} HunyuanVideo and Wan models only: "
        "name one with --checkpoint\n"
    )


def test_wrong_folders_are_told_before_options(tmp_path, capsys):
    given = ("--checkpoint", tmp_path, "--embeddings", "kept")
    error = error_of(tmp_path / "out", capsys, *given)
    assert f"{tmp_path} holds no model; expected a HunyuanVideo model in the " in error
    assert ", or a Wan model in the original layout" in error


@pytest.mark.parametrize(
    ("given", "noted"),
    [
        (("--size", "720p"), "1280x720"),
        (("--size", "480x832"), "480x832"),
        (("--size", "96x128"), None),
        ((), None),
        (("--size", "720p", "--checkpoint", TEXT_TO_VIDEO), None),
    ],
    ids=["720p", "tall", "turned", "default", "wan"],
)
def test_sizes_beyond_the_shipped_model_are_noted(tmp_path, capsys, given, noted):
    command = ["generate", "a cat", "--output", str(tmp_path / "out")]
    assert main([*command, *map(str, given)]) == 130
    first, *others = capsys.readouterr().err.splitlines()
    if noted is None:
        assert (first, others) == ("draft-video: interrupted", [])
    else:
        assert first.startswith(
            f"draft-video: note: --size {noted} is larger than 128x"
        )
        assert "for a larger model, name it with --checkpoint" in first

"""Settings of Wan's own generate.py; bad fields are tested with the pipeline."""

import pytest

from models.diffusion.schedulers import FlowUniPC
from models.wan.sampling import (
    WAN_IMAGE_NEGATIVE_PROMPT,
    WAN_NEGATIVE_PROMPT,
    wan_sampling,
)


@pytest.mark.parametrize(
    ("size", "task", "expected"),
    [
        ("480p", "text", (480, 832, 50, 5.0)),
        ("720p", "text", (720, 1280, 50, 5.0)),
        ("480p", "image", (480, 832, 40, 3.0)),
        ("720p", "image", (720, 1280, 40, 5.0)),
    ],
    ids=str,
)
def test_settings_of_the_original(size, task, expected):
    sampling = wan_sampling(size, task=task)
    height, width, num_steps, shift = expected
    assert (sampling.frames, sampling.height, sampling.width) == (81, height, width)
    assert sampling.make_solver() == FlowUniPC(num_steps=num_steps, shift=shift)
    assert sampling.guidance == 5.0
    assert sampling.guided
    from_image = sampling.negative_prompt == WAN_IMAGE_NEGATIVE_PROMPT
    assert from_image == (task == "image")


def test_negative_prompts():
    """28 terms, from "garish colours" to "walking backwards"."""
    terms = WAN_NEGATIVE_PROMPT.split("\N{FULLWIDTH COMMA}")
    assert len(terms) == 28
    assert (terms[0], terms[-1]) == ("色调艳丽", "倒着走")
    assert "JPEG压缩残留" in terms
    shaking, rest = WAN_IMAGE_NEGATIVE_PROMPT.split("\N{FULLWIDTH COMMA}", 1)
    assert (shaking, rest) == ("镜头晃动", WAN_NEGATIVE_PROMPT)


def test_changes_and_their_checks():
    sampling = wan_sampling("480p", height=832, width=480, guidance=1.0, seed=3)
    assert (sampling.height, sampling.width, sampling.seed) == (832, 480, 3)
    assert not sampling.guided
    with pytest.raises(ValueError, match="frames=0 must be a positive integer"):
        wan_sampling(frames=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": "1080p"}, "size='1080p' must be one of"),
        ({"task": "video"}, "task='video' must be one of"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("without_jaxtyping")
def test_unknown_presets_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        wan_sampling(**arguments)

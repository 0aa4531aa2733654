"""What the steps have made is never lost: latents of a video that is not decoded."""

import dataclasses
import json

import numpy as np
import pytest
import safetensors.numpy

from models.checkpoints.memory_map import CheckpointError
from models.diffusion.decoding import KeptLatents
from models.diffusion.results import DecodingError
from models.mini.pipeline import pipeline_of
from tests import tiny_model

SAMPLING = dataclasses.replace(tiny_model.SAMPLING, num_steps=1)


@pytest.fixture(scope="module")
def whole():
    return pipeline_of(tiny_model.make_checkpoint())


def test_an_error_of_the_codec_has_all_but_the_video(whole, monkeypatch):
    expected = whole.generate("a red ball", SAMPLING)
    with monkeypatch.context() as patch:
        tiny_model.fail_to_decode(patch)
        with pytest.raises(DecodingError, match="so much memory is not th") as caught:
            whole.generate("a red ball", SAMPLING)
    result = caught.value.result
    assert caught.value.finished is None
    np.testing.assert_array_equal(result.latents, expected.latents)
    np.testing.assert_array_equal(whole.decode(result.latents), expected.video)
    assert result.video.shape == (1, 0, 32, 48, 3)
    assert result.time_ms.shape == (1,)
    assert not result.stopped


@pytest.mark.nightly
def test_videos_of_earlier_seeds_are_there(whole, monkeypatch):
    expected = whole.generate("a red ball", SAMPLING, seeds=[3, 4])
    with monkeypatch.context() as patch:
        tiny_model.fail_to_decode(patch, after=1)
        with pytest.raises(DecodingError) as caught:
            whole.generate("a red ball", SAMPLING, seeds=[3, 4, 5])
    error = caught.value
    np.testing.assert_array_equal(error.finished.video, expected.video[:1])
    second = whole.decode(error.result.latents)
    np.testing.assert_array_equal(second, expected.video[1:])


def kept(**changes):
    latents = np.arange(24, dtype=np.float32).reshape(1, 2, 3, 2, 2)
    model = {"checkpoint": None, "vae": "a file", "revision": None}
    report = {"prompt": "日本 <b>", "fps": 12.0}
    base = KeptLatents(latents=latents, video="video.mp4", report=report, model=model)
    return dataclasses.replace(base, **changes)


def test_a_file_of_latents_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "latents.safetensors"
    kept().write(path)
    found = KeptLatents.read(path)
    np.testing.assert_array_equal(found.latents, kept().latents)
    assert (found.video, found.report, found.model) == (
        "video.mp4",
        kept().report,
        kept().model,
    )
    assert list(tmp_path.iterdir()) == [path]


def test_what_json_cannot_say_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        kept(report={"fps": float("nan")}).write(tmp_path / "latents.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "metadata",
    [None, {}, {"draft_video": "{"}, {"draft_video": "[]"}, {"draft_video": "{}"}],
    ids=str,
)
def test_another_file_holds_no_latents(tmp_path, metadata):
    path = tmp_path / "other.safetensors"
    tensors = {"latents": np.zeros((1, 1, 1, 1, 1), np.float32)}
    path.write_bytes(safetensors.numpy.save(tensors, metadata=metadata))
    with pytest.raises(CheckpointError, match="holds no latents of a video"):
        KeptLatents.read(path)


def test_a_file_without_the_tensor_holds_no_latents(tmp_path):
    path = tmp_path / "other.safetensors"
    entry = {"video": "video.mp4", "report": {}, "model": {}}
    data = safetensors.numpy.save(
        {"weight": np.zeros(2)}, metadata={"draft_video": json.dumps(entry)}
    )
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="holds no latents of a video"):
        KeptLatents.read(path)

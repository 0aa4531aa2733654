"""Steps whose videos are shared among devices; those run in a process of their own."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from models.mini.compilation import Task
from models.mini.data_parallel import DataParallel
from models.mini.feed import Feed
from models.mini.run import Run
from models.mini.stages import Length, Stage, VideoSize

SIZE = VideoSize(frames=3, height=2, width=3, batch=6)


@pytest.fixture(scope="module")
def found():
    done = subprocess.run(
        [sys.executable, "-m", "tests.models.mini.data_parallel_cases"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.nightly
def test_gradients_are_means_over_all_videos(found):
    case = {name: np.array(value) for name, value in found["gradients"].items()}
    error = case["x"] @ case["weights"] - case["y"]
    np.testing.assert_allclose(case["loss"], np.mean(error**2), rtol=1e-5)
    expected = 2 * error @ case["x"] / len(error)
    np.testing.assert_allclose(case["gradient"], expected, rtol=1e-5)


@pytest.mark.nightly
def test_devices_draw_noise_of_their_own(found):
    first, second = found["keys"]
    assert first != second


@pytest.mark.nightly
def test_devices_train_one_model(found):
    training = found["training"]
    assert np.mean(training["losses"][-10:]) < 0.8 * training["losses"][0]
    assert set(training["devices_of_each"]) == {2}
    assert training["equal"]
    encoding, step = training["sent"]
    assert encoding == 0
    assert step == 1  # all gradients at once


def test_parts_are_batches_of_their_own():
    with (
        Feed(3, workers=0) as one,
        Feed(3, workers=0, parts=2) as two,
    ):
        half = VideoSize(frames=3, height=2, width=3, batch=3)
        captions, *kinds = two.get(5, lambda _: SIZE)
        first_captions, *first_kinds = one.get(5, lambda _: half)
    assert len(captions) == SIZE.batch
    assert captions[:3] == first_captions
    for kind, first in zip(kinds, first_kinds, strict=True):
        assert set(kind) == set(first)
        for name, values in kind.items():
            count = len(first[name])
            assert len(values) == 2 * count
            np.testing.assert_array_equal(values[:count], first[name])
    assert captions[3:] != first_captions


def test_batches_that_cannot_be_shared_are_refused():
    """That of the last stage is refused before the first begins."""
    four = mock.Mock(spec=Task)
    four.devices.count = 4
    stages = (
        Stage(share=0.5, turns=(dataclasses.replace(SIZE, batch=8),)),
        Stage(share=0.5, turns=(SIZE,)),
    )
    message = r"batch=6 .* multiple of the 4 devices"
    with pytest.raises(ValueError, match=message):
        Run(four, stages, Length(steps=2), Path("unused"), workers=0)
    with Feed(0, workers=0, parts=4) as feed, pytest.raises(ValueError, match=message):
        feed.get(0, lambda _: SIZE)


@pytest.mark.parametrize("count", [0, 1000])
def test_devices_that_are_not_there_are_refused(count):
    with pytest.raises(ValueError, match=f"devices={count} must be 1 to "):
        DataParallel.of(count)

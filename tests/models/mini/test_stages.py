"""Stages of a training: what is read, and which size has its turn."""

import argparse

import pytest

from models.mini.stages import Length, Stage, VideoSize, sizes_of, stage_index

SMALL = VideoSize(frames=25, height=96, width=128, batch=32)
LARGE = VideoSize(frames=25, height=256, width=384, batch=4)


def test_stage_is_read_from_text():
    stage = Stage.parse("0.7=25x96x128*32*2+25x256x384*4")
    assert stage == Stage(share=0.7, turns=(SMALL, SMALL, LARGE))
    assert [stage.size_at(step).height for step in range(5)] == [96, 96, 256, 96, 96]


@pytest.mark.parametrize(
    "text", ["25x96x128*32", "1=25x96*32", "0=25x96x128*32", "1=25x96x128*0", "1="]
)
def test_other_text_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="must be SHARE=FRAMESx"):
        Stage.parse(text)


def test_stages_follow_their_shares():
    stages = (Stage(share=1.0, turns=(SMALL,)), Stage(share=3.0, turns=(LARGE, SMALL)))
    found = [stages[stage_index(stages, share)] for share in (0.0, 0.24, 0.26, 1.0)]
    assert found == [stages[0], stages[0], stages[1], stages[1]]
    assert sizes_of(stages) == (SMALL, LARGE)
    assert Length(steps=10).share(5, 99.0) == 0.5
    assert Length(seconds=10.0).share(5, 2.5) == 0.25

"""A seed for each item of a batch, and that item made again alone."""

import dataclasses

import numpy as np
import pytest

from draft_jax import AttentionPlan, DraftConfig, SparsitySchedule
from models.diffusion.interfaces import ImageCondition
from models.diffusion.seeds import items_of_seeds
from models.loading import load_pipeline
from models.mini.pipeline import pipeline_of
from tests import tiny_model
from tests.wan_folders import TEXT_TO_VIDEO

# Of a video in [0, 1]; measured on CPU: 4e-6 in a batch, and 0 with seeds.
BATCH_ROUNDING = 8e-6
# Of one kind of step, and so one program.
SPARSE = AttentionPlan.draft(
    DraftConfig.paper(sparsity=0.5), SparsitySchedule(dense_fraction=0.0)
)


@pytest.fixture(
    scope="module", params=["mini", pytest.param("wan", marks=pytest.mark.nightly)]
)
def pipeline(request):
    if request.param == "mini":
        pipeline = pipeline_of(tiny_model.make_checkpoint())
        sampling = dataclasses.replace(tiny_model.SAMPLING, num_steps=2)
    else:
        pipeline = load_pipeline(TEXT_TO_VIDEO)
        sampling = dataclasses.replace(
            pipeline.sampling, frames=5, height=32, width=48, num_steps=2
        )
    return dataclasses.replace(pipeline, sampling=sampling)


def alone(pipeline, prompt, seed):
    sampling = dataclasses.replace(pipeline.sampling, seed=seed)
    return pipeline.generate(prompt, sampling, attention=SPARSE)


def test_an_item_can_be_made_again_alone_bit_for_bit(pipeline):
    prompts = ["a red ball", "a boat", "the blue sea"]
    batch = pipeline.generate(prompts, seeds=[3, 4, 4_000_000_000], attention=SPARSE)
    again = alone(pipeline, "a boat", 4)
    np.testing.assert_array_equal(batch.video[1], again.video[0])
    np.testing.assert_array_equal(batch.latents[1], again.latents[0])
    for first, second in ((0, 1), (1, 2), (0, 2)):
        assert np.abs(batch.latents[first] - batch.latents[second]).max() > 0.1
    assert len(batch.time_ms) == 2
    assert (batch.time_ms > 0).all()
    assert batch.kept_density.shape == again.kept_density.shape


def test_one_prompt_serves_all_seeds(pipeline):
    batch = pipeline.generate("a boat", seeds=[5, 4], attention=SPARSE)
    again = alone(pipeline, "a boat", 4)
    np.testing.assert_array_equal(batch.video[1], again.video[0])
    # A context in place of the prompt, and one for each seed.
    context = pipeline.encode(["a boat", "a boat"])
    other = pipeline.generate(context, seeds=[5, 4], attention=SPARSE)
    np.testing.assert_allclose(other.video, batch.video, rtol=0, atol=BATCH_ROUNDING)


@pytest.mark.nightly
def test_items_of_a_true_batch_differ_by_rounding(pipeline, measured):
    """Without seeds all items are in one call, whose sums have another order."""
    batch = pipeline.generate(["a boat", "a red ball"], attention=SPARSE)
    again = pipeline.generate("a boat", attention=SPARSE)
    difference = np.abs(batch.video[0] - again.video[0]).max()
    measured("item of a batch against it alone", difference)
    assert difference < BATCH_ROUNDING


@pytest.mark.nightly
def test_items_of_the_shipped_model_can_be_made_again():
    pipeline = load_pipeline()
    sampling = dataclasses.replace(pipeline.sampling, num_steps=4, frames=9)
    batch = pipeline.generate("a red ball", sampling, seeds=[7, 8], attention=SPARSE)
    again = pipeline.generate(
        "a red ball", dataclasses.replace(sampling, seed=8), attention=SPARSE
    )
    np.testing.assert_array_equal(batch.video[1], again.video[0])


# ------------------------------------------------------------------- wrong numbers


@pytest.mark.parametrize(
    ("seeds", "prompts", "message"),
    [
        ([], "a boat", r"seeds=\[\] must hold at least one seed"),
        ([3, -1], "a boat", r"seeds\[1\]=-1 must be an integer in \[0, 2\*\*32\)"),
        ([2**32], "a boat", r"seeds\[0\]=4294967296 must be an integer"),
        ([1, 2, 3], ["a", "b"], "there are 2 prompts for 3 seeds; expected 3, or one"),
        ([1], ["a", "b"], "there are 2 prompts for 1 seeds; expected 1, or one"),
    ],
    ids=["none", "negative", "large", "more-seeds", "more-prompts"],
)
@pytest.mark.usefixtures("without_jaxtyping")
def test_seeds_must_fit_the_prompts(seeds, prompts, message):
    pipeline = pipeline_of(tiny_model.make_checkpoint())
    with pytest.raises(ValueError, match=message):
        pipeline.generate(prompts, tiny_model.SAMPLING, seeds=seeds)


def test_seeds_and_noise_are_two_answers_to_one_question():
    pipeline = pipeline_of(tiny_model.make_checkpoint())
    noise = np.zeros((1, 2, 4, 6, 16), np.float32)
    with pytest.raises(ValueError, match=r"seeds=\[1\] and noise are both given"):
        pipeline.generate("a boat", tiny_model.SAMPLING, seeds=[1], noise=noise)


def test_images_go_with_their_seeds():
    def values(image):
        items = items_of_seeds([3, 4], "a boat", tiny_model.SAMPLING, image=image)
        assert [item.sampling.seed for item in items] == [3, 4]
        return [item.image for item in items]

    image = np.arange(24.0).reshape(2, 4, 3)
    assert all(part is image for part in values(image))
    two = np.stack([image, -image])
    np.testing.assert_array_equal(values(two), two[:, None])
    condition = ImageCondition(np.arange(2.0).reshape(2, 1, 1, 1, 1), None)
    assert [part.latents.item() for part in values(condition)] == [0.0, 1.0]
    with pytest.raises(ValueError, match="there are 3 images for 2 seeds"):
        values(np.stack([image] * 3))

"""HunyuanCustom: a reference frame before the video, and a batch of two for guidance.

See tests/fixtures/make_hunyuan_custom_fixtures.py. The published batch is a negative
prompt and then the prompt; ours has the prompts first.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from draft_jax import AttentionPlan, DraftConfig, SparsitySchedule
from models.diffusion.interfaces import ImageCondition, TextContext
from models.diffusion.pipeline import VideoPipeline
from models.diffusion.sampling import Sampling
from models.hunyuan.config import HunyuanConfig
from models.hunyuan.inputs import HunyuanInputs
from models.hunyuan.transformer import HunyuanTransformer
from tests import tolerances
from tests.cases import mostly_nightly
from tests.draft_jax import published_hunyuan as published
from tests.fixtures.seeded_arrays import seeded_uniform
from tests.tiny_hunyuan import channels_last, load_transformer, read_fixture

TENSORS, CASES = read_fixture("hunyuan_custom")
CASES = {name: case for name, case in CASES.items() if name != "versions"}
NEGATIVE, PROMPT = 0, 1  # rows of the published batch


class NoCodec:
    """Sizes of the autoencoder with 4 channels; pixels are not looked at."""

    stride = (4, 8, 8)

    def latent_shape(self, *, frames, height, width):
        return 1 + frames // 4, height // 8, width // 8, 4

    def encode(self, video):
        return jnp.full((len(video), *self.latent_shape(**sides(video))), video.mean())

    def decode(self, latents):
        return jnp.zeros((len(latents), 1, 1, 1, 3))

    def tiled(self, pixels):
        return self


def sides(video):
    return dict(zip(("frames", "height", "width"), video.shape[1:4], strict=True))


@functools.cache
def load(name):
    case = CASES[name]
    return load_transformer(
        case["config"],
        case["shapes"],
        text_length=sum(case["masks"][0]),
        reference_frames=1,
    )


def draw(name, *shape):
    """An input of a case, as the script has it."""
    return jnp.asarray(seeded_uniform(f"hunyuan custom {name}", shape))


def draw_latents(name, *shape):
    return jnp.asarray(channels_last(draw(name, *shape)))


def masks_of(name):
    """Rows of the text: ones, zeros and ones."""
    return jnp.asarray(
        [
            [True] * ones + [False] * zeros + [True] * more
            for ones, zeros, more in CASES[name]["masks"]
        ]
    )


def make_inputs(name):
    """The published batch."""
    size, mask = CASES[name]["size"], masks_of(name)
    noise = draw_latents(f"{name} noise", 1, 4, *size)
    reference = draw_latents(f"{name} reference", 1, 4, 1, *size[1:])
    return HunyuanInputs(
        latents=jnp.tile(noise, (2, 1, 1, 1, 1)),
        timesteps=jnp.full(2, CASES[name]["timestep"], jnp.float32),
        context=draw(f"{name} text", 2, mask.shape[1], 10),
        context_mask=mask,
        pooled=draw(f"{name} pooled", 2, 6),
        reference=jnp.tile(reference, (2, 1, 1, 1, 1)),
    )


def difference(got, expected):
    """The greatest, over the greatest of what is expected."""
    return np.abs(got - expected).max() / np.abs(expected).max()


def call(model, inputs, **options):
    with jax.default_matmul_precision("highest"):
        return jax.jit(lambda inputs: model(inputs, **options))(inputs)


@pytest.mark.parametrize("name", mostly_nightly(CASES, ["published"]))
def test_velocity_matches_the_published_rules(name, measured):
    got, _ = call(load(name), make_inputs(name))
    error = difference(got, channels_last(TENSORS[f"{name}/velocity"]))
    measured("HUNYUAN_CUSTOM", error)
    assert error <= tolerances.HUNYUAN_CUSTOM


@pytest.mark.nightly
@pytest.mark.parametrize("change", ["mask", "reference"])
def test_velocity_depends_on_what_is_special(change):
    """A mask of as many rows, all at the front; another reference."""
    inputs = make_inputs("published")
    if change == "mask":
        counts = inputs.context_mask.sum(1, keepdims=True)
        rows = jnp.arange(inputs.context_mask.shape[1])
        changed = inputs._replace(context_mask=rows < counts)
    else:
        changed = inputs._replace(reference=-inputs.reference)
    got, _ = call(load("published"), changed)
    expected = channels_last(TENSORS["published/velocity"])
    assert difference(got, expected) > 100 * tolerances.HUNYUAN_CUSTOM


def test_the_grid_has_the_reference_frame_and_the_text():
    model = load("published")
    grid = model.grid((2, 8, 16, 4))
    assert (grid.frames, grid.height, grid.width) == (3, 4, 8)
    assert (grid.text_length, grid.text_side) == (13, "after")
    assert model.grid((1, 2, 8, 16, 4)) == grid


def test_the_published_size():
    """768x1280, 129 frames: 34 frames of 48 x 80 tokens, and 831 of text."""
    config = HunyuanConfig.custom_13b()
    model = nnx.eval_shape(lambda: HunyuanTransformer(config, rngs=nnx.Rngs(0)))
    grid = model.grid((33, 96, 160, 16))
    assert (grid.frames, grid.height, grid.width) == (34, 48, 80)
    assert (grid.num_tokens, grid.num_blocks) == (131_391, 1_027)
    assert model.num_layers == 60


@pytest.mark.nightly
def test_masks_of_both_rows_are_those_of_the_published_code():
    model, inputs = load("published"), make_inputs("published")
    grid = model.grid(inputs.latents.shape)
    num_pairs = grid.num_visual_blocks**2
    plan = AttentionPlan.draft(
        DraftConfig.paper(sparsity=published.exact_sparsity(num_pairs, 0.9))
    )
    _, masks = call(model, inputs, attention=plan)
    q, k = call(model.capture_qk, inputs, attention=plan)
    q, k = (np.asarray(x)[:, :, grid.raster_order] for x in (q, k))
    sizes = published.Sizes(frames=3, rows=4, columns=8, tile=(2, 4), text=13)
    for layer in range(model.num_layers):
        expected, maps = published.block_masks(q[layer], k[layer], sizes, 0.9)
        expected = expected[::2]
        expected |= published.best_of_empty_rows(expected, maps)
        own = jax.tree.map(lambda leaf, layer=layer: leaf[layer], masks)
        np.testing.assert_array_equal(own.to_dense(), expected)
        assert (expected[NEGATIVE] != expected[PROMPT]).any()


def test_a_reference_may_be_pixels():
    """The codec is given one frame; the stand-in tells its mean."""
    image = jnp.full((64, 128, 3), 0.25)
    sampling = Sampling(frames=5, height=64, width=128)
    condition = load("published").conditioning.image_condition(
        image, sampling, codec=NoCodec(), image_encoder=None
    )
    np.testing.assert_array_equal(condition.latents, np.full((1, 1, 8, 16, 4), 0.25))
    assert condition.tokens is None


def make_context(name, row):
    mask = masks_of(name)
    return TextContext(
        draw(f"{name} text", 2, mask.shape[1], 10)[row : row + 1],
        mask.sum(1, dtype=jnp.int32)[row : row + 1],
        pooled=draw(f"{name} pooled", 2, 6)[row : row + 1],
        mask=mask[row : row + 1],
    )


def generate(name, **options):
    case = CASES[name]
    frames, rows, columns = case["size"]
    sampling = Sampling(
        frames=4 * frames - 3,
        height=8 * rows,
        width=8 * columns,
        num_steps=case["num_steps"],
        guidance=case["guidance"],
        shift=case["shift"],
        solver="euler",
    )
    reference = draw_latents(f"{name} reference", 1, 4, 1, rows, columns)
    with jax.default_matmul_precision("highest"):
        return VideoPipeline(load(name), None, NoCodec()).generate(
            make_context(name, PROMPT),
            sampling,
            image=ImageCondition(reference, None),
            negative_context=make_context(name, NEGATIVE),
            noise=draw_latents(f"{name} noise", 1, 4, *case["size"]),
            **options,
        )


@pytest.mark.parametrize(
    ("name", "batching"),
    [
        ("published", "one_call"),
        pytest.param("ragged", "two_calls", marks=pytest.mark.nightly),
    ],
)
def test_run_matches_the_published_rules(name, batching, measured):
    latents = generate(name, guidance_batching=batching).latents
    error = difference(latents, channels_last(TENSORS[f"{name}/latents"]))
    measured("HUNYUAN_RUN", error)
    assert error <= tolerances.HUNYUAN_RUN


@pytest.mark.nightly
def test_the_published_rule_in_a_run():
    """6 steps at shift 13: t is 1000, 984.8, 963.0; above 975 all layers are dense."""
    plan = AttentionPlan.draft(
        DraftConfig.paper(sparsity=0.9), SparsitySchedule.hunyuan_custom_published()
    )
    result = generate("published", attention=plan)
    dense = np.zeros((6, 4), bool)
    dense[:2] = True
    dense[:, :2] = True
    np.testing.assert_array_equal(result.dense, dense)
    np.testing.assert_array_equal(result.kept_density == 1.0, dense)
    expected = channels_last(TENSORS["published/latents"])
    assert difference(result.latents, expected) > tolerances.HUNYUAN_RUN
    assert math.isfinite(result.latents.sum())

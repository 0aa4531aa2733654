"""Against transformers' CLIPVisionModel; see tests/fixtures/make_clip_fixtures."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.clip.config import CLIPVisionConfig
from models.clip.encoder import CLIPVisionEncoder
from tests.models.clip.conftest import CASES, FIXTURES
from tests.tolerances import CLIP_NARROW_RELATIVE, CLIP_PARITY


@nnx.jit
def run(model, pixels):
    with jax.default_matmul_precision("highest"):
        return model(pixels)


def abstract(config):
    return nnx.eval_shape(lambda: CLIPVisionEncoder(config, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("layout", ["original", "transformers", "transformers_5"])
def test_encoder_matches_transformers(cases, name, layout):
    case = cases[name]
    got = run(case.model(layout), case.pixels)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, case.tokens, **CLIP_PARITY)


@pytest.mark.parametrize("dtype", CLIP_NARROW_RELATIVE)
def test_narrow_products(cases, dtype):
    case = cases["exact"]
    got = run(case.model(dtype=dtype, param_dtype=dtype), case.pixels)
    assert got.dtype == jnp.float32
    error = np.linalg.norm(got - case.tokens) / np.linalg.norm(case.tokens)
    assert error < CLIP_NARROW_RELATIVE[dtype]


def test_the_preset_has_the_published_parameters_less_the_unused():
    published = json.loads((FIXTURES / "clip_vit_h_14.json").read_text())["parameters"]
    leaves = jax.tree.leaves(nnx.state(abstract(CLIPVisionConfig.vit_h_14())))
    unused = published["last layer"] + published["post_layernorm"]
    assert sum(math.prod(leaf.shape) for leaf in leaves) == published["all"] - unused


def test_the_program_does_not_grow_with_depth():
    sizes = []
    for num_layers in (2, 6):
        config = CLIPVisionConfig.vit_h_14(num_layers=num_layers)
        structure, state = nnx.split(abstract(config))
        program = jax.make_jaxpr(
            lambda state, pixels, structure=structure: nnx.merge(structure, state)(
                pixels
            )
        )(state, jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32))
        sizes.append(str(program).count("\n"))
    assert sizes[0] == sizes[1]


@pytest.mark.usefixtures("without_jaxtyping")
def test_bad_inputs_are_named(cases):
    model = abstract(cases["exact"].config())
    with pytest.raises(ValueError, match=r"\(2, 12, 11, 3\) must be \[batch, 12, 12"):
        model(jnp.zeros((2, 12, 11, 3)))

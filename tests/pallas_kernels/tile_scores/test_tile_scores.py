"""Scores of tiles against NumPy: XLA, the oracle, and the kernel in interpret mode."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common import device
from pallas_kernels.common.device import Device
from pallas_kernels.tile_scores import (
    Parts,
    api,
    reference,
    tile_scores,
    why_not_in_kernel,
    xla,
)
from pallas_kernels.tile_scores.sm90 import backend
from pallas_kernels.tile_scores.sm90.plan import MAX_SMEM_BYTES, smem_bytes
from tests.cases import mostly_nightly
from tests.pallas_kernels.tile_scores.cases import growing_logits
from tests.tolerances import (
    TILE_SCORES,
    TILE_SCORES_BFLOAT16,
    TILE_SCORES_OF_EXACT_LOGITS,
)

INTERPRET = plgpu.InterpretGPUParams(detect_races=True)
H100 = Device(platform="gpu", kind="H100", compute_capability=(9, 0))
CPU = Device(platform="cpu")

NUM_CTAS = 3  # fewer than the tasks of some cases

pytestmark = pytest.mark.usefixtures("no_races")


@pytest.fixture(autouse=True)
def few_ctas(monkeypatch):
    monkeypatch.setattr(device, "num_multiprocessors", lambda: NUM_CTAS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    tiles: int
    per_tile: int
    batch: int = 1
    num_heads: int = 1
    head_dim: int = 64
    is_uneven: bool = False  # parts count differently, and some not at all
    size: float = 1.0  # of queries: logits are as many times larger

    @property
    def parts(self) -> Parts:
        num = self.tiles * self.per_tile
        keys = np.ones(num)
        if self.is_uneven:
            keys = np.random.default_rng(5).integers(0, 5, num).astype(float)
            keys[:: self.per_tile] = 4  # each tile has a part that counts
        of_tile = keys.reshape(-1, self.per_tile).sum(1)
        return Parts(
            per_tile=self.per_tile,
            query_weights=tuple((keys / np.repeat(of_tile, self.per_tile)).tolist()),
            key_weights=tuple(keys.tolist()),
        )

    def arrays(self):
        rng = np.random.default_rng(0)
        num = self.tiles * self.per_tile
        size = (self.batch, num, self.num_heads, self.head_dim)
        q, k = (rng.normal(size=size) for _ in range(2))
        return jnp.asarray(self.size * q, jnp.float32), jnp.asarray(k, jnp.float32)

    def tolerance(self, of_unit_logits: dict[str, float]) -> dict[str, float]:
        """An error of a logit, which grows with it, is a relative one of its share."""
        return of_unit_logits | {"rtol": self.size * of_unit_logits["rtol"]}


CASES = {
    "short-last-block": Case(tiles=18, per_tile=8),
    "less-than-a-block": Case(tiles=5, per_tile=4, batch=2, is_uneven=True),
    "blocks-of-uneven-parts": Case(
        tiles=20, per_tile=16, num_heads=2, head_dim=128, is_uneven=True
    ),
    "pairs": Case(tiles=67, per_tile=2, num_heads=2),
    "whole-blocks": Case(tiles=32, per_tile=8, size=12.0),
}


def loops(q, k, parts: Parts, scale: float):
    """Part by part, in float64."""
    q, k = (np.asarray(x, np.float64) for x in (q, k))
    batch, num_parts, num_heads, _ = q.shape
    size, tiles = parts.per_tile, parts.num_tiles
    counts = np.asarray(parts.key_weights)
    scores = np.zeros((batch, num_heads, tiles, tiles))
    for b, i, n in np.ndindex(batch, num_parts, num_heads):
        logits = scale * k[b, :, n] @ q[b, i, n]
        weights = counts * np.exp(logits - logits[counts > 0].max())
        shares = weights / weights.sum()
        for j, share in enumerate(shares):
            scores[b, n, i // size, j // size] += parts.query_weights[i] * share
    return scores


@pytest.mark.parametrize("name", mostly_nightly(CASES, ("less-than-a-block",)))
@pytest.mark.parametrize("chunk", [1, 2**27], ids=["by-tile", "at-once"])
def test_xla_matches_loops(name, chunk):
    case = CASES[name]
    score = functools.partial(xla.tile_scores, max_bytes=chunk)
    run = jax.jit(functools.partial(score, case.parts, scale=0.125))
    got = run(*case.arrays())
    want = loops(*case.arrays(), case.parts, 0.125)
    np.testing.assert_allclose(got, want, **case.tolerance(TILE_SCORES))
    np.testing.assert_allclose(got.sum(-1), 1.0, rtol=1e-5)


@pytest.mark.parametrize("name", mostly_nightly(CASES, ("less-than-a-block",)))
def test_oracle_matches_loops(name):
    case = CASES[name]
    got = reference.tile_scores(*case.arrays(), case.parts, scale=0.125)
    want = loops(*case.arrays(), case.parts, 0.125)
    np.testing.assert_allclose(got, want, **case.tolerance(TILE_SCORES))


@pytest.mark.parametrize("name", mostly_nightly(CASES, ("short-last-block",)))
def test_kernel_matches_loops(name):
    """Logits are as exact as bfloat16 means of queries and keys are."""
    case = CASES[name]
    scale = case.head_dim**-0.5
    got = backend.tile_scores(
        *case.arrays(), case.parts, scale=scale, interpret=INTERPRET
    )
    want = loops(*case.arrays(), case.parts, scale)
    np.testing.assert_allclose(got, want, **case.tolerance(TILE_SCORES_BFLOAT16))
    np.testing.assert_allclose(got.sum(-1), 1.0, rtol=1e-5)


@pytest.mark.nightly
def test_kernel_follows_logits_that_grow():
    """Beyond what float32 holds: references change, and all that is written."""
    q, k, parts, scale = growing_logits()
    got = backend.tile_scores(q, k, parts, scale=scale, interpret=INTERPRET)
    want = loops(q, k, parts, scale)
    np.testing.assert_allclose(got, want, **TILE_SCORES_OF_EXACT_LOGITS)
    np.testing.assert_allclose(got.sum(-1), 1.0, rtol=1e-2)


@pytest.mark.nightly
def test_kernel_keeps_the_pairs_that_float32_keeps():
    """At a tenth of the pairs, of means of random tokens that lean to a direction."""
    case = Case(tiles=64, per_tile=8, size=3.0)
    scale = case.head_dim**-0.5
    got = backend.tile_scores(
        *case.arrays(), case.parts, scale=scale, interpret=INTERPRET
    )
    want = loops(*case.arrays(), case.parts, scale)
    kept = []
    for scores in (np.asarray(got), want):
        order = np.argsort(-scores.ravel(), kind="stable")
        kept.append(set(order[: scores.size // 10]))
    assert len(kept[0] - kept[1]) <= 0.01 * len(kept[0])


@pytest.mark.nightly
def test_derivatives_are_those_of_xla(monkeypatch):
    case = CASES["short-last-block"]
    in_interpret = functools.partial(backend.tile_scores, interpret=INTERPRET)
    monkeypatch.setattr(backend, "tile_scores", in_interpret)

    options = {"parts": case.parts, "scale": 0.125}

    def gradients(function):
        def loss(q, k):
            return jnp.sin(10 * function(q, k, **options)).sum()

        return jax.grad(loss, (0, 1))(*case.arrays())

    def by_xla(q, k, *, parts, scale):
        return xla.tile_scores(parts, q, k, scale)

    in_kernel = functools.partial(api._scores, scale_array=None, max_bytes=None)
    for x, y in zip(gradients(in_kernel), gradients(by_xla), strict=True):
        error = np.linalg.norm(x - y) / np.linalg.norm(y)
        assert error < TILE_SCORES_BFLOAT16["rtol"]


def test_mapped_axes_and_arrays_of_a_scale():
    case = CASES["less-than-a-block"]
    q, k = case.arrays()
    want = loops(q, k, case.parts, 0.25)
    score = functools.partial(tile_scores, parts=case.parts)

    def one(q, k, scale):
        return score(q[None], k[None], scale=scale)[0]

    got = jax.vmap(one, (0, 0, None))(q, k, jnp.float32(0.25))
    np.testing.assert_allclose(got, want, **TILE_SCORES)
    half = score(4 * q, k)  # of head dimension 64: the default is 1 / 8
    np.testing.assert_allclose(half, loops(4 * q, k, case.parts, 0.125), **TILE_SCORES)


LOWERED = {  # tiles, parts of a tile, head dimension, whether parts count differently
    "hunyuan": (990, 8, 128, False),
    "edges": (990, 8, 128, True),
    "four": (63, 4, 64, False),
    "sixteen": (990, 16, 128, True),
    "two": (63, 2, 64, True),
}


@pytest.mark.parametrize("name", mostly_nightly(LOWERED, ("hunyuan",)))
def test_lowers_for_cuda(name):
    tiles, per_tile, head_dim, is_uneven = LOWERED[name]
    case = Case(tiles=tiles, per_tile=per_tile, is_uneven=is_uneven)
    q = jax.ShapeDtypeStruct((1, tiles * per_tile, 24, head_dim), jnp.float32)
    run = functools.partial(backend.tile_scores, parts=case.parts, scale=0.1)
    text = jax.jit(run).trace(q, q).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text


@pytest.mark.parametrize("head_dim", [64, 128])
def test_fits_shared_memory(head_dim):
    assert smem_bytes(head_dim) <= MAX_SMEM_BYTES


def test_causes_are_named():
    parts = Case(tiles=3, per_tile=8).parts
    shape = (1, 24, 2, 64)
    assert why_not_in_kernel(shape, parts, H100) is None
    assert "sm_90" in str(why_not_in_kernel(shape, parts, CPU))
    odd = Case(tiles=3, per_tile=6).parts
    message = "it takes 2, 4, 8 and 16 parts of a tile, not 6"
    assert why_not_in_kernel((1, 18, 2, 64), odd, H100) == message
    cause = why_not_in_kernel((1, 24, 2, 96), parts, H100)
    assert "head dimension of 64 and 128, not 96" in str(cause)
    q = jnp.zeros((1, 18, 2, 64))
    with pytest.raises(ValueError, match=message):
        backend.tile_scores(q, q, odd, scale=1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"per_tile": 3}, "same multiple of per_tile=3"),
        ({"query_weights": (1.0,)}, "1 query weights and 4 key weights"),
        ({"key_weights": (1.0, -1.0, 1.0, 1.0)}, "key_weights must be finite and not"),
    ],
    ids=["not-divided", "other-numbers", "negative"],
)
def test_weights_that_do_not_fit_are_refused(changes, message):
    weights = (0.5,) * 4
    given = {"per_tile": 2, "query_weights": weights, "key_weights": weights}
    with pytest.raises(ValueError, match=message):
        Parts(**(given | changes))


def test_arrays_that_do_not_fit_are_refused():
    parts = Case(tiles=3, per_tile=8).parts
    q = jnp.zeros((1, 16, 1, 8))
    with pytest.raises(ValueError, match=r"q has shape .*M = 24 parts"):
        tile_scores(q, q, parts)

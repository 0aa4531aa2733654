"""Muon: steps of matrices whose singular values are all about equal.

Source: Jordan et al., Muon: An optimizer for hidden layers in neural networks, 2024;
Liu et al., Muon is Scalable for LLM Training, arXiv 2502.16982, section 2.2.
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

# Each iteration maps a singular value s to a s + b s^3 + c s^5. These raise small ones
# fast and never settle: five bring all from 0.002 to 1 between 0.68 and 1.21.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
# Root mean square of AdamW's updates: a rate and a decay made for AdamW fit, too.
UPDATE_SIZE = 0.2


def scale_by_muon(momentum: float) -> optax.GradientTransformation:
    """Returns Muon without rate and decay, for `[..., in, out]` kernels only.

    Args:
      momentum: Weight of the gradients before; Nesterov's kind.
    """
    return optax.chain(
        optax.trace(momentum, nesterov=True),
        optax.stateless(lambda updates, _: jax.tree.map(_update_of, updates)),
    )


def orthogonalize(
    matrices: Float[Array, "*B I O"],
) -> Float[Array, "*B I O"]:
    """Brings the singular values of each matrix near 1, by Newton-Schulz iterations.

    Those below 0.002 of the matrix's norm stay smaller. Products are taken at JAX's
    default precision, which is TF32 on a Hopper GPU.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices  # products of the short side are smaller
    # A matrix of zeros stays one.
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-12)
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x


def _update_of(momentum: Float[Array, "*B I O"]) -> Float[Array, "*B I O"]:
    # An orthogonal matrix has entries of mean square 1 / max(I, O).
    size = UPDATE_SIZE * max(momentum.shape[-2:]) ** 0.5
    return size * orthogonalize(momentum)

"""DraftAttention for Flax: an NNX layer, and a drop-in for the built-in layers."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from flax.nnx.nn import dtypes
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float, Int

from draft_jax.attention import draft_attention, scheduled_attention
from draft_jax.block_mask import BlockMask
from draft_jax.config import DraftConfig
from draft_jax.grid import VideoGrid
from draft_jax.schedule import DraftStep
from pallas_kernels import BackendName
from pallas_kernels.common import (
    AnyArray,
    Order,
    make_plain,
    register_configuration,
    to_jax,
    validation,
)

# Turns the tokens of q or k, e.g. by a rotary embedding: [B, T, N, D] to the same.
TokenTransform = Callable[[jax.Array], jax.Array]

_DEFAULT_PRECISIONS = (
    None,
    jax.lax.Precision.DEFAULT,
    jax.lax.DotAlgorithmPreset.DEFAULT,
    "default",
    "DEFAULT",
    "fastest",
)
_NUMBERS = (bool, int, float, np.generic)
_KERNEL_INIT = nnx.initializers.lecun_normal()
_BIAS_INIT = nnx.initializers.zeros_init()


class DraftAttention(nnx.Module):
    """Multi-head self-attention over video tokens, sparse by a draft.

    Its parameters `query`, `key`, `value` and `out` are named and shaped as those of
    `nnx.MultiHeadAttention`, so weights move between the two. The video's size is
    not fixed by the layer: it is an argument of each call.

    Args:
      num_heads: Attention heads, N.
      in_features: Channels of the input.
      qkv_features: Channels of all heads together; in_features by default.
      out_features: Channels of the output; in_features by default.
      config: What is computed.
      order: Order of the visual tokens; see `draft_attention`.
      normalize_qk: Apply RMS norm to queries and keys, per head.
      use_bias: Whether the projections have a bias.
      dtype: Computation type: queries, keys and values are cast to it. Inferred from
        inputs and parameters by default; the three must then come out alike.
      param_dtype: Type of the parameters.
      precision: Precision of the projections.
      kernel_init: Initializer of the projections' kernels.
      bias_init: Initializer of the projections' biases.
      backend: See `pallas_kernels.block_sparse_attention`.
      rngs: Random keys for the parameters.

    Raises:
      ValueError: num_heads is not positive, qkv_features is not a multiple of it, or
        order is unknown.

    Source: DraftAttention (arXiv 2505.14708).
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        *,
        config: DraftConfig,
        order: Order = "raster",
        normalize_qk: bool = False,
        use_bias: bool = True,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: jax.lax.PrecisionLike = None,
        kernel_init: Initializer = _KERNEL_INIT,
        bias_init: Initializer = _BIAS_INIT,
        backend: BackendName = "auto",
        rngs: nnx.Rngs,
    ):
        qkv_features = in_features if qkv_features is None else qkv_features
        out_features = in_features if out_features is None else out_features
        if num_heads < 1:
            raise ValueError(f"{num_heads=} must be a positive integer")
        if qkv_features % num_heads:
            raise ValueError(f"{qkv_features=} must be a multiple of {num_heads=}")
        validation.check_order(order)
        self.num_heads = num_heads
        self.config = config
        self.order = order
        self.backend = backend
        self.dtype = dtype
        heads = (num_heads, qkv_features // num_heads)
        settings: dict[str, Any] = {
            "use_bias": use_bias,
            "dtype": dtype,
            "param_dtype": param_dtype,
            "precision": precision,
            "kernel_init": kernel_init,
            "bias_init": bias_init,
            "rngs": rngs,
        }
        self.query = nnx.LinearGeneral(in_features, heads, **settings)
        self.key = nnx.LinearGeneral(in_features, heads, **settings)
        self.value = nnx.LinearGeneral(in_features, heads, **settings)
        self.out = nnx.LinearGeneral(heads, out_features, axis=(-2, -1), **settings)
        self.normalize_qk = normalize_qk
        if normalize_qk:
            norm: dict[str, Any] = {
                "dtype": dtype,
                "param_dtype": param_dtype,
                "rngs": rngs,
            }
            self.query_norm = nnx.RMSNorm(heads[1], **norm)
            self.key_norm = nnx.RMSNorm(heads[1], **norm)

    def __call__(
        self,
        x: Float[AnyArray, "B T C"],
        *,
        grid: VideoGrid,
        text_lengths: Int[AnyArray, " B"] | None = None,
        qk_transform: TokenTransform | None = None,
    ) -> Float[Array, "B T C_out"]:
        """Applies the layer, sparse by a new draft.

        Args:
          x: Tokens of the sequence, T = `grid.num_tokens`.
          grid: Geometry of the sequence. Static.
          text_lengths: See `draft_attention`.
          qk_transform: See `project`.

        Returns:
          The output.

        Raises:
          ValueError: As `draft_attention`.
          TypeError: As `draft_attention`.
        """
        q, k, v = self.project(x, qk_transform)
        return self.out(
            draft_attention(
                q,
                k,
                v,
                grid=grid,
                config=self.config,
                text_lengths=text_lengths,
                order=self.order,
                backend=self.backend,
            )
        )

    def scheduled(
        self,
        x: Float[AnyArray, "B T C"],
        *,
        grid: VideoGrid,
        step: DraftStep,
        mask: BlockMask | None,
        text_lengths: Int[AnyArray, " B"] | None = None,
        qk_transform: TokenTransform | None = None,
    ) -> tuple[Float[Array, "B T C_out"], BlockMask | None]:
        """Applies the layer on one step of a `SparsitySchedule`.

        Args:
          x: Tokens of the sequence, T = `grid.num_tokens`.
          grid: Geometry of the sequence. Static.
          step: This step, for this layer: `DraftStep.for_layer`.
          mask: This layer's mask from the step before, or `initial_mask`; None where no
            mask is kept, see `scheduled_attention`.
          text_lengths: See `draft_attention`.
          qk_transform: See `project`.

        Returns:
          The output, and the mask to pass on the next step.

        Raises:
          ValueError: As `scheduled_attention`.
          TypeError: As `scheduled_attention`.
        """
        q, k, v = self.project(x, qk_transform)
        out, mask = scheduled_attention(
            q,
            k,
            v,
            grid=grid,
            config=self.config,
            step=step,
            mask=mask,
            text_lengths=text_lengths,
            order=self.order,
            backend=self.backend,
        )
        return self.out(out), mask

    def project(
        self, x: Float[AnyArray, "B T C"], qk_transform: TokenTransform | None = None
    ) -> tuple[
        Float[Array, "B T N D"], Float[Array, "B T N D"], Float[Array, "B T N D"]
    ]:
        """Projects tokens to queries, keys and values.

        With a mask of your own, attend between `project` and `out`:
        `layer.out(block_sparse_attention(*layer.project(x), mask, ...))`.

        Args:
          x: Tokens of the sequence.
          qk_transform: Applied to queries and keys after their norm, such as a rotary
            embedding.

        Returns:
          Queries and keys, normalised and transformed, and values; in the layer's dtype
          if it was given one.

        Raises:
          ValueError: x is not [batch, tokens, channels].
        """
        if x.ndim != 3:
            raise ValueError(
                f"x has shape {x.shape}; expected [batch, tokens, channels]. Without a "
                "batch, pass x[None] and take [0] of the result"
            )
        q, k, v = self.query(x), self.key(x), self.value(x)
        if self.normalize_qk:
            q, k = self.query_norm(q), self.key_norm(k)
        if qk_transform is not None:
            q, k = qk_transform(q), qk_transform(k)
        return _cast((q, k, v), self.dtype)


def draft_attention_fn(
    grid: VideoGrid,
    config: DraftConfig,
    *,
    order: Order = "raster",
    scale: float | None = None,
    backend: BackendName = "auto",
) -> "DraftAttentionFn":
    """Makes an `attention_fn` for the attention layers of Flax.

    For `flax.nnx.MultiHeadAttention` and `flax.linen.MultiHeadDotProductAttention`.
    What block-sparse attention cannot do (masks and biases over tokens, dropout,
    causal masks, sown weights, grouped heads, keys of another length) raises instead
    of being ignored.

    Flax hands on no lengths of a padded text. Bind them where the layer is called:
    `functools.partial(draft_attention_fn(grid, config), text_lengths=lengths)`.

    Args:
      grid: Geometry of the sequence.
      config: What is computed.
      order: Order of the visual tokens; see `draft_attention`.
      scale: Factor of the logits; 1 / sqrt(D) by default.
      backend: See `pallas_kernels.block_sparse_attention`.

    Returns:
      A callable, equal and hashable by these arguments.

    Raises:
      ValueError: order is unknown.
    """
    validation.check_order(order)
    return DraftAttentionFn(
        grid=grid, config=config, order=order, scale=scale, backend=backend
    )


@register_configuration
@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftAttentionFn:
    """Draft attention as Flax calls it; `draft_attention_fn` makes one."""

    grid: VideoGrid
    config: DraftConfig
    order: Order
    scale: float | None
    backend: BackendName

    def __post_init__(self) -> None:
        make_plain(self)

    # Linen passes only arguments that the signature names, so every argument that
    # Flax knows is named: otherwise a user's bias or dropout would vanish silently.
    def __call__(
        self,
        query: Float[AnyArray, "*batch T N D"],
        key: Float[AnyArray, "*batch_k T_k N_k D"],
        value: Float[AnyArray, "*batch_k T_k N_k D_v"],
        bias: Array | None = None,
        mask: Array | None = None,
        broadcast_dropout: bool = True,
        dropout_rng: Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Dtype | None = None,
        precision: jax.lax.PrecisionLike = None,
        module: Any = None,
        promote_dtype: Callable[..., Any] = dtypes.promote_dtype,
        is_causal: bool = False,
        input_positions: Array | None = None,
        force_fp32_for_softmax: bool = False,
        einsum_dot_general: Callable[..., Array] | None = None,
        qk_attn_weights_einsum: Callable[..., Array] | None = None,
        attn_weights_value_einsum: Callable[..., Array] | None = None,
        text_lengths: Int[AnyArray, "*batch"] | None = None,
    ) -> Float[Array, "*batch T N D"]:
        """Attends; takes the arguments of Flax's `dot_product_attention`.

        Args:
          query: Queries, T = `grid.num_tokens`.
          key: Keys, like query.
          value: Values, like query.
          bias: Not supported.
          mask: Not supported: text_lengths exclude padding, and
            `pallas_kernels.block_sparse_attention` takes masks of blocks.
          broadcast_dropout: Without effect, as there is no dropout.
          dropout_rng: Without effect, as there is no dropout.
          dropout_rate: Must be 0 unless deterministic.
          deterministic: Whether dropout is off.
          dtype: Computation type: query, key and value are cast to it. None where they
            are of one type, as `draft_attention` takes them. Softmax is always float32.
          precision: Must be the default: the backend chooses it.
          module: Not supported: there are no dense weights to sow.
          promote_dtype: How query, key and value get `dtype`.
          is_causal: Not supported.
          input_positions: Not supported.
          force_fp32_for_softmax: Always so.
          einsum_dot_general: Not supported.
          qk_attn_weights_einsum: Not supported.
          attn_weights_value_einsum: Not supported.
          text_lengths: Valid text tokens of each batch item; see `draft_attention`.

        Returns:
          The output, like query.

        Raises:
          NotImplementedError: An argument above that is not supported is given.
          ValueError: The shapes do not fit the grid or each other.
          TypeError: Types differ and dtype is None, or one is not supported.
        """
        unsupported = {
            "bias": bias,
            "mask": mask,
            "dropout_rate": dropout_rate if not deterministic else None,
            "precision": None if _is_default(precision) else precision,
            "module (sow_weights)": module,
            "is_causal": is_causal,
            "input_positions": input_positions,
            "einsum_dot_general": einsum_dot_general,
            "qk_attn_weights_einsum": qk_attn_weights_einsum,
            "attn_weights_value_einsum": attn_weights_value_einsum,
        }
        _refuse(unsupported)
        batch = query.shape[:-3]
        for name, array in (("key", key), ("value", value)):
            # Batches of other axes may hold as many items: [2, 3, ...] and [3, 2, ...].
            if array.shape[:-3] != batch:
                raise ValueError(
                    f"{name} has shape {array.shape}, batch {array.shape[:-3]}; it "
                    f"must equal query's batch {batch}, of shape {query.shape}"
                )
        if text_lengths is not None:
            if text_lengths.shape != batch:
                raise ValueError(
                    f"text_lengths has shape {text_lengths.shape}; expected query's "
                    f"batch {batch}"
                )
            text_lengths = text_lengths.reshape(-1)
        out = draft_attention(
            *(
                rearrange(x, "... T N D -> (...) T N D")
                for x in _cast(to_jax(query, key, value), dtype, promote_dtype)
            ),
            grid=self.grid,
            config=self.config,
            text_lengths=text_lengths,
            order=self.order,
            scale=self.scale,
            backend=self.backend,
        )
        return out.reshape(*batch, *out.shape[1:])


def _cast(
    qkv: tuple[Array, Array, Array],
    dtype: Dtype | None,
    promote_dtype: Callable[..., Any] = dtypes.promote_dtype,
) -> tuple[Array, Array, Array]:
    """Casts to a dtype that was chosen; without one `draft_attention` has its say."""
    return qkv if dtype is None else promote_dtype(qkv, dtype=dtype)


def _is_default(precision: Any) -> bool:
    """Returns whether a precision is what none is, in any of JAX's spellings."""
    if isinstance(precision, (tuple, list)):
        return all(map(_is_default, precision))
    return precision in _DEFAULT_PRECISIONS


# What else serves the purpose of an argument that is refused.
_INSTEAD = {
    "mask": ": padding after the text is said by text_lengths, see draft_attention_fn; "
    "masks of blocks go to pallas_kernels.block_sparse_attention",
}


def _refuse(arguments: dict[str, Any]) -> None:
    """Raises if any argument is something else than None, False or 0."""
    for name, value in arguments.items():
        if value is None or (isinstance(value, _NUMBERS) and not value):
            continue
        shown = f"array {value.shape}" if hasattr(value, "shape") else repr(value)
        raise NotImplementedError(
            f"{name}={shown} is not supported by draft_attention_fn; accepted is only "
            f"the default{_INSTEAD.get(name, '')}"
        )

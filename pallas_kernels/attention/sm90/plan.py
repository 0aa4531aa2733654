"""Static description of one launch: sizes, configuration, ways of copying, memory."""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.configuration import make_plain, register_configuration

# A reference or a view of one: the views have no public type.
Ref = Any

BLOCK = 128  # tokens of a query block and of a key block
ROWS = 64  # query rows of one consumer: the height of one wgmma
NUM_CONSUMERS = 2
PRODUCER = 2  # values of the "wg" axis: consumers 0 and 1, then the producer
# Named barriers; Mosaic uses the lowest four.
NAMED_TURN, NAMED_Q_FREE, NAMED_KV_FREE, NUM_NAMED = 4, 6, 7, 16
MAX_SMEM_BYTES = 227 * 1024


@register_configuration
@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelConfig:
    """Choices of how it is computed. Fields change only time and rounding.

    Attributes:
      num_slots: K or V blocks in flight.
      exact_softmax: Search every key block for the maxima of its rows, not only the
        first one. Repairs do.
      sums_last: Add up the weights of a block when all its exponentials have been
        taken, not in between. The order of the additions stays.
      consumer_registers: Registers of a thread of a consumer.
      producer_registers: Registers of a thread of the producer.
    """

    num_slots: int
    exact_softmax: bool = False
    sums_last: bool = False
    consumer_registers: int = 232
    producer_registers: int = 40

    def __post_init__(self) -> None:
        make_plain(self)
        if self.num_slots < 3:
            raise ValueError(f"{self.num_slots=} must be at least 3")
        if self.num_slots > NUM_NAMED - NAMED_KV_FREE:
            raise ValueError(
                f"{self.num_slots=} must be at most {NUM_NAMED - NAMED_KV_FREE} with "
                "named barriers"
            )

    @classmethod
    def for_head_dim(cls, head_dim: int) -> "KernelConfig":
        """Takes as many slots as shared memory or the named barriers allow.

        At head dimension 64 the softmax takes as long as the products, and additions
        between exponentials hold these up. Sums behind them took 178 ms for 191 (dense,
        H100, 126,720 x 24 x 64); at 128, where products hide the softmax, 3 to 7 %
        longer.
        """
        if head_dim == 128:
            return cls(num_slots=6)
        return cls(num_slots=9, sums_last=True)


@dataclasses.dataclass(frozen=True)
class Width:
    """A class of key blocks, whose products are computed over this many keys."""

    tokens: int
    longest: int  # tokens of the longest block of the class
    blocks: int  # how many the sequence has
    masks: bool  # some block of the class has fewer valid tokens


@runtime_checkable  # for tests that check types
class LoadsOfQueryBlock(Protocol):
    """Copies of one query block and of the key blocks that it keeps.

    `fill` counts the copies of K and V that the CTA has made before this one.
    """

    def load_queries(self) -> None:
        """Starts to copy the query block."""

    def load_block(
        self, source: Ref, block: Any, slot: Any, fill: Any, width: Width
    ) -> None:
        """Starts to copy a key block from K or V into a free slot of the ring."""

    def load_means(self, source: Ref, block: Any, slot: Any, fill: Any) -> None:
        """Starts to copy a block of mean keys or mean values likewise."""

    def finish(self, end: Any) -> None:
        """Makes all copies arrive; `end` is the `fill` of the next query block."""


@runtime_checkable
class BlockCopies(Protocol):
    """A way of copying blocks between global and shared memory: see `copies`."""

    @property
    def uses_tma(self) -> bool:
        """Says whether TMA copies, which two CTAs can let it do for each other."""

    @property
    def num_arrivals(self) -> int:
        """Arrivals that complete a key block on `kv_full`."""

    @property
    def num_query_arrivals(self) -> int:
        """Arrivals that complete a query block on `q_full`."""

    def smem(
        self, num_groups: int, size: int, head_dim: int, dtype: jax.typing.DTypeLike
    ) -> Any:
        """Returns the shared memory of so many groups of `size` tokens."""

    def first_tokens(self, smem: Ref, slot: Any, width: int) -> Ref:
        """Returns the first tokens of a block in shared memory."""

    def mean_shape(self, num_means: int) -> tuple[int, ...]:
        """Returns the axes of so many means in the array that they are read from."""

    def is_row_of_block(self, row: Any, consumer: Any, length: Any) -> Any:
        """Says which rows of a consumer hold tokens of a block of this length."""

    def loads(self, cta: Any, query_block: Any, fill: Any) -> LoadsOfQueryBlock:
        """Returns what copies a query block and its key blocks."""

    def store(self, cta: Any, query_block: Any, o_smem: Ref) -> None:
        """Starts to copy a consumer's rows of the output to global memory."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeanPlan:
    """Everything static about the means of a launch: see `means`."""

    num_blocks: int  # of BLOCK means
    per_column: int  # means that one count of dropped frames is for
    has_log_tokens: bool  # means stand for different numbers of tokens of a frame


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything static about one launch."""

    config: KernelConfig
    num_blocks: int  # of queries
    num_key_blocks: int
    num_heads: int
    head_dim: int
    num_ctas: int
    persistent: bool  # each CTA walks any number of query blocks, else one
    pairs: bool  # two CTAs are a cluster and share the keys of full rows
    is_dense: bool  # every list is full, and none is read
    scale: float
    copies: BlockCopies  # how blocks are read from memory and written
    widths: tuple[Width, ...]  # widest first; lists have them in this order
    masks_queries: bool  # some query inside a block is padding
    has_short_blocks: bool
    grows: bool  # weights of float16 overflow: references must follow the logits
    interpreted: bool  # on the CPU, which emulates instructions and named barriers
    means: MeanPlan | None = None  # behind the lists of rows that drop something


def scratch_types(plan: Plan, dtype: jax.typing.DTypeLike) -> dict[str, Any]:
    """Returns the shared memory and barriers of one CTA."""
    slots, dim, copies = plan.config.num_slots, plan.head_dim, plan.copies
    scratch = {
        "q_smem": copies.smem(NUM_CONSUMERS, ROWS, dim, dtype),
        "kv_smem": copies.smem(slots, BLOCK, dim, dtype),
        "lse_smem": plgpu.SMEM((NUM_CONSUMERS, ROWS), jnp.float32),
        "q_full": plgpu.Barrier(num_arrivals=copies.num_query_arrivals),
        "q_free": plgpu.Barrier(num_arrivals=NUM_CONSUMERS),
        "kv_full": plgpu.Barrier(num_arrivals=copies.num_arrivals, num_barriers=slots),
        "kv_free": plgpu.Barrier(num_arrivals=NUM_CONSUMERS, num_barriers=slots),
        "turn": plgpu.Barrier(num_barriers=NUM_CONSUMERS),
    }
    if plan.pairs:
        scratch["pair_free"] = plgpu.ClusterBarrier(
            collective_axes=("pair",), num_barriers=slots
        )
    return scratch


def smem_bytes(config: KernelConfig, head_dim: int, itemsize: int) -> int:
    """Returns the bytes of shared memory of one CTA, barriers included."""
    blocks = config.num_slots + 1  # K and V, Q
    barriers = 3 * config.num_slots + 2 + NUM_CONSUMERS
    return blocks * BLOCK * head_dim * itemsize + BLOCK * 4 + 8 * barriers

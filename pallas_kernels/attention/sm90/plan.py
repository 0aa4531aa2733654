"""What the Hopper kernel's roles share: sizes, shared memory, tiles and signals."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

BLOCK = 128  # tokens of a query block and of a key block
ROWS = 64  # query rows of one consumer: the height of one wgmma
ALIGNMENT = 8  # tokens; swizzled copies start at multiples of it
NUM_CONSUMERS = 2
PRODUCER = 2  # values of the "wg" axis: consumers 0 and 1, then the producer
THREADS = 128  # of a warpgroup
# Named barriers; Mosaic uses the lowest four.
NAMED_TURN, NAMED_Q_FREE, NAMED_KV_FREE, NUM_NAMED = 4, 6, 7, 16
MAX_SMEM_BYTES = 227 * 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelConfig:
    """How it is computed. Changing a field changes only time and rounding."""

    num_slots: int  # K or V blocks in flight
    ping_pong: bool = True  # consumers take turns in issuing matrix products
    overlap: bool = True  # issue the next logits before the product with V
    named_barriers: bool = True  # consumers signal through the hardware's barriers
    lazy: bool = True  # search only a row's first block for its maximum
    pairs: bool = True  # two CTAs copy the keys of full rows for each other
    skip_rows: bool = True  # no softmax for warps past the end of a query block
    consumer_registers: int = 232
    producer_registers: int = 40

    def __post_init__(self) -> None:
        if self.num_slots < 3:
            raise ValueError(f"{self.num_slots=} must be at least 3")
        if self.named_barriers and self.num_slots > NUM_NAMED - NAMED_KV_FREE:
            raise ValueError(
                f"{self.num_slots=} must be at most {NUM_NAMED - NAMED_KV_FREE} with "
                "named barriers"
            )

    @classmethod
    def for_head_dim(cls, head_dim: int) -> "KernelConfig":
        """As many slots as shared memory or the named barriers allow."""
        return cls(num_slots=6 if head_dim == 128 else 9)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything static about one launch."""

    config: KernelConfig
    num_blocks: int
    num_heads: int
    head_dim: int
    num_ctas: int
    persistent: bool  # each CTA walks any number of tiles, else one
    pairs: bool  # two CTAs are a cluster and share the keys of full rows
    is_dense: bool  # every list is full, and none is read
    scale: float
    copies: "Copies"  # how blocks are read from memory and written
    widths: tuple["Width", ...]  # widest first; lists have them in this order
    masks_queries: bool  # some query inside a block is padding
    has_short_blocks: bool
    grows: bool  # weights of float16 overflow: references must follow the logits
    emulate_wgmma: bool  # interpret mode has no wgmma with registers

    @property
    def uses_named_barriers(self) -> bool:
        return self.config.named_barriers and not self.emulate_wgmma

    @property
    def num_query_copies(self) -> int:
        """Copies of a query block that arrive on its barrier; each for one consumer."""
        if isinstance(self.copies, SingleRows):
            return 1
        return max(self.copies.number, NUM_CONSUMERS)

    @property
    def copies_ahead(self) -> int:
        """Copies by rows that are under way while the next one is started.

        A slot is free once its block and the next have arrived and been used, so two
        slots at least are for blocks that have.
        """
        return min(2, self.config.num_slots - 2)


@dataclasses.dataclass(frozen=True)
class Runs:
    """One TMA copy for each run of tokens that follow each other in memory."""

    tokens: int  # of a run; BLOCK if a block is one
    start_at_multiples: bool = False  # block r starts at token r * BLOCK

    @property
    def number(self) -> int:
        """Copies of a key block that arrive on its barrier."""
        return BLOCK // self.tokens

    def parts(self, width: "Width") -> list[tuple[int, int]]:
        """First row in shared memory, and tokens, of each copy of a key block.

        Runs past the width are copied too: a barrier counts all of them.
        """
        run = self.tokens
        return [
            (row, min(run, max(width.tokens - row, ALIGNMENT)))
            for row in range(0, BLOCK, run)
        ]


@dataclasses.dataclass(frozen=True)
class Boxes:
    """Raster order: a block is boxes of ALIGNMENT columns, one beside the other.

    One TMA copy takes a box out of an array of frames and rows, columns over ALIGNMENT,
    ALIGNMENT. In shared memory the boxes follow each other, so the tokens of a block
    stand in another order there than in tiled order.
    """

    rows: int  # of a tile; the lowest tiles of a frame may have fewer
    number: int  # of boxes side by side, each a copy that arrives on its barrier

    @property
    def tokens(self) -> int:
        return self.rows * ALIGNMENT

    def parts(self, width: "Width") -> list[tuple[int, int]]:
        """First row in shared memory, and tokens, of each copy of a key block."""
        size = width.longest // self.number
        return [(number * size, size) for number in range(self.number)]


@dataclasses.dataclass(frozen=True)
class SingleRows:
    """Threads copy each row of a block (`sm90_rows`), for TMA cannot."""

    because: str  # why, and what helps

    @property
    def number(self) -> int:
        """Arrivals of a key block: all threads of the producer together."""
        return 1


Copies = Runs | Boxes | SingleRows


@dataclasses.dataclass(frozen=True)
class Width:
    """A class of key blocks, whose products are computed over this many keys."""

    tokens: int
    longest: int  # tokens of the longest block of the class
    blocks: int  # how many the sequence has
    masks: bool  # some block of the class has fewer valid tokens


@dataclasses.dataclass(frozen=True)
class GlobalRefs:
    """References to global memory."""

    q: jax.Ref
    k: jax.Ref
    v: jax.Ref
    row_offsets: jax.Ref  # [B * N, R + 1]
    block_ids: jax.Ref  # [B * N, M]
    width_ends: jax.Ref  # [B * N, R, widths], where in a list each width ends
    full_list: jax.Ref  # [R], the blocks of a full row
    order: jax.Ref  # [num_tiles], tiles in the order in which CTAs take them
    num_tiles: jax.Ref  # [1], how many of them
    starts: jax.Ref  # [R], where blocks begin: see `sm90_geometry.Geometry`
    strides: jax.Ref  # [R], likewise
    lengths: jax.Ref  # [R], tokens of each block
    valid: jax.Ref  # [B, R], tokens of each block that are not padding
    reciprocals: jax.Ref  # [R], if blocks are copied by rows: see `sm90_rows`
    out: jax.Ref
    lse: jax.Ref  # [B * N, R, BLOCK]


@dataclasses.dataclass(frozen=True)
class Tile:
    """One query block and the entries of its list."""

    batch: jax.Array
    head: jax.Array
    list_row: jax.Array  # batch * num_heads + head
    block: jax.Array
    first: jax.Array  # entry in block_ids
    count: jax.Array
    is_shared: jax.Array | bool  # both CTAs of the pair have full rows of one head


def smem_transforms(*, in_boxes: bool = False) -> tuple[Any, ...]:
    """How tokens lie in shared memory: as wgmma reads them."""
    tiling = (1, ALIGNMENT, 64) if in_boxes else (ALIGNMENT, 64)
    return (
        plgpu.TilingTransform(tiling),  # type: ignore[abstract]
        plgpu.SwizzleTransform(128),  # type: ignore[abstract]
    )


def scratch_types(plan: Plan, dtype: jax.typing.DTypeLike) -> dict[str, Any]:
    """Shared memory and barriers of one CTA."""
    slots, dim = plan.config.num_slots, plan.head_dim
    rows = (NUM_CONSUMERS, ROWS)

    def tokens(number, size):
        if not isinstance(plan.copies, Boxes):
            return plgpu.SMEM((number, size, dim), dtype, transforms=smem_transforms())
        shape = (number, size // ALIGNMENT, ALIGNMENT, dim)
        return plgpu.SMEM(shape, dtype, transforms=smem_transforms(in_boxes=True))

    scratch = {
        "q_smem": tokens(NUM_CONSUMERS, ROWS),
        "kv_smem": tokens(slots, BLOCK),
        "lse_smem": plgpu.SMEM(rows, jnp.float32),
        "q_full": plgpu.Barrier(num_arrivals=plan.num_query_copies),
        "q_free": plgpu.Barrier(num_arrivals=NUM_CONSUMERS),
        "kv_full": plgpu.Barrier(num_arrivals=plan.copies.number, num_barriers=slots),
        "kv_free": plgpu.Barrier(num_arrivals=NUM_CONSUMERS, num_barriers=slots),
        "turn": plgpu.Barrier(num_barriers=NUM_CONSUMERS),
    }
    if plan.pairs:
        scratch["pair_free"] = plgpu.ClusterBarrier(
            collective_axes=("pair",), num_barriers=slots
        )
    return scratch


def smem_bytes(config: KernelConfig, head_dim: int, itemsize: int) -> int:
    """Shared memory of one CTA, barriers included."""
    blocks = config.num_slots + 1  # K and V, Q
    barriers = 3 * config.num_slots + 2 + NUM_CONSUMERS
    return blocks * BLOCK * head_dim * itemsize + BLOCK * 4 + 8 * barriers


def for_each_tile(gmem: GlobalRefs, plan: Plan, body, fill):
    """Calls `fill = body(tile, index, fill)` for the query blocks of this CTA."""
    cta = lax.axis_index("cta")
    if plan.pairs:
        return body(_tile_of_pair(gmem, plan), jnp.int32(0), fill)
    if not plan.persistent:
        return body(_tile(gmem, plan, cta), jnp.int32(0), fill)

    def step(index, fill):
        return body(_tile(gmem, plan, cta + index * plan.num_ctas), index, fill)

    return lax.fori_loop(0, num_own_tiles(gmem, plan), step, fill)


def num_own_tiles(gmem: GlobalRefs, plan: Plan):
    if not plan.persistent:
        return jnp.int32(1)
    later = gmem.num_tiles[0] - lax.axis_index("cta")
    return lax.div(later + (plan.num_ctas - 1), jnp.int32(plan.num_ctas))


def _tile(gmem: GlobalRefs, plan: Plan, position) -> Tile:
    number = gmem.order[position]
    list_row = lax.div(number, jnp.int32(plan.num_blocks))
    block = lax.rem(number, jnp.int32(plan.num_blocks))
    if plan.is_dense:
        first, last = jnp.int32(0), jnp.int32(plan.num_blocks)
    else:
        first = gmem.row_offsets[list_row, block]
        last = gmem.row_offsets[list_row, block + 1]
    return Tile(
        batch=lax.div(list_row, jnp.int32(plan.num_heads)),
        head=lax.rem(list_row, jnp.int32(plan.num_heads)),
        list_row=list_row,
        block=block,
        first=first,
        count=last - first,
        is_shared=False,
    )


def _tile_of_pair(gmem: GlobalRefs, plan: Plan) -> Tile:
    first, own = 2 * lax.axis_index("cta"), lax.axis_index("pair")
    tile = _tile(gmem, plan, first + own)
    peer = _tile(gmem, plan, first + 1 - own)
    is_shared = (tile.list_row == peer.list_row) & (
        jnp.minimum(tile.count, peer.count) == plan.num_blocks
    )
    return dataclasses.replace(tile, is_shared=is_shared)


def shares_keys(gmem: GlobalRefs, plan: Plan) -> jax.Array | bool:
    """Whether the two CTAs of a pair copy key blocks for each other."""
    return _tile_of_pair(gmem, plan).is_shared if plan.pairs else False


def block_of(gmem: GlobalRefs, plan: Plan, tile: Tile, step):
    """Key block of a step; that of the last step for steps beyond it.

    A full row's list may have any order; both CTAs of a pair must take the same one.
    """
    step = jnp.minimum(step, tile.count - 1)
    if plan.is_dense:
        return gmem.full_list[step]
    block = gmem.block_ids[tile.list_row, tile.first + step]
    if not plan.pairs:
        return block
    return jnp.where(tile.is_shared, gmem.full_list[step], block)


def bounds_of_width(gmem: GlobalRefs, plan: Plan, tile: Tile, index: int):
    """First step, and the one after the last, with blocks of a width."""
    if len(plan.widths) == 1:
        return jnp.int32(0), tile.count
    if plan.is_dense:
        before = sum(width.blocks for width in plan.widths[:index])
        return jnp.int32(before), jnp.int32(before + plan.widths[index].blocks)
    ends = gmem.width_ends
    begin = ends[tile.list_row, tile.block, index - 1] if index else jnp.int32(0)
    return begin, ends[tile.list_row, tile.block, index]


def token_of_row(gmem: GlobalRefs, runs: Runs, block, row):
    """Where in memory the token of a row of a block is.

    `row` is a multiple of ALIGNMENT, and Mosaic must see that the token is one.
    """
    if runs.start_at_multiples:
        return block * BLOCK + row
    start = gmem.starts[block]
    if runs.tokens == BLOCK:
        return start * ALIGNMENT + row
    run = lax.div(jnp.asarray(row, jnp.int32), jnp.int32(runs.tokens))
    units = start + run * (gmem.strides[block] - runs.tokens // ALIGNMENT)
    return units * ALIGNMENT + row


def box_of(gmem: GlobalRefs, array, tile: Tile, block, number: int, rows):
    """The first rows of one box of a block, [rows, ALIGNMENT, D]."""
    column = gmem.strides[block] + number
    return array.at[tile.batch, pl.ds(gmem.starts[block], rows), column, :, tile.head]


def as_rows(plan: Plan, tokens):
    """Tokens in shared memory as a matrix; boxes are kept as rows of ALIGNMENT.

    Interpret mode reshapes no references: there values are, where they are read.
    """
    if not isinstance(plan.copies, Boxes) or plan.emulate_wgmma:
        return tokens
    rows, columns, head_dim = tokens.shape
    return tokens.reshape(rows * columns, head_dim)


def slot_of(plan: Plan, fill):
    return lax.rem(fill, jnp.int32(plan.config.num_slots))


@dataclasses.dataclass(frozen=True)
class Signals:
    """What warpgroups tell each other; copies signal through `q_full` and `kv_full`.

    On the GPU these may be the hardware's 16 named barriers, where an arrival is one
    instruction of a warp, while all its threads arrive on a barrier in shared memory
    one by one.
    """

    plan: Plan
    q_free: jax.Ref
    kv_free: jax.Ref
    turn: jax.Ref
    pair_free: jax.Ref | None = None

    def wait_q_free(self):
        self._wait(self.q_free, NAMED_Q_FREE, NUM_CONSUMERS + 1)

    def free_q(self):
        self._arrive(self.q_free, NAMED_Q_FREE, NUM_CONSUMERS + 1)

    def wait_kv_free(self, slot, is_shared: jax.Array | bool = False):
        """Waits for the consumers; where blocks are shared, for the other CTA's too."""
        self._wait(self.kv_free.at[slot], NAMED_KV_FREE + slot, NUM_CONSUMERS + 1)
        if self.pair_free is None:
            return
        pair_free = self.pair_free.at[slot]

        @pl.when(is_shared)
        def _():
            plgpu.barrier_arrive(pair_free)
            plgpu.barrier_wait(pair_free)

    def free_kv(self, slot):
        self._arrive(self.kv_free.at[slot], NAMED_KV_FREE + slot, NUM_CONSUMERS + 1)

    def take_turn(self, wg):
        self._wait(self.turn.at[wg], NAMED_TURN + wg, NUM_CONSUMERS)

    def give_turn(self, wg):
        self._arrive(self.turn.at[wg], NAMED_TURN + wg, NUM_CONSUMERS)

    def _wait(self, barrier, name, num_warpgroups):
        if self.plan.uses_named_barriers:
            _named_barrier("sync", name, num_warpgroups)
        else:
            plgpu.barrier_wait(barrier)

    def _arrive(self, barrier, name, num_warpgroups):
        if self.plan.uses_named_barriers:
            _named_barrier("arrive", name, num_warpgroups)
        else:
            plgpu.barrier_arrive(barrier)


def _named_barrier(operation: str, name, num_warpgroups: int):
    """bar.sync or bar.arrive on a hardware barrier."""
    instruction = f"bar.{operation} $0, {num_warpgroups * THREADS};"

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT,))
    def emit(_, name):
        llvm.inline_asm(
            ir.Type.parse("!llvm.void"),
            [name.registers[()]],
            instruction,
            "r",
            has_side_effects=True,
        )

    emit(jnp.asarray(name, jnp.int32))

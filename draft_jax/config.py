"""Options of DraftAttention, and the sizes that follow from them."""

import dataclasses
import math
import numbers
from fractions import Fraction
from typing import Any, Literal, Protocol, get_args, runtime_checkable

from jaxtyping import Array, Float, Int

from draft_jax.block_mask import BlockMask
from draft_jax.grid import VideoGrid
from pallas_kernels.common import (
    Order,
    Scale,
    SubTiles,
    make_plain,
    register_configuration,
    warn_once,
)

Pooling = Literal["mean", "mean+max"]
EdgeTiles = Literal["by_tokens", "as_published"]
Selection = Literal["percentile", "row_topk", "top_p"]
Ranking = Literal["mass", "spread", "exact_spread"]
PARTS_OF_TILE = 8  # of a draft of "eighths"
LEAST_SAMPLES = 32  # that a correction is fitted to
TOKENS_OF_SAMPLE = 32  # of the video, at least


@runtime_checkable
class MaskMaker(Protocol):
    """Makes block masks by another rule than the draft's: `DraftConfig.mask_maker`.

    It is hashable, and equal to makers of the same masks: programs are kept by it. A
    frozen dataclass is. Static patterns, and scores of another kind than a draft's
    handed to `select_blocks`, are two uses.
    """

    def __call__(
        self,
        q: Float[Array, "B T N D"],
        k: Float[Array, "B T N D"],
        v: Float[Array, "B T N D"] | None,
        *,
        grid: VideoGrid,
        config: "DraftConfig",
        budget: int | Int[Array, ""],
        scale: Scale | None,
        order: Order,
    ) -> BlockMask:
        """Returns a mask with capacity `mask_capacity(grid, config)`.

        Args:
          q: Queries of the whole sequence. No gradient flows to them.
          k: Keys, like q.
          v: Values, like q; None where `compute_mask` is not given any.
          grid: Geometry that defines the blocks.
          config: The configuration that has this maker.
          budget: Pairs to keep; `config.selection` says whether per head or per row.
            Traced in programs that serve several sparsities.
          scale: Factor of the logits; 1 / sqrt(D) if None.
          order: How the visual tokens are ordered.
        """


class SparsityWarning(UserWarning):
    """More is computed than the sparsity says: the video has too few blocks for it."""


@register_configuration
@dataclasses.dataclass(frozen=True, kw_only=True)
class Compensation:
    """Means of keys and values that stand for what is skipped.

    Every skipped block takes part in the softmax through the means of its sub-tiles,
    each taken over a few consecutive frames at the same place. A mean counts as the
    tokens it stands for: those of the frames whose block was skipped.

    Smaller sub-tiles and fewer frames make more means: a share
    1 / (rows * columns * frames) of the keys, which every query sees. Fine in space and
    coarse in time served best of all splits with as much work on the shipped model.

    Args:
      sub_tile: Rows and columns of a sub-tile, in tokens. One larger than the tile is
        the whole tile.
      frames: Consecutive latent frames that a mean is taken over, 1 to 255.

    Raises:
      ValueError: A field is outside the values above.
    """

    sub_tile: tuple[int, int] = (2, 2)
    frames: int = 8

    def __post_init__(self) -> None:
        make_plain(self)
        check_sides("sub_tile", self.sub_tile)
        if not _is_positive(self.frames) or self.frames > 255:
            raise ValueError(f"frames={self.frames!r} must be an integer in 1 to 255")


@register_configuration
@dataclasses.dataclass(frozen=True, kw_only=True)
class Correction:
    """A linear map of the query that makes up for what sparse attention leaves.

    The exact output is computed for a few query tokens of the video, spread evenly. An
    affine map of the query is fitted to the error of their sparse output, by ridge
    regression for each batch item and head, and is added to the output of every query
    token of the video. Text is exact without it.

    A skipped block whose keys and values vary together moves the output in proportion
    to the query, to first order: means cannot show that, the map does.

    Args:
      samples: Query tokens whose exact output is computed. At most one in 32 of the
        video is taken; where that would be fewer than 32, nothing is corrected.
      prior: Strength of the ridge penalty: how many samples the assumption is worth
        that queries do not explain the error. It is scaled by the variance of queries.
        Less than a few hundredths is as good as none: float32's digits set a floor.

    Raises:
      ValueError: A field is outside the values above.

    Source: Exact rows among sparse ones are those of Delta Attention
    (arXiv 2505.11254), which adds the error of one row to the rows after it.
    """

    samples: int = 256
    prior: float = 160.0

    def __post_init__(self) -> None:
        make_plain(self)
        if not _is_positive(self.samples) or self.samples < LEAST_SAMPLES:
            raise ValueError(
                f"samples={self.samples!r} must be an integer >= {LEAST_SAMPLES}"
            )
        if not is_real(self.prior) or not 0.0 < self.prior < math.inf:
            raise ValueError(f"prior={self.prior!r} must be a positive number")


@register_configuration
@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftConfig:
    """Options of the method. Changing a field changes the result.

    The defaults came closest to dense attention for their time on the shipped model:
    drafts of sub-tiles, rows of equal budget ranked by spread, means for what is
    skipped, and a correction of what they leave. `DraftConfig.paper()` is the published
    method.

    Hashable, and a pytree without leaves: jit takes it as any argument, static.
    NumPy's numbers become Python's.

    Args:
      pooling: How the tokens of a tile become one draft token. "mean" is the
        paper's. "mean+max" averages the softmax maps of the mean-pooled and of the
        max-pooled queries and keys. The successor of the paper is said to add max
        pooling; its exact form was not public when this was written, so
        "mean+max" is this project's definition.
      edge_tiles: How much a key tile that is cut off by the frame's edge counts in the
        softmax of the draft. "by_tokens" weights every key tile by its number of
        tokens, as if each had the mean's logit: a draft of equal tokens is then exact.
        "as_published" weights all tiles alike, as the published code does. They are
        one where the tile divides the frame.
      selection: How block pairs of the video are chosen from the draft map.
        "percentile" ranks all S x S pairs of a head together (the paper);
        "row_topk" gives every query block the same number of key blocks; "top_p"
        gives each query block the fewest key blocks whose draft probabilities
        reach `top_p`.
      sparsity: Share of visual block pairs skipped. For "top_p", the share of each
        row that is skipped at least: it bounds the static size of the mask.
      top_p: Probability mass to reach in each row, in (0, 1]. Read by "top_p" only.
      keep_own_tile: Always keep each query block's own block.
      keep_first_frame: Always keep the key blocks of the first frame.
      draft_tile: Rows and columns of the parts of a tile that the draft pools, in
        tokens. The score of a pair of tiles is then the probability that its parts of
        the key tile have together, averaged over the parts of the query tile.
        "eighths" halves the longer side of the tile, the rows of a square, until
        there are 8 parts or each is a token: 4 x 4 tokens of a tile of 8 x 16, 2 x 2
        of one of 4 x 8. None pools whole tiles (the paper).
      compensation: Means that stand for the skipped blocks. None leaves them out (the
        paper).
      correction: A linear map of the query, fitted to a few exact rows, that makes up
        for what is left of the error. None for none (the paper).
      ranking: What block pairs are ranked by. "mass" is their probability (the paper).
        "spread" multiplies it by how badly the means stand for the key block: the root
        mean square of q . (k - mean of k) over its tokens, for the query tile's mean
        and with the channels taken as uncorrelated. "exact_spread" takes them as they
        are, which costs a product of all tiles with all keys. Both need compensation.
        For "top_p", the products are divided by their sum in each row.
      mask_maker: Makes the masks in place of the draft; see `MaskMaker`. Budget and
        capacity follow from `selection` and `sparsity` as ever, and `compensation`
        and `correction` make up for what its masks skip; fields of the draft are not
        read.

    The pairs of `keep_own_tile` and `keep_first_frame` are ranked before all others,
    so they count within the budget; where the budget is smaller than their number,
    all of them are kept and nothing else.

    Raises:
      ValueError: A field is outside the values above.

    Source: DraftAttention (arXiv 2505.14708) for "mean" and "percentile".
    """

    pooling: Pooling = "mean"
    edge_tiles: EdgeTiles = "by_tokens"
    selection: Selection = "row_topk"
    sparsity: float = 0.9
    top_p: float = 0.9
    keep_own_tile: bool = False
    keep_first_frame: bool = False
    draft_tile: tuple[int, int] | Literal["eighths"] | None = "eighths"
    compensation: Compensation | None = dataclasses.field(default_factory=Compensation)
    correction: Correction | None = dataclasses.field(default_factory=Correction)
    ranking: Ranking = "spread"
    mask_maker: MaskMaker | None = None

    def __post_init__(self) -> None:
        make_plain(self)
        for name, accepted in (
            ("pooling", get_args(Pooling)),
            ("edge_tiles", get_args(EdgeTiles)),
            ("selection", get_args(Selection)),
            ("ranking", get_args(Ranking)),
        ):
            if (value := getattr(self, name)) not in accepted:
                raise ValueError(f"{name}={value!r} must be one of {accepted}")
        check_sparsity("sparsity", self.sparsity)
        if not is_real(self.top_p) or not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p={self.top_p!r} must be a number in (0, 1]")
        for name in ("keep_own_tile", "keep_first_frame"):
            if not isinstance(value := getattr(self, name), bool):
                raise ValueError(f"{name}={value!r} must be True or False")
        self._check_draft_tile()
        compensation = self.compensation
        if compensation is not None and not isinstance(compensation, Compensation):
            raise ValueError(f"{compensation=} must be a Compensation or None")
        if not isinstance(correction := self.correction, Correction | None):
            raise ValueError(f"{correction=} must be a Correction or None")
        if compensation is None and self.ranking != "mass":
            raise ValueError(
                f"ranking={self.ranking!r} needs compensation, as it asks how badly "
                "means stand for a block: pass compensation=Compensation(), or "
                "ranking='mass'"
            )
        self._check_mask_maker()

    def _check_draft_tile(self) -> None:
        parts = self.draft_tile
        if isinstance(parts, str) and parts != "eighths":
            raise ValueError(
                f"draft_tile={parts!r} must be 'eighths', None, or a tuple of two "
                "positive integers (rows, columns)"
            )
        if not isinstance(parts, str | None):
            check_sides("draft_tile", parts)

    def _check_mask_maker(self) -> None:
        maker = self.mask_maker
        if maker is None:
            return
        if not callable(maker) or isinstance(maker, type):
            raise ValueError(f"mask_maker={maker!r} must be a MaskMaker or None")
        try:
            hash(maker)
        except TypeError as error:
            raise ValueError(
                f"mask_maker={maker!r} must be hashable, as programs are kept by it: "
                "use a frozen dataclass"
            ) from error

    def draft_tile_of(self, grid: VideoGrid) -> tuple[int, int]:
        """Returns the rows and columns that the draft pools together on a grid.

        Args:
          grid: Its tiles are what is cut into parts.
        """
        if self.draft_tile is None:
            return grid.tile
        if not isinstance(self.draft_tile, str):
            return self.draft_tile
        part = grid.tile
        while _num_parts(grid.tile, part) < PARTS_OF_TILE and part != (1, 1):
            part = _halve_longer_side(part)
        return part

    @classmethod
    def paper(cls, **changes: Any) -> "DraftConfig":
        """Returns the paper's method: whole tiles, nothing for what is skipped.

        Args:
          **changes: Fields that differ, such as `sparsity`, which is 0.75.
        """
        preset: dict[str, Any] = {
            "selection": "percentile",
            "sparsity": 0.75,
            "draft_tile": None,
            "compensation": None,
            "correction": None,
            "ranking": "mass",
        }
        return cls(**(preset | changes))

    @classmethod
    def compensated(cls, **changes: Any) -> "DraftConfig":
        """Returns the default: sub-tile drafts, the spread, means and a correction.

        With the means, whose work is 1 / 32 of dense attention's, a layer does 0.13 of
        it at a sparsity of 0.9. The paper's 0.75 does 0.25. Exact rows add 256 over the
        number of tokens, see `extra_work`.

        Args:
          **changes: Fields that differ, such as `sparsity`.
        """
        return cls(**changes)


def extra_work(grid: VideoGrid, config: DraftConfig) -> float:
    """Returns the work beyond the kept blocks, as a share of dense attention's.

    It is the number of pairs of a visual query and a mean, and of pairs of an exact
    row and a token, over all pairs of tokens. Add `BlockMask.density` for the whole
    work of a sparse layer.

    Args:
      grid: Geometry of the sequence.
      config: Its compensation says how many means there are, its correction how many
        rows are exact.

    Returns:
      0.0 with neither.
    """
    pairs = num_samples(grid, config) * grid.num_tokens
    if (means := config.compensation) is not None:
        cells = sub_tiles_of(grid, means.sub_tile, means.frames)
        pairs += int((cells.tokens_per_frame > 0).sum()) * grid.num_visual_tokens
    return pairs / grid.num_tokens**2


def num_samples(grid: VideoGrid, config: DraftConfig) -> int:
    """Returns how many query tokens are computed exactly, for the correction.

    Args:
      grid: Geometry of the sequence.
      config: `config.correction` is read.

    Returns:
      0 where nothing is corrected.
    """
    if config.correction is None:
        return 0
    count = min(config.correction.samples, grid.num_visual_tokens // TOKENS_OF_SAMPLE)
    return count if count >= LEAST_SAMPLES else 0


def sub_tiles_of(
    grid: VideoGrid, sub_tile: tuple[int, int], frames: int = 1
) -> SubTiles:
    """Returns the sub-tiles of a grid's tiles over groups of frames."""
    return SubTiles(
        frames=grid.frames,
        height=grid.height,
        width=grid.width,
        tile=grid.tile,
        sub_tile=sub_tile,
        group_frames=min(frames, grid.frames),
    )


def draft_cells(grid: VideoGrid, config: DraftConfig) -> SubTiles:
    """Returns what a draft of sub-tiles pools, or the tiles of a draft of these."""
    return sub_tiles_of(grid, config.draft_tile_of(grid))


def kept_pairs_budget(sparsity: float, num_visual_blocks: int) -> int:
    """Returns the visual block pairs kept per head: ceil((1 - sparsity) * S * S).

    The decimal value of `sparsity` counts, not its binary approximation: 0.7 of 10
    pairs skips 7, although `(1 - 0.7) * 10` is above 3 in floating point.

    Args:
      sparsity: Share of pairs skipped, in [0, 1).
      num_visual_blocks: S, `VideoGrid.num_visual_blocks`.

    Returns:
      1 to S * S.

    Raises:
      ValueError: sparsity is not in [0, 1).

    Source: DraftAttention (arXiv 2505.14708). The published code keeps every score
    as large as the largest one to drop, hence one pair (and all its ties) more.
    """
    return _kept_share(sparsity, num_visual_blocks**2)


def static_budget(sparsity: float, grid: VideoGrid, config: DraftConfig) -> int:
    """Returns the pairs to keep among those that selection ranks together.

    Args:
      sparsity: Share of visual block pairs skipped, in [0, 1).
      grid: Geometry that defines the blocks.
      config: `config.selection` says what is ranked together.

    Returns:
      For "percentile", the pairs kept per head; otherwise the key blocks kept (for
      "top_p": kept at most) by each query block.

    Raises:
      ValueError: sparsity is not in [0, 1).
    """
    if config.selection == "percentile":
        return kept_pairs_budget(sparsity, grid.num_visual_blocks)
    return _kept_share(sparsity, grid.num_visual_blocks)


def mask_capacity(grid: VideoGrid, config: DraftConfig) -> int:
    """Returns the most block pairs a head can keep: the static size of every mask.

    It covers the budget at `config.sparsity` and the pairs forced by `keep_own_tile`
    and `keep_first_frame`. Beyond them it has one pair for each row that would be
    empty, and all pairs with text.

    Args:
      grid: Geometry that defines the blocks.
      config: What is selected.

    Returns:
      `BlockMask.capacity` of the masks that `select_blocks` makes.
    """
    num_visual = grid.num_visual_blocks
    text_pairs = grid.num_blocks**2 - num_visual**2
    per_row, per_head = _forced_pairs(grid, config)
    budget = static_budget(config.sparsity, grid, config)
    if config.selection != "percentile":
        return num_visual * max(budget, per_row) + text_pairs
    kept = max(budget, per_head)
    # `kept` pairs fill at least ceil(kept / S) rows; each other row may need one more.
    most_empty_rows = 0 if per_row else num_visual - math.ceil(kept / num_visual)
    return kept + most_empty_rows + text_pairs


def warn_of_few_blocks(sparsity: float, grid: VideoGrid) -> None:
    """Warns once if a sparsity can't be had because tiles are too large for the video.

    Each query block keeps at least one key block, a share 1 / S of all.
    """
    num_visual = grid.num_visual_blocks
    share = 1 - Fraction(str(sparsity))
    if share * num_visual >= 1:
        return
    smaller = _tile_for(share, grid)
    remedy = "no tile is small enough"
    if smaller is not None:
        remedy = f"use smaller tiles, such as VideoGrid(..., tile={smaller})"
    warn_once(
        f"sparsity={sparsity} can't be had: {grid} has {num_visual} visual blocks, "
        f"and each keeps at least one. At least {1 / num_visual:.3g} of the block "
        f"pairs are computed, not {float(share):.3g}: {remedy}, or ask for at most "
        f"sparsity={1 - 1 / num_visual:.3g}",
        SparsityWarning,
    )


def _tile_for(share: Fraction, grid: VideoGrid) -> tuple[int, int] | None:
    """Returns the first tile with blocks enough, halving the longer side each time."""
    tile = grid.tile
    while tile != (1, 1):
        tile = _halve_longer_side(tile)
        smaller = dataclasses.replace(grid, tile=tile)
        if share * smaller.num_visual_blocks >= 1:
            return tile
    return None


def _halve_longer_side(sides: tuple[int, int]) -> tuple[int, int]:
    """Returns rows and columns, the more of them halved and rounded up; else rows."""
    rows, columns = sides
    if columns > rows:
        return rows, -(-columns // 2)
    return -(-rows // 2), columns


def _num_parts(tile: tuple[int, int], part: tuple[int, int]) -> int:
    """Returns how many parts, whole or cut off, a tile has."""
    return math.prod(-(-side // own) for side, own in zip(tile, part, strict=True))


def check_sparsity(name: str, value: object) -> None:
    """Raises ValueError unless `value` is a number in [0, 1)."""
    if not is_real(value) or not 0.0 <= value < 1.0:  # type: ignore[operator]
        raise ValueError(f"{name}={value!r} must be a number in [0, 1)")


def check_sides(name: str, value: object) -> None:
    """Raises ValueError unless `value` is two positive integers, rows and columns."""
    if (
        not isinstance(value, tuple)
        or len(value) != 2
        or not all(map(_is_positive, value))
    ):
        raise ValueError(
            f"{name}={value!r} must be a tuple of two positive integers (rows, columns)"
        )


def _is_positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _forced_pairs(grid: VideoGrid, config: DraftConfig) -> tuple[int, int]:
    """Returns the most forced pairs of a row, and the forced pairs of a head."""
    num_visual = grid.num_visual_blocks
    first_frame = num_visual // grid.frames if config.keep_first_frame else 0
    # The own tiles of first-frame rows are already among the first frame's keys.
    rows_adding_own = num_visual - first_frame if config.keep_own_tile else 0
    per_row = first_frame + (rows_adding_own > 0)
    return per_row, num_visual * first_frame + rows_adding_own


def _kept_share(sparsity: float, pairs: int) -> int:
    check_sparsity("sparsity", sparsity)
    return math.ceil((1 - Fraction(str(sparsity))) * pairs)


def is_real(value: object) -> bool:
    """Returns whether `value` is a real number; True and False are not."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)

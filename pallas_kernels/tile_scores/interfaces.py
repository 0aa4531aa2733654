"""What the scores of tiles are made from."""

import dataclasses

import numpy as np

from pallas_kernels.common.configuration import make_plain, register_configuration


@register_configuration
@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """The parts that the tiles of a video are cut into, and what each counts.

    Parts are numbered tile by tile. Hashable: a static argument of jit.

    Attributes:
      per_tile: Parts of a tile, J.
      query_weights: Weight of each part among the queries of its tile; 0 leaves it out.
      key_weights: How often each part counts as a key, such as its tokens; 0 leaves it
        out.

    Raises:
      ValueError: There are not as many weights of each kind, `per_tile` does not
        divide their number, or a weight is negative or not finite.
    """

    per_tile: int
    query_weights: tuple[float, ...] = dataclasses.field(repr=False)
    key_weights: tuple[float, ...] = dataclasses.field(repr=False)

    def __post_init__(self) -> None:
        make_plain(self)
        queries, keys = len(self.query_weights), len(self.key_weights)
        if self.per_tile < 1 or queries != keys or not keys or keys % self.per_tile:
            raise ValueError(
                f"{queries} query weights and {keys} key weights must be the same "
                f"multiple of per_tile={self.per_tile}"
            )
        for name in ("query_weights", "key_weights"):
            weights = np.asarray(getattr(self, name))
            if not (np.isfinite(weights).all() and (weights >= 0).all()):
                raise ValueError(f"{name} must be finite and not negative")

    @property
    def num_parts(self) -> int:
        """Parts of all tiles, M."""
        return len(self.key_weights)

    @property
    def num_tiles(self) -> int:
        """Tiles, S."""
        return self.num_parts // self.per_tile

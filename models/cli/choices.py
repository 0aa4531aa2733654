"""Names and defaults that the help shows, as plain data.

The help and the version are printed without importing jax, which takes seconds; so
these repeat what the configurations say. A test compares the two.
"""

from typing import NamedTuple

SELECTIONS = ("percentile", "row_topk", "top_p")  # `DraftConfig.selection`
POOLINGS = ("mean", "mean+max")  # `DraftConfig.pooling`
EDGE_TILES = ("by_tokens", "as_published")  # `DraftConfig.edge_tiles`
RANKINGS = ("mass", "spread", "exact_spread")  # `DraftConfig.ranking`
GUIDANCE_BATCHINGS = ("one_call", "two_calls")
IMAGE_FITS = ("aspect", "crop")
LINEARS = ("bfloat16", "float8", "auto")  # `models.diffusion.dtypes.Linears`
LORA_STRICT = ("yes", "no")
PRESETS = ("paper", "published")
TEXT_DEVICES = ("default", "cpu")
# The noise levels that each solver can take, its default first.
GRIDS_OF_SOLVERS: dict[str, tuple[str, ...]] = {
    "euler": ("linear", "diffusers"),
    "unipc": ("wan", "diffusers"),
}
# Width and height in pixels.
NAMED_SIZES: dict[str, tuple[int, int]] = {
    "480p": (832, 480),
    "540p": (960, 544),
    "720p": (1280, 720),
}


class SamplingDefaults(NamedTuple):
    """The settings that the shipped model takes, `Sampling()`."""

    frames: int = 24
    height: int = 96
    width: int = 128
    num_steps: int = 16
    guidance: float = 4.0
    embedded_guidance: float | None = None
    shift: float = 3.0
    solver: str = "euler"
    seed: int = 0
    negative_prompt: str = ""


class MeansDefaults(NamedTuple):
    """The settings of `Compensation()`."""

    frames: int = 4


class DraftDefaults(NamedTuple):
    """The settings of `DraftConfig()` and `SparsitySchedule.paper()`."""

    sparsity: float = 0.75
    selection: str = "percentile"
    pooling: str = "mean"
    edge_tiles: str = "by_tokens"
    draft_tile: tuple[int, int] | None = None
    ranking: str = "mass"
    compensation: None = None
    top_p: float = 0.9
    dense_fraction: float = 0.25
    dense_layers: tuple[int, ...] = ()
    mask_refresh: int = 1

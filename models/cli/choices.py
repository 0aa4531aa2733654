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
VAE_DTYPES = ("float32", "bfloat16")
MESH_AXES = ("sequence", "guidance")  # of `DeviceMesh`
LORA_STRICT = ("yes", "no")
METHODS = ("compensated", "paper")  # presets of `DraftConfig`
PRESETS = ("paper", "published")  # of `SparsitySchedule`
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

    frames: int = 25
    height: int = 96
    width: int = 128
    num_steps: int = 16
    guidance: float = 4.0
    low_guidance: float | None = None
    boundary: float | None = None
    embedded_guidance: float | None = None
    shift: float = 3.0
    solver: str = "euler"
    seed: int = 0
    negative_prompt: str = ""


class MeansDefaults(NamedTuple):
    """The settings of `Compensation()`."""

    sub_tile: tuple[int, int] = (2, 2)
    frames: int = 8


class CorrectionDefaults(NamedTuple):
    """The settings of `Correction()`."""

    samples: int = 256


class DraftDefaults(NamedTuple):
    """The settings of `DraftConfig()` and `SparsitySchedule.paper()`."""

    sparsity: float = 0.9
    selection: str = "row_topk"
    pooling: str = "mean"
    edge_tiles: str = "by_tokens"
    draft_tile: tuple[int, int] | str | None = "eighths"
    ranking: str = "spread"
    top_p: float = 0.9
    dense_fraction: float = 0.25
    dense_layers: tuple[int, ...] = ()
    mask_refresh: int = 1


class PaperDefaults(NamedTuple):
    """What `DraftConfig.paper()` has instead."""

    sparsity: float = 0.75
    selection: str = "percentile"
    draft_tile: tuple[int, int] | None = None
    ranking: str = "mass"


def rows_and_columns(sides: tuple[int, int]) -> str:
    """Writes rows and columns as options take them, such as 4x4."""
    return f"{sides[0]}x{sides[1]}"

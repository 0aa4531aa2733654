"""Step caches: steps of a run that reuse what an earlier one computed.

`MagCache` skips steps that are known before the run, `EasyCache` those that the latents
allow; both are a `StepCache`, which the sampler knows alone.
"""

from models.diffusion.caches.easy import EasyCache
from models.diffusion.caches.interfaces import CacheState, StepCache
from models.diffusion.caches.mag import MagCache
from models.diffusion.caches.ratios import (
    MagRatios,
    RatiosError,
    published_ratios,
    read_ratios,
    write_ratios,
)

__all__ = [
    "CacheState",
    "EasyCache",
    "MagCache",
    "MagRatios",
    "RatiosError",
    "StepCache",
    "published_ratios",
    "read_ratios",
    "write_ratios",
]

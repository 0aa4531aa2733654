"""Interfaces, checks and helpers that all operations share."""

from pallas_kernels.common import validation
from pallas_kernels.common.arrays import AnyArray, Scale, to_jax
from pallas_kernels.common.batching import fold_mapped_axes
from pallas_kernels.common.configuration import (
    describe,
    make_plain,
    plain,
    read,
    register_configuration,
    register_export,
)
from pallas_kernels.common.device import Device, current_device, describe_device
from pallas_kernels.common.interfaces import (
    SUPPORTED_DTYPES,
    Backend,
    BlockGrid,
    BlockLists,
    Order,
    Problem,
    valid_tokens,
)
from pallas_kernels.common.linear_maps import (
    on_own_shards,
    with_derivatives_on_own_shards,
)
from pallas_kernels.common.products import Product
from pallas_kernels.common.sharding import (
    Axes,
    alike,
    lists_of_maps,
    over_explicit_axes,
)
from pallas_kernels.common.slow_paths import SlowBackendWarning, warn_once
from pallas_kernels.common.static import jit_once, split_scale
from pallas_kernels.common.sub_tiles import SubTiles
from pallas_kernels.common.token_order import reorder_tokens

__all__ = [
    "SUPPORTED_DTYPES",
    "AnyArray",
    "Axes",
    "Backend",
    "BlockGrid",
    "BlockLists",
    "Device",
    "Order",
    "Problem",
    "Product",
    "Scale",
    "SlowBackendWarning",
    "SubTiles",
    "alike",
    "current_device",
    "describe",
    "describe_device",
    "fold_mapped_axes",
    "jit_once",
    "lists_of_maps",
    "make_plain",
    "on_own_shards",
    "over_explicit_axes",
    "plain",
    "read",
    "register_configuration",
    "register_export",
    "reorder_tokens",
    "split_scale",
    "to_jax",
    "valid_tokens",
    "validation",
    "warn_once",
    "with_derivatives_on_own_shards",
]

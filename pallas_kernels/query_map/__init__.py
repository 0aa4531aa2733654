"""A linear map of queries, added to attention's output."""

from pallas_kernels.query_map.api import unchecked_add_query_map, why_not_in_kernel

__all__ = ["unchecked_add_query_map", "why_not_in_kernel"]

"""Matrix products in FP8: rounding with scales, and products of what was rounded."""

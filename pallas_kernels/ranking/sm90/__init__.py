"""Ranking on Hopper GPUs (sm_90), in Pallas Mosaic GPU and PTX."""

"""Diffusion sampling that model families share."""

"""Wan2.1: transformer, autoencoder, and the loading of published checkpoints."""

"""Wan2.1's causal video autoencoder."""

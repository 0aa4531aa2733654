"""HunyuanVideo's causal video autoencoder."""

"""Video diffusion transformers in flax.nnx that run with draft attention."""

"""What diffusion transformers of all families share: layers, stacks, embeddings."""

"""The draft: pooling, scores, ranking and selection of block pairs."""

"""What the causal video autoencoders of several model families share."""

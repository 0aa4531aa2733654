"""Pooling of tokens into draft tokens, alone or with norm and rotation."""

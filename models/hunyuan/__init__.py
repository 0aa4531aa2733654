"""HunyuanVideo: a transformer whose text stands in the sequence of the video."""

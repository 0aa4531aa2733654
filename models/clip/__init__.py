"""CLIP's vision tower, which makes the image tokens of Wan2.1's image-to-video."""

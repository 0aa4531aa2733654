"""The small text-to-video model that ships with this project, and its training."""

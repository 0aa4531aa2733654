"""Videos, images, plots and metrics."""

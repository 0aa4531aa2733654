"""Selection of the largest entries of draft maps."""

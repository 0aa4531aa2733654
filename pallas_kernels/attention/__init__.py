"""Block-sparse and dense attention."""

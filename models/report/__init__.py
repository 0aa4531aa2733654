"""Reports to look at: one page for a run, or for two runs side by side."""
